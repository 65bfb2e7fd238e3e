"""Local training of one client, as a function of its arguments alone."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from fedunlearn.nn.cuda_graph import captured
from fedunlearn.nn.evaluate import Counts, hits
from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import Batch
from fedunlearn.nn.precision import autocast


class LocalSGD:
    """SGD of one model on `losses.multi_task_loss`, each time as with a new optimiser.

    On a GPU a step with a full batch is a CUDA graph, which further fits with the same loss replay.

    Args:
        batch_size: of a full batch.
        frozen: parameters that stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: float,
        weight_decay: float,
        precision: str,
        batch_size: int,
        frozen: Iterable[nn.Parameter] = (),
    ) -> None:
        kept = {id(parameter) for parameter in frozen}
        moving = [parameter for parameter in model.parameters() if id(parameter) not in kept]
        self.model, self.precision, self.device = model, precision, moving[0].device
        rate = torch.zeros((), device=self.device) if self.on_gpu else 0.0  # a graph reads it where it lies
        self.optimiser = torch.optim.SGD(moving, lr=rate, momentum=momentum, weight_decay=weight_decay, fused=True)
        self.momenta = [torch.zeros_like(parameter) for parameter in moving]
        for parameter, buffer in zip(moving, self.momenta, strict=True):
            self.optimiser.state[parameter]["momentum_buffer"] = buffer
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.batch_size, self.loss = batch_size, {}
        self.replay: Callable[[], None] | None = None
        self.place: Batch = ()

    @property
    def on_gpu(self) -> bool:
        """Whether steps are graphs."""
        return self.device.type == "cuda"

    def fit(self, epochs: Iterable[Iterable[Batch]], *, lr: float, loss: dict[str, float]) -> Counts:
        """Train over `epochs` of batches, in place.

        Returns:
            Loss and hits of every example at the moment it was trained on, summed over all epochs.
        """
        self._begin(lr, loss)
        examples = 0
        for batch in (batch for epoch in epochs for batch in epoch):
            if self.on_gpu and len(batch[0]) == self.batch_size:
                self._replay(batch)
            else:
                self._step(batch)
            examples += len(batch[0])
        total, class_hits, client_hits = self.totals.tolist()
        return Counts(examples, total, int(class_hits), int(client_hits))

    def _begin(self, lr: float, loss: dict[str, float]) -> None:
        self.model.train()
        for buffer in (*self.momenta, self.totals):
            buffer.zero_()
        group = self.optimiser.param_groups[0]
        group["lr"] = group["lr"].fill_(lr) if self.on_gpu else lr
        if loss != self.loss:
            self.replay, self.loss = None, loss

    def _step(self, batch: Batch) -> None:
        with autocast(self.device, self.precision):
            outputs = self.model(batch[0])
        objective = multi_task_loss(*outputs, *batch[1:], **self.loss)
        self.model.zero_grad()
        objective.backward()
        self.optimiser.step()
        self.totals += torch.stack([objective.detach().double() * len(batch[0]), *hits(outputs, batch)])

    def _replay(self, batch: Batch) -> None:
        if self.replay is None:
            self.place = tuple(value.clone() for value in batch)
            state = [*self.model.state_dict().values(), *self.momenta, self.totals]
            self.replay = captured(lambda: self._step(self.place), state)
        for there, value in zip(self.place, batch, strict=True):
            there.copy_(value)
        self.replay()
