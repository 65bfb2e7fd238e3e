"""Training on pooled data as in the paper, an epoch at a time (Section 5, implementation details)."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedunlearn.data.batches import augmented, cuts, draws, scale
from fedunlearn.nn.cuda_graph import captured
from fedunlearn.nn.descent import SGD
from fedunlearn.nn.evaluate import hits
from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import Batch
from fedunlearn.nn.precision import autocast
from fedunlearn.nn.rng import drawing_from, generator_of
from fedunlearn.nn.schedule import learning_rate, loss_weights
from fedunlearn.study.pooled.pool import Examples


class Epochs:
    """Makes passes over some examples, shuffled and augmented, and calls `step(batch)` for each batch.

    All draws are made on the CPU before an epoch begins, and depend on its generator alone. On a GPU everything that a
    step does is captured as one CUDA graph for each size of batch and replayed, the making of the batch included.

    Args:
        step: what to do with a batch `(images, class_labels, client_ids)`; without synchronisation.
        state: tensors that `step` changes in place; capturing leaves them as they were.
    """

    def __init__(
        self,
        examples: Examples,
        indices: Tensor,
        step: Callable[[Batch], None],
        state: Iterable[Tensor],
        *,
        batch_size: int,
        crop_padding: int,
        flip: bool,
    ) -> None:
        self.examples, self.indices, self.step, self.state = examples, indices, step, list(state)
        self.batch_size, self.padding, self.flip = batch_size, crop_padding, flip
        device = indices.device
        self.order = torch.empty_like(indices)
        self.drawn = torch.empty(3, len(indices), dtype=torch.int64, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.offsets = torch.arange(batch_size + 1, device=device)
        self.replays: dict[int, Callable[[], None]] = {}

    def run(self, generator: torch.Generator) -> None:
        """Make one pass over the examples."""
        count = len(self.indices)
        self.order.copy_(self.indices[torch.randperm(count, generator=generator).to(self.indices.device)])
        self.drawn.copy_(draws(count, generator, self.padding, self.flip))
        self.position.zero_()
        edges = [0, *cuts(count, self.batch_size), count]
        for start, stop in pairwise(edges):
            self._next(stop - start)()

    def _next(self, size: int) -> Callable[[], None]:
        work = partial(self._work, size)
        if self.indices.device.type != "cuda":
            return work
        if size not in self.replays:
            self.replays[size] = captured(work, [*self.state, self.position])
        return self.replays[size]

    def _work(self, size: int) -> None:
        places = self.position + self.offsets[:size]
        chosen = self.order[places]
        images = augmented(self.examples.images[chosen], self.drawn[:, places], self.padding)
        self.step((scale(images), self.examples.labels[chosen], self.examples.clients[chosen]))
        self.position += size


@dataclass(frozen=True)
class Recipe:
    """Says how a model is trained; the paper's values are the defaults of `settings.Learning`."""

    epochs: int
    batch_size: int
    lr: float
    schedule: str
    momentum: float
    weight_decay: float
    crop_padding: int
    flip: bool
    precision: str
    warmup: float
    loss: dict[str, float]


class Training:
    """Trains a model by SGD on Eq. 4 over pooled clients.

    It can be saved after any epoch and taken up again, on a CPU to the same bits.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        indices: Tensor,
        recipe: Recipe,
        seed: int,
        *,
        compiled: bool = False,
    ) -> None:
        self.model, self.examples, self.indices, self.recipe, self.seed = model, examples, indices, recipe, seed
        self.forward = torch.compile(model) if compiled else model
        self.history: list[list[float]] = []
        self.lr = torch.tensor(recipe.lr, device=indices.device)
        self.optimiser = SGD(
            model.parameters(),
            lr=self.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        # the client head has no gradient at first: its momentum is zero until then, and its weights do not decay
        names = [name for name, _ in model.named_parameters()]
        self.momenta = dict(zip(names, self.optimiser.momenta, strict=True))
        self.totals = torch.zeros(3, dtype=torch.float64, device=indices.device)
        self.epochs_of: dict[tuple, Epochs] = {}

    @property
    def epoch(self) -> int:
        """Count the epochs that are done."""
        return len(self.history)

    def run_epoch(self) -> None:
        """Train one more epoch, and add a row to the history: loss, class and client-ID accuracy, seconds.

        The first three are means over the epoch's examples as they were trained on.
        """
        started, recipe = time.perf_counter(), self.recipe
        progress = self.epoch / recipe.epochs
        self.lr.fill_(learning_rate(progress, lr=recipe.lr, schedule=recipe.schedule))
        weights = loss_weights(progress, recipe.loss, warmup=recipe.warmup)
        self.totals.zero_()
        self.model.train()
        with drawing_from(generator := generator_of(self.seed, self.epoch)):
            self._epochs(weights).run(generator)
        means = (self.totals / len(self.indices)).tolist()
        self.history.append([*means, time.perf_counter() - started])

    def state(self) -> dict[str, Tensor]:
        """Give everything that the next epochs depend on, beside the history."""
        model = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        momenta = {f"momentum.{name}": value for name, value in self.momenta.items()}
        return model | momenta

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], history: list[list[float]]) -> None:
        """Go on from where `state` and `history` were taken."""
        self.model.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
        for name, momentum in self.momenta.items():
            momentum.copy_(state[f"momentum.{name}"])
        self.history = history

    def _epochs(self, weights: dict[str, float]) -> Epochs:
        key = tuple(sorted(weights.items()))
        if key not in self.epochs_of:
            self.epochs_of = {}  # the graphs of another loss, and their memory
            recipe, step = self.recipe, partial(self._step, weights)
            state = [*self.model.state_dict().values(), *self.momenta.values(), self.totals]
            self.epochs_of[key] = Epochs(
                self.examples,
                self.indices,
                step,
                state,
                batch_size=recipe.batch_size,
                crop_padding=recipe.crop_padding,
                flip=recipe.flip,
            )
        return self.epochs_of[key]

    def _step(self, weights: Mapping[str, Any], batch: Batch) -> None:
        images, class_labels, client_ids = batch
        with autocast(images.device, self.recipe.precision):
            # the last batch is smaller: to compile that one too would take longer than it saves
            outputs = (self.forward if len(images) == self.recipe.batch_size else self.model)(images)
        class_logits, client_logits, embedding = outputs
        loss = multi_task_loss(class_logits, client_logits, embedding, class_labels, client_ids, **weights)
        self.model.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.totals += torch.stack([loss.detach() * len(images), *hits(outputs, batch)])
