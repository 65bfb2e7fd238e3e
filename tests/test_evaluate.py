import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedunlearn.nn.evaluate import Counts, evaluate, predict
from fedunlearn.nn.model import Outputs, TwoHeadResNet18


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


def test_one_pass_gives_every_clients_counts_and_the_features_of_membership_inference():
    torch.manual_seed(0)
    batches = [(torch.randn(7, 6), torch.randint(4, (7,)), torch.randint(2, (7,))) for _ in range(3)]
    found = predict(Fixed(), batches)
    for client, counts in found.counts().items():
        own = [tuple(part[batch[2] == client] for part in batch) for batch in batches]
        alone = evaluate(Fixed(), own)
        assert counts.loss == pytest.approx(alone.loss, rel=1e-5)
        assert (counts.examples, counts.class_correct, counts.client_correct) == (
            alone.examples,
            alone.class_correct,
            alone.client_correct,
        )
    assert sum(found.counts().values(), Counts()).examples == 21
    logits = torch.cat([batch[0] for batch in batches])
    assert torch.equal(found.features(), torch.cat([logits[:, :4].softmax(1), logits[:, 4:].softmax(1)], 1))


def test_predictions_of_a_single_head_have_the_class_probabilities_alone():
    model = TwoHeadResNet18(3, 0, width=8)
    found = predict(model, [(torch.randn(5, 3, 8, 8), torch.zeros(5, dtype=torch.long), torch.arange(5))])
    assert found.features().shape == (5, 3)
    assert [counts.client_correct for counts in found.counts().values()] == [0] * 5


def test_the_expected_accuracy_weighs_classes_by_their_counts():
    logits = torch.tensor([[9.0, 0, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0], [0, 9, 0, 0, 0, 0], [0, 0, 0, 9, 0, 0]])
    predictions = predict(Fixed(), [(logits, torch.tensor([0, 1, 1, 2]), torch.full((4,), -1))])
    # classes 0, 1 and 2 have accuracies 1, 0.5 and 0; class 3 is not among them: the mean of all, 0.5
    assert predictions.expected_accuracy(torch.tensor([1, 1, 1, 1])) == pytest.approx(0.5)
    assert predictions.expected_accuracy(torch.tensor([3, 1, 0, 0])) == pytest.approx(3.5 / 4)
    assert predictions.expected_accuracy(torch.tensor([0, 0, 2, 2])) == pytest.approx(0.25)


def test_the_expected_loss_weighs_classes_by_their_counts():
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 2, 2])
    predictions = predict(Fixed(), [(logits, labels, torch.full((5,), -1))])
    losses = torch.nn.functional.cross_entropy(logits[:, :4], labels, reduction="none")
    of_class = torch.stack([losses[:1].mean(), losses[1:3].mean(), losses[3:].mean(), losses.mean()])
    counts = torch.tensor([3, 1, 0, 2])
    assert predictions.expected_loss(counts) == pytest.approx(float((counts * of_class).sum() / 6), rel=1e-5)
