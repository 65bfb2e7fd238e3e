"""Count what a model gets right, and collect its predictions."""

from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedunlearn.nn.model import Batch, Outputs
from fedunlearn.nn.precision import at_least_fp32, autocast


@dataclass(frozen=True)
class Counts:
    """Sum loss and hits over examples; counts of batches and of clients add up.

    Attributes:
        examples: how many.
        loss: summed over them.
        class_correct: examples whose class is predicted.
        client_correct: examples whose client is predicted.

    Example:
        >>> (Counts(2, 1.0, 1) + Counts(3, 0.5, 3)).class_accuracy
        0.8
    """

    examples: int = 0
    loss: float = 0.0
    class_correct: int = 0
    client_correct: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def mean_loss(self) -> float:
        """Divide the loss by the number of examples; 0 for none."""
        return self.loss / max(self.examples, 1)

    @property
    def class_accuracy(self) -> float:
        """Give the fraction of examples whose class is predicted, 0..1; 0 for none."""
        return self.class_correct / max(self.examples, 1)

    @property
    def client_accuracy(self) -> float:
        """Give the fraction of examples whose client is predicted, 0..1; 0 for none."""
        return self.client_correct / max(self.examples, 1)


def hits(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Count the classes and the client ids of a batch that are predicted.

    Args:
        outputs: of the model on the batch.
        batch: images, class labels, client ids.

    Returns:
        Two integer scalars on the batch's device; without a client head the second is 0.
    """
    _, class_labels, client_ids = batch
    classes = (outputs.class_logits.argmax(1) == class_labels).sum()
    if outputs.client_logits is None:
        return classes, torch.zeros_like(classes)
    return classes, (outputs.client_logits.argmax(1) == client_ids).sum()


def count(outputs: Outputs, batch: Batch, loss: float) -> Counts:
    """Make the counts of one batch whose summed loss is `loss`."""
    return Counts(len(batch[0]), loss, *map(int, hits(outputs, batch)))


class Predictions(NamedTuple):
    """Collect a model's predictions on N examples and their labels, on the CPU.

    Attributes:
        class_probs: [N, K].
        client_probs: [N, C], or None without a client head.
        class_labels: int64 [N].
        client_ids: int64 [N].

    Example:
        >>> labels = torch.tensor([0, 1])
        >>> Predictions(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), None, labels, labels).total.class_accuracy
        0.5
    """

    class_probs: Tensor
    client_probs: Tensor | None
    class_labels: Tensor
    client_ids: Tensor

    def hits(self) -> Tensor:
        """Say whose class is predicted, bool [N]."""
        return self.class_probs.argmax(1) == self.class_labels

    def counts(self) -> dict[int, Counts]:
        """Count loss and hits of every client that has an example here."""
        class_hits = self.hits()
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
        """Add up the counts of all clients."""
        return sum(self.counts().values(), Counts())

    def expected_accuracy(self, class_counts: Tensor) -> float:
        """Weigh the accuracy on each class by how many examples of it another set has.

        sum_k m_k a_k / sum_k m_k, with a_k the class accuracy on the examples of class k here. On held-out examples it
        is the accuracy to expect of other held-out examples with class counts m. A client's own accuracy less this is
        its *memorisation gap*, which needs no retrained model.

        Args:
            class_counts: m, examples of each class, [K]. A class without an example here counts with the mean accuracy
                of all examples.

        Returns:
            0..1.

        Example:
            >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
            >>> Predictions(probs, None, torch.tensor([0, 1]), torch.tensor([-1, -1])).expected_accuracy(
            ...     torch.tensor([3, 1])
            ... )
            0.75
        """
        return self._expected(self.hits().double(), class_counts)

    def expected_loss(self, class_counts: Tensor) -> float:
        """Weigh the class cross-entropy on each class as `expected_accuracy` weighs the accuracy.

        Args:
            class_counts: m, examples of each class, [K].

        Returns:
            Nats an example.
        """
        return self._expected(self._losses(), class_counts)

    def _losses(self) -> Tensor:
        right = self.class_probs.gather(1, self.class_labels[:, None]).squeeze(1)
        return -right.clamp(min=torch.finfo(right.dtype).tiny).log().double()

    def _expected(self, values: Tensor, class_counts: Tensor) -> float:
        seen = torch.bincount(self.class_labels, minlength=len(class_counts))
        of_class = torch.bincount(self.class_labels, values, minlength=len(class_counts)) / seen
        return float((class_counts * of_class.nan_to_num(nan=float(values.mean()))).sum() / class_counts.sum())

    def without(self, classes: Collection[int]) -> "Predictions":
        """Give the predictions on examples that are of none of some classes."""
        if not classes:
            return self
        kept = ~torch.isin(self.class_labels, torch.tensor(sorted(classes)))
        return Predictions(*(None if value is None else value[kept] for value in self))  # type: ignore[arg-type]

    def features(self) -> Tensor:
        """Concatenate class and client probabilities, for `audit.membership_inference.logistic_mia`.

        Returns:
            [N, K + C], or [N, K] without a client head.
        """
        return self.class_probs if self.client_probs is None else torch.cat([self.class_probs, self.client_probs], 1)


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Batch], *, precision: str = "fp32") -> Predictions:
    """Collect the model's probabilities for all examples in one pass, in eval mode.

    Accuracies and membership inference share that pass.

    Args:
        model: gives `Outputs`; it stays in eval mode.
        batches: at least one, on the model's device.
        precision: of the forward passes (`nn.precision`).

    Returns:
        Predictions in the order of the examples.
    """
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
    """Count class and client hits, and sum the class cross-entropy, in eval mode.

    The test images belong to no client: give them client -1, which no model predicts.

    Args:
        model: gives `Outputs`; it stays in eval mode.
        batches: on the model's device.
        precision: of the forward passes (`nn.precision`).
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
