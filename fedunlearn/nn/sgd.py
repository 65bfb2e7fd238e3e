"""Train a model locally, as a function of arguments alone."""

from collections.abc import Callable, Iterable, Mapping
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from fedunlearn.nn.cuda_graph import NotCapturedError, captured
from fedunlearn.nn.descent import SGD
from fedunlearn.nn.evaluate import Counts, hits
from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import Batch
from fedunlearn.nn.precision import autocast

log = getLogger("fedunlearn")


class LocalSGD:
    """Train one model by SGD on a loss, each time as with a new optimiser.

    On a GPU a step with a full batch is a CUDA graph, which further fits with the same loss replay. A network that no
    graph can record, as one that asks for values in between, takes plain steps.

    Args:
        model: gives `nn.model.Outputs`.
        momentum: of SGD, 0..1.
        weight_decay: of SGD, added to the gradient.
        precision: of forward passes (`nn.precision`).
        batch_size: of a full batch.
        frozen: parameters that stay as they are.
        function: the loss, with the arguments of `losses.multi_task_loss`.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> model = TwoHeadResNet18(2, 0, width=8)
        >>> local = LocalSGD(model, momentum=0.9, weight_decay=0.0, precision="fp32", batch_size=4)
        >>> batch = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), torch.zeros(4, dtype=torch.int64)
        >>> local.fit([[batch], [batch]], lr=0.1, loss={}).examples
        8
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
        function: Callable[..., Tensor] = multi_task_loss,
    ) -> None:
        excluded = {id(parameter) for parameter in frozen}
        trained = [parameter for parameter in model.parameters() if id(parameter) not in excluded]
        self.model, self.precision, self.device = model, precision, trained[0].device
        rate = (
            torch.zeros((), device=self.device) if self.device.type == "cuda" else 0.0
        )  # a graph reads it where it lies
        self.optimiser = SGD(trained, lr=rate, momentum=momentum, weight_decay=weight_decay, fused=True)
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.batch_size, self.function, self.loss = batch_size, function, {}
        self.has_graphs = self.device.type == "cuda"
        self.replay: Callable[[], None] | None = None
        self.place: Batch | None = None  # where a graph reads its batch

    def fit(self, epochs: Iterable[Iterable[Batch]], *, lr: float, loss: Mapping[str, Any]) -> Counts:
        """Train over `epochs` of batches, in place.

        Args:
            epochs: of batches on the model's device, each of two examples or more where BatchNorm needs them.
            lr: learning rate.
            loss: keywords of the loss.

        Returns:
            Loss and hits of every example at the moment it was trained on, summed over all epochs.
        """
        self._begin(lr, loss)
        examples = 0
        for batch in (batch for epoch in epochs for batch in epoch):
            if not (self.has_graphs and len(batch[0]) == self.batch_size and self._replayed(batch)):
                self._step(batch)
            examples += len(batch[0])
        total, class_hits, client_hits = self.totals.tolist()
        return Counts(examples, total, int(class_hits), int(client_hits))

    def _begin(self, lr: float, loss: Mapping[str, Any]) -> None:
        self.model.train()
        for buffer in (*self.optimiser.momenta, self.totals):
            buffer.zero_()
        if isinstance(self.optimiser.lr, Tensor):
            self.optimiser.lr.fill_(lr)
        else:
            self.optimiser.lr = lr
        if loss != self.loss:
            self.replay, self.loss = None, dict(loss)

    def _step(self, batch: Batch) -> None:
        images, class_labels, client_ids = batch
        with autocast(self.device, self.precision):
            outputs = self.model(images)
        class_logits, client_logits, embedding = outputs
        objective = self.function(class_logits, client_logits, embedding, class_labels, client_ids, **self.loss)
        self.model.zero_grad()
        objective.backward()
        self.optimiser.step()
        self.totals += torch.stack([objective.detach().double() * len(images), *hits(outputs, batch)])

    def _replayed(self, batch: Batch) -> bool:
        """Take a step by a graph, recorded if need be; False where the network cannot be recorded."""
        if self.replay is None or self.place is None:
            images, class_labels, client_ids = batch
            place = images.clone(), class_labels.clone(), client_ids.clone()
            state = [*self.model.state_dict().values(), *self.optimiser.momenta, self.totals]
            try:
                self.place, self.replay = place, captured(lambda: self._step(place), state)
            except NotCapturedError as error:
                self.has_graphs = False
                log.info("this network's steps are no CUDA graphs, and take longer: %s", error)
                return False
        for there, value in zip(self.place, batch, strict=True):
            there.copy_(value)
        self.replay()
        return True
