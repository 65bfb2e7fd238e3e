import pytest
import torch
from torch.nn.functional import cross_entropy

from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.unlearning.pruning import prune_clients, pruned


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoHeadResNet18(3, 5, width=8)


def test_pruned_logits_are_minus_infinity_and_all_further_ones_untouched(model):
    images = torch.randn(4, 3, 8, 8)
    before = model.eval()(images).client_logits
    prune_clients(model, [1, 4])
    after = model(images).client_logits
    assert (after[:, [1, 4]] == -torch.inf).all()
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert (after.softmax(1)[:, [1, 4]] == 0).all()


def test_no_gradient_reaches_a_pruned_row_and_it_stays_zero_in_training(model):
    prune_clients(model, [2])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        loss = cross_entropy(model(torch.randn(6, 3, 8, 8)).client_logits, torch.tensor([0, 1, 3, 4, 0, 1]))
        optimiser.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        assert (model.client_head.out.weight.grad[2] == 0).all()
        assert model.client_head.out.weight.grad[1].abs().sum() > 0
        optimiser.step()
    assert (model.client_head.out.weight[2] == 0).all()
    assert model.client_head.out.bias[2] == 0


def test_the_mark_survives_the_state_dict(model):
    prune_clients(model, [0])
    other = TwoHeadResNet18(3, 5, width=8)
    other.load_state_dict(model.state_dict())
    assert other.pruned.tolist() == [True, False, False, False, False]


def test_a_client_out_of_range_is_named(model):
    with pytest.raises(ValueError, match=r"client 5 is not in 0\.\.4"):
        prune_clients(model, [5])


def test_a_single_head_model_has_nothing_to_prune():
    model = TwoHeadResNet18(3, 0, width=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune_clients(model, [0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_state_is_pruned_into_a_new_one(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = pruned(state, [1, 4])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    prune_clients(model, [1, 4])
    assert found.keys() == state.keys()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"client 12 is not in 0\.\.4"):
        pruned(state, [12])


def test_pruning_again_adds_to_the_mark(model):
    state = dict(model.state_dict())
    both, one_by_one = pruned(state, [0, 3]), pruned(pruned(state, [3]), [0])
    assert both["pruned"].tolist() == [True, False, False, True, False]
    assert all(torch.equal(value, one_by_one[name]) for name, value in both.items())


def test_a_state_without_a_client_head_comes_back_unchanged():
    state = dict(TwoHeadResNet18(3, 0, width=8).state_dict())
    assert pruned(state, [7]).items() == state.items()
