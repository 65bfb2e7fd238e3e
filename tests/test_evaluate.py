import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedunlearn.evaluate import Counts, evaluate
from fedunlearn.model import Outputs, TwoHeadResNet18


class Fixed(nn.Module):
    """Its 'images' are the logits of four classes and of two clients."""

    def forward(self, images):
        return Outputs(images[:, :4], images[:, 4:], images)


def test_counts_by_hand():
    logits = torch.tensor([[9.0, 0, 0, 0, 9, 0], [0, 9, 0, 0, 0, 9], [0, 9, 0, 0, 9, 0]])
    batch = (logits, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]))
    counts = evaluate(Fixed(), [batch, batch])
    assert (counts.examples, counts.class_correct, counts.client_correct) == (6, 4, 4)
    assert counts.class_accuracy == pytest.approx(2 / 3)
    assert counts.loss == pytest.approx(2 * cross_entropy(logits[:, :4], batch[1], reduction="sum").item())


def test_counts_add_up_and_nothing_has_accuracy_zero():
    assert Counts(2, 1.0, 1, 0) + Counts(3, 0.5, 2, 1) == Counts(5, 1.5, 3, 1)
    assert Counts().class_accuracy == Counts().client_accuracy == Counts().mean_loss == 0


def test_uses_running_statistics_and_a_single_head_has_no_client_hits():
    model = TwoHeadResNet18(3, 0, width=8)
    images, labels = torch.randn(5, 3, 8, 8), torch.zeros(5, dtype=torch.long)
    together = evaluate(model, [(images, labels, labels)])
    apart = evaluate(model, [(images[i : i + 1], labels[:1], labels[:1]) for i in range(5)])
    assert together.loss == pytest.approx(apart.loss, rel=1e-5)
    assert together.client_correct == 0
