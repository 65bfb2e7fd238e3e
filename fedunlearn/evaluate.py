"""Counting what a model gets right."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedunlearn.model import Batch, Outputs
from fedunlearn.precision import autocast


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


def count(outputs: Outputs, batch: Batch, loss: float) -> Counts:
    """Counts of one batch whose summed loss is `loss`."""
    _, class_labels, client_ids = batch
    client_correct = 0
    if outputs.client_logits is not None:
        client_correct = int((outputs.client_logits.argmax(1) == client_ids).sum())
    return Counts(len(class_labels), loss, int((outputs.class_logits.argmax(1) == class_labels).sum()), client_correct)


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
