"""Local training of one client, as a function of its arguments alone."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedunlearn.cuda_graph import captured
from fedunlearn.evaluate import Counts, count, hits
from fedunlearn.losses import multi_task_loss
from fedunlearn.model import Batch, TwoHeadResNet18
from fedunlearn.null_space import project_gradients
from fedunlearn.precision import at_least_fp32, autocast

SCHEDULES = ("steps", "cosine", "constant")


def generator_of(seed: int, *place: int) -> torch.Generator:
    """Random draws that depend on the seed and on where they are used (round, client, ...) alone.

    Zeros at the end of a place do not count: a client's draws of a round are those of its epoch 0.
    """
    state = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def learning_rate(progress: float, *, lr: float, schedule: str, end: float = 0.0) -> float:
    """The rate after the share `progress` (0..1) of all rounds.

    `steps` divides by 10 at 0.5 and again at 0.75 (the paper: epochs 100 and 150 of 200), `cosine` anneals to the share
    `end` of `lr`.
    """
    if schedule == "steps":
        return lr * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if schedule == "cosine":
        return lr * (end + (1 - end) * (1 + math.cos(math.pi * min(progress, 1))) / 2)
    return lr


def loss_weights(progress: float, weights: dict[str, float], *, warmup: float) -> dict[str, float]:
    """The class loss alone for the share `warmup` of training, then all of Eq. 4 (the paper: 20 of 200 epochs)."""
    if progress < warmup:
        return weights | {"client_weight": 0.0, "disentangle_weight": 0.0}
    return weights


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


def teach(
    model: TwoHeadResNet18,
    epochs: Iterable[Iterable[tuple[Tensor, Tensor]]],
    *,
    lr: float,
    momentum: float,
    precision: str,
    projectors: dict[str, Tensor],
) -> None:
    """SGD on -sum_k t_k log p_k over batches of images [N, ...] and wanted class probabilities t [N, K], in place.

    Layers move along `projectors` alone (`null_space.project_gradients`), all others not at all; BatchNorm normalises
    with its running statistics, as when the model answers, and these do not move.
    """
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    model.eval()
    for images, wanted in (batch for epoch in epochs for batch in epoch):
        with autocast(images.device, precision):
            outputs = model(images)
        model.zero_grad()
        cross_entropy(at_least_fp32(outputs.class_logits), wanted).backward()
        project_gradients(model, projectors)
        optimiser.step()


def ascend(
    model: nn.Module,
    epochs: Iterable[Iterable[Batch]],
    *,
    lr: float,
    clip: float,
    radius: float,
    precision: str,
    finished: Callable[[], bool],
) -> Counts:
    """theta <- P(theta + lr g), g the gradient of the class loss clipped to norm `clip`, P the projection onto
    |theta - theta_0| <= radius, in place; until `finished()`, which is asked after every fourth of an epoch.

    Returns:
        Loss and hits of every example at the moment before its step, summed over all steps.
    """
    start = [p.detach().clone() for p in model.parameters()]
    total = Counts()
    for epoch in epochs:
        steps = list(epoch)
        asks = {round(len(steps) * quarter / 4) for quarter in (1, 2, 3, 4)}
        for number, batch in enumerate(steps, 1):
            model.train()
            with autocast(batch[0].device, precision):
                outputs = model(batch[0])
            loss = cross_entropy(at_least_fp32(outputs.class_logits), batch[1])
            _climb(list(model.parameters()), loss, lr=lr, clip=clip)
            _project(list(model.parameters()), start, radius)
            total += count(outputs, batch, float(loss.detach()) * len(batch[0]))
            if number in asks and finished():
                return total
    return total


def _climb(params: list[Tensor], loss: Tensor, *, lr: float, clip: float) -> None:
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    reached = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
    norm = float(torch.stack([g.square().sum() for _, g in reached]).sum().sqrt())
    with torch.no_grad():
        for p, g in reached:
            p.add_(g, alpha=lr * min(1.0, clip / max(norm, 1e-12)))


@torch.no_grad()
def _project(params: list[Tensor], centre: list[Tensor], radius: float) -> None:
    """Move the parameters to the nearest place within `radius` of `centre`."""
    away = torch.stack([(p - c).square().sum() for p, c in zip(params, centre, strict=True)]).sum().sqrt()
    if away > radius:
        for p, c in zip(params, centre, strict=True):
            p.copy_(c + (p - c) * (radius / away))
