import pytest
import torch
from torch.testing import assert_close

import reference
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.unlearning.dampening import (
    dampen,
    dampen_and_prune,
    dampening_cost,
    largest_alpha,
    selected_fraction,
    strongest_alpha,
)
from fedunlearn.unlearning.fisher import diagonal_fisher


def case(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 5), "b": (7,)}
    theta = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    full = {n: torch.rand(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    forget = {n: 3 * torch.rand(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    return theta, full, forget


def test_value_by_hand():
    theta = {"w": torch.tensor([2.0, 2.0, 2.0, 2.0])}
    full = {"w": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    forget = {"w": torch.tensor([4.0, 2.0, 8.0, 1.0])}
    # F_f > 3 F_D for weights 0, 2 and 3; factors 2/4, 2/8 and 0
    assert_close(dampen(theta, full, forget, alpha=3, lambda_=2)["w"], torch.tensor([1.0, 2.0, 0.5, 0.0]))


@pytest.mark.parametrize(("alpha", "lambda_", "exponent"), [(1, 1, 1), (2, 0.1, 1), (0.5, 3, 2), (1.5, 0.7, 0.5)])
def test_equals_the_naive_loop(alpha, lambda_, exponent):
    settings = {"alpha": alpha, "lambda_": lambda_, "exponent": exponent}
    assert_close(dampen(*case(), **settings), reference.dampen(*case(), **settings))


def test_infinite_alpha_changes_nothing():
    theta, full, forget = case()
    full["a"][0] = 0
    assert all(
        torch.equal(value, theta[name])
        for name, value in dampen(theta, full, forget, alpha=torch.inf, lambda_=1).items()
    )


def test_no_weight_grows():
    theta, full, forget = case()
    after = dampen(theta, full, forget, alpha=0.1, lambda_=1e6)
    assert_close(after, theta)


def test_weights_that_matter_to_no_example_stay():
    zero = {"w": torch.zeros(3)}
    theta = {"w": torch.ones(3)}
    assert_close(dampen(theta, zero, zero, alpha=1, lambda_=0), theta)


def test_arguments_are_unchanged():
    theta, full, forget = case()
    dampen(theta, full, forget, alpha=1, lambda_=0.1)
    assert_close((theta, full, forget), case())


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("which", [1, 2])
def test_impossible_fishers_are_refused(bad, which):
    arguments = case()
    arguments[which]["b"][3] = bad
    with pytest.raises(ValueError, match="negative, NaN or infinite"):
        dampen(*arguments, alpha=1, lambda_=1)


def test_other_names_and_shapes_are_refused():
    theta, full, forget = case()
    with pytest.raises(ValueError, match="other names"):
        dampen(theta, full, {"a": forget["a"]}, alpha=1, lambda_=1)
    with pytest.raises(ValueError, match=r"\[5, 4\], the parameter \[4, 5\]"):
        dampen(theta, full | {"a": full["a"].T}, forget, alpha=1, lambda_=1)


@pytest.mark.parametrize(("examples", "forget"), [(1617, 158), (50000, 5000), (3001, 312)])
def test_what_the_forget_clients_alone_reach_is_not_selected_at_the_largest_alpha(examples, forget):
    """F_D is F_f n_f / N there, as single precision has it after the sum that a client sends."""
    fisher = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    full = {"w": (fisher * forget) / examples}
    assert selected_fraction(full, {"w": fisher}, alpha=examples / forget) > 0
    assert selected_fraction(full, {"w": fisher}, alpha=largest_alpha(examples, forget)) == 0


def test_no_ratio_exceeds_the_largest_alpha():
    g = torch.Generator().manual_seed(0)
    retain, forget = torch.rand(1000, generator=g), torch.rand(1000, generator=g)
    retain[:10] = 0  # weights that matter to the forget set alone
    full = {"w": (90 * retain + 10 * forget) / 100}
    limit = largest_alpha(100, 10)
    assert limit == pytest.approx(10, rel=1e-4)
    assert selected_fraction(full, {"w": forget}, alpha=limit * 1.001) == 0
    assert selected_fraction(full, {"w": forget}, alpha=limit * 0.999) == 0.01


def test_selected_fraction():
    full, forget = {"w": torch.ones(4)}, {"w": torch.tensor([0.5, 1.5, 2.5, 3.5])}
    assert selected_fraction(full, forget, alpha=2) == 0.5


def test_by_hand_alpha_is_as_small_as_the_budget_allows():
    theta = {"w": torch.tensor([2.0, 2.0, 2.0])}
    full, forget = {"w": torch.ones(3)}, {"w": torch.tensor([4.0, 3.0, 2.0])}
    costs = [0.5 * (2 * 3 / 4) ** 2, 0.5 * (2 * 2 / 3) ** 2, 0.5 * (2 * 1 / 2) ** 2]  # of factors 1/4, 1/3, 1/2
    found = [strongest_alpha(theta, full, forget, budget=sum(costs[:n]) + 0.01) for n in range(4)]
    assert found == pytest.approx([4, 3, 2, 1], rel=1e-4)
    dampened = dampen(theta, full, forget, alpha=found[2], lambda_=1)
    assert dampening_cost(theta, dampened, full) == pytest.approx(costs[0] + costs[1])


@pytest.mark.parametrize("lambda_", [1.0, 0.3])
@pytest.mark.parametrize("budget", [0.001, 0.03, 0.3, 1.0])
def test_the_strongest_alpha_is_the_one_that_bisection_finds(budget, lambda_):
    low, high = lambda_, 1e9

    def cost(alpha):
        return dampening_cost(case()[0], dampen(*case(), alpha=alpha, lambda_=lambda_), case()[1])

    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cost(middle) > budget else (low, middle)
    found = strongest_alpha(*case(), budget=budget, lambda_=lambda_)
    assert cost(found) <= budget
    assert found == pytest.approx(high, rel=1e-4)


def test_without_a_budget_nothing_is_dampened_and_with_any_alpha_is_lambda():
    theta, full, forget = case()
    alpha = strongest_alpha(theta, full, forget, budget=0)
    assert_close(dampen(theta, full, forget, alpha=alpha, lambda_=1), theta, rtol=0, atol=0)
    assert strongest_alpha(theta, full, forget, budget=1e9, lambda_=0.5) == 0.5


def test_weights_that_matter_to_nobody_cost_nothing_and_set_no_alpha():
    zero, theta = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    assert strongest_alpha(theta, zero, zero, budget=0) == 1


def test_a_step_dampens_every_parameter_and_prunes():
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    few = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = TwoHeadResNet18(3, 4, width=8)
    labels = torch.arange(24)
    full = diagonal_fisher(model, [(images, labels % 3, labels % 4)])
    forget = diagonal_fisher(model, [(few, labels[:6] % 3, labels[:6] * 0)])
    expected = dampen({n: p.detach().clone() for n, p in model.named_parameters()}, full, forget, alpha=1, lambda_=0.5)
    dampen_and_prune(model, full, forget, [0], alpha=1, lambda_=0.5)
    for row in ("client_head.out.weight", "client_head.out.bias"):
        expected[row][0] = 0
    assert_close({n: p.detach() for n, p in model.named_parameters()}, expected)
    assert model.pruned.tolist() == [True, False, False, False]
