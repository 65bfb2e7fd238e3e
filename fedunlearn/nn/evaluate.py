"""Counting what a model gets right."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedunlearn.nn.model import Batch, Outputs
from fedunlearn.nn.precision import at_least_fp32, autocast


@dataclass(frozen=True)
class Counts:
    """Sums over examples; they add up over batches and clients."""

    examples: int = 0
    loss: float = 0.0
    class_correct: int = 0
    client_correct: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def mean_loss(self) -> float:
        """Loss an example."""
        return self.loss / max(self.examples, 1)

    @property
    def class_accuracy(self) -> float:
        """Share of right classes, 0..1."""
        return self.class_correct / max(self.examples, 1)

    @property
    def client_accuracy(self) -> float:
        """Share of right client IDs, 0..1."""
        return self.client_correct / max(self.examples, 1)


def hits(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """How many classes and client IDs of a batch are right; on its device."""
    _, class_labels, client_ids = batch
    classes = (outputs.class_logits.argmax(1) == class_labels).sum()
    if outputs.client_logits is None:
        return classes, torch.zeros_like(classes)
    return classes, (outputs.client_logits.argmax(1) == client_ids).sum()


def count(outputs: Outputs, batch: Batch, loss: float) -> Counts:
    """Counts of one batch whose summed loss is `loss`."""
    return Counts(len(batch[0]), loss, *map(int, hits(outputs, batch)))


class Predictions(NamedTuple):
    """What a model says of N examples, and what is right; on the CPU."""

    class_probs: Tensor
    client_probs: Tensor | None
    class_labels: Tensor
    client_ids: Tensor

    def counts(self) -> dict[int, Counts]:
        """Of every client in it."""
        class_hits = self.class_probs.argmax(1) == self.class_labels
        client_hits = torch.zeros_like(class_hits)
        if self.client_probs is not None:
            client_hits = self.client_probs.argmax(1) == self.client_ids
        clients, place = self.client_ids.unique(return_inverse=True)

        def totals(values: Tensor) -> list[float]:
            return torch.zeros(len(clients), dtype=torch.float64).index_add_(0, place, values.double()).tolist()

        losses = totals(self._losses())
        hits = [map(int, totals(values)) for values in (torch.ones_like(class_hits), class_hits, client_hits)]
        rows = zip(clients.tolist(), losses, *hits, strict=True)
        return {client: Counts(examples, loss, *correct) for client, loss, examples, *correct in rows}

    @property
    def total(self) -> Counts:
        """Over all clients."""
        return sum(self.counts().values(), Counts())

    def expected_accuracy(self, class_mix: Tensor) -> float:
        """Sum of m_k a_k / sum of m_k, a_k the class accuracy on class k: what unseen data of mix m gets, where these
        examples are unseen ones. A client's own accuracy less this is its *memory gap*, which needs no gold model.

        Args:
            class_mix: m, examples a class, [K]. A class without an example here has the mean accuracy of all.
        """
        return self._expected((self.class_probs.argmax(1) == self.class_labels).double(), class_mix)

    def expected_loss(self, class_mix: Tensor) -> float:
        """As `expected_accuracy`, of the class cross-entropy."""
        return self._expected(self._losses(), class_mix)

    def _losses(self) -> Tensor:
        right = self.class_probs.gather(1, self.class_labels[:, None]).squeeze(1)
        return -right.clamp(min=torch.finfo(right.dtype).tiny).log().double()

    def _expected(self, values: Tensor, class_mix: Tensor) -> float:
        seen = torch.bincount(self.class_labels, minlength=len(class_mix))
        of_class = torch.bincount(self.class_labels, values, minlength=len(class_mix)) / seen
        return float((class_mix * of_class.nan_to_num(nan=float(values.mean()))).sum() / class_mix.sum())

    def features(self) -> Tensor:
        """What `attack.logistic_mia` looks at, [N, K + C]: class probabilities, then client probabilities if any."""
        return self.class_probs if self.client_probs is None else torch.cat([self.class_probs, self.client_probs], 1)


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Batch], *, precision: str = "fp32") -> Predictions:
    """The model's probabilities for all examples, in eval mode and one pass: accuracies and attacks share it."""
    model.eval()
    found = []
    for images, class_labels, client_ids in batches:
        with autocast(images.device, precision):
            class_logits, client_logits, _ = model(images)
        logits = [class_logits] if client_logits is None else [class_logits, client_logits]
        probs = [at_least_fp32(values).softmax(1).cpu() for values in logits]
        found.append((*probs, class_labels.cpu(), client_ids.cpu()))
    *probs, class_labels, client_ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Predictions(probs[0], probs[1] if len(probs) > 1 else None, class_labels, client_ids)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], *, precision: str = "fp32") -> Counts:
    """Class and client-ID hits, and the summed class cross-entropy, in eval mode.

    The client of test images is nobody's: give them client -1, which is never right.
    """
    model.eval()
    total = Counts()
    for batch in batches:
        images, class_labels, _ = batch
        with autocast(images.device, precision):
            outputs = model(images)
        total += count(
            outputs, batch, float(cross_entropy(outputs.class_logits.float(), class_labels, reduction="sum"))
        )
    return total
