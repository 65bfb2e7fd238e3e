import pytest
import torch
from torch import nn
from torch.testing import assert_close

import reference
from fedunlearn.nn.model import Outputs, TwoHeadResNet18
from fedunlearn.unlearning.fisher import diagonal_fisher, with_drawn_labels


def two_head(norm="batch", clients=4):
    torch.manual_seed(0)
    model = TwoHeadResNet18(3, clients, width=8, norm=norm)
    for _ in range(3):
        model(torch.randn(16, 3, 8, 8))  # running statistics other than 0 and 1
    return model.double()


def examples(n=11):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 3, 8, 8, generator=g, dtype=torch.float64),
        torch.randint(3, (n,), generator=g),
        torch.randint(4, (n,), generator=g),
    )


def batches(size, n=11):
    return list(zip(*(part.split(size) for part in examples(n)), strict=True))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("loss_head", ["class", "client"])
@pytest.mark.parametrize("estimator", ["per_example", "batch"])
def test_equals_one_backward_pass_an_example(norm, loss_head, estimator):
    model = two_head(norm)
    fast = diagonal_fisher(model, batches(4), loss_head=loss_head, estimator=estimator)
    assert_close(fast, reference.fisher(model, batches(4), loss_head=loss_head, estimator=estimator))


def test_does_not_depend_on_the_batch_size():
    model = two_head()
    assert_close(diagonal_fisher(model, batches(1)), diagonal_fisher(model, batches(11)))


def test_tiles_of_a_layer_change_nothing(monkeypatch):
    model = two_head()
    whole = diagonal_fisher(model, batches(11))
    monkeypatch.setattr("fedunlearn.unlearning.fisher_rules.TILE_ELEMENTS", 100)
    assert_close(diagonal_fisher(model, batches(11)), whole)


def test_value_by_hand():
    # logistic regression at zero weights: p = 1/2, gradient of example x with label 0 is (-x/2, x/2)
    class Logistic(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 2, bias=False)
            nn.init.zeros_(self.linear.weight)

        def forward(self, x):
            return Outputs(self.linear(x), None, x)

    batch = (torch.tensor([[2.0], [4.0]]), torch.tensor([0, 1]), torch.tensor([0, 0]))
    fisher = diagonal_fisher(Logistic(), [batch])
    assert_close(fisher["linear.weight"], torch.full((2, 1), (1.0 + 4.0) / 2))


def test_batch_estimator_shrinks_as_batches_grow():
    model = two_head()
    small, large = (
        sum(f.sum() for f in diagonal_fisher(model, batches(s, 64), estimator="batch").values()) for s in (1, 64)
    )
    assert large < small / 2


def test_the_other_head_has_none_and_the_model_is_as_before():
    model = two_head()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fisher = diagonal_fisher(model, batches(4))
    assert fisher.keys() == dict(model.named_parameters()).keys()
    assert all((f == 0).all() for name, f in fisher.items() if name.startswith("client_head"))
    assert all(f.sum() > 0 for name, f in fisher.items() if not name.startswith("client_head"))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_examples_no_client_head_and_unknown_words_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        diagonal_fisher(two_head(), [])
    with pytest.raises(ValueError, match="needs a model with a client head"):
        diagonal_fisher(two_head(clients=0), batches(4), loss_head="client")
    with pytest.raises(ValueError, match="estimator='exact'"):
        diagonal_fisher(two_head(), batches(4), estimator="exact")


def test_strides_dilation_and_biases_of_convolutions():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
            self.second = nn.Conv2d(4, 5, 1, stride=2)

        def forward(self, x):
            return Outputs(self.second(self.first(x)).mean((2, 3)), None, x)

    torch.manual_seed(0)
    model = Convolutions().double()
    assert_close(diagonal_fisher(model, batches(4)), reference.fisher(model, batches(4)))


def test_bf16_is_close():
    model = two_head().float()
    batch = [tuple(part.float() if part.is_floating_point() else part for part in b) for b in batches(11)]
    exact, rounded = (diagonal_fisher(model, batch, precision=p) for p in ("fp32", "bf16"))
    flat_exact, flat_rounded = (torch.cat([value.flatten() for value in f.values()]) for f in (exact, rounded))
    error = float((flat_rounded - flat_exact).norm() / flat_exact.norm())
    assert 0 < error < 0.05


def test_labels_are_drawn_as_often_as_the_model_predicts_them():
    model, many = two_head(), 20_000
    images, _, clients = examples(1)
    with torch.no_grad():
        probs = model.eval()(images).class_logits.softmax(1)[0]
    batch = images.expand(many, -1, -1, -1), torch.full((many,), 2), clients.expand(many)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ((_, labels, _),) = with_drawn_labels(model, [batch], torch.Generator().manual_seed(0))
    found = torch.bincount(labels, minlength=3) / many
    assert_close(found.double(), probs, rtol=0, atol=4 * 0.5 / many**0.5)  # four standard errors
    assert probs.min() > 0.05
    assert model.training
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_with_the_same_draws_the_same_labels_come_whatever_the_labels_were():
    model = two_head()
    drawn = [with_drawn_labels(model, batches(4), torch.Generator().manual_seed(3)) for _ in range(2)]
    other = [(images, (labels + 1) % 3, clients) for images, labels, clients in batches(4)]
    drawn.append(with_drawn_labels(model, other, torch.Generator().manual_seed(3)))
    first, *rest = (torch.cat([labels for _, labels, _ in found]) for found in drawn)
    assert all(torch.equal(first, again) for again in rest)
    assert not torch.equal(first, examples()[1])
