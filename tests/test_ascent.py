import pytest
import torch
from torch.testing import assert_close

import reference
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.unlearning.ascent import ascend


def batches(count=3):
    draws = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 3, 8, 8, generator=draws), torch.randint(3, (6,), generator=draws), torch.zeros(6).long())
        for _ in range(count)
    ]


def two_models():
    torch.manual_seed(0)
    model, twin = (TwoHeadResNet18(3, 2, width=8) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    return model, twin


def climb(model, epochs, *, radius=torch.inf, finished=lambda: False):
    settings = {"lr": 0.05, "clip": 1.0, "radius": radius, "precision": "fp32"}
    return ascend(model, epochs, examples=sum(len(x) for x, _, _ in epochs[0]), finished=finished, **settings)


def distance(model, twin):
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return float(torch.cat([(p - q).detach().flatten() for p, q in pairs]).norm())


@pytest.mark.parametrize("radius", [torch.inf, 0.02])
def test_equals_clipped_and_projected_steps_written_out(radius):
    model, twin = two_models()
    climb(model, [batches(), batches()], radius=radius)
    reference.ascend(twin, [*batches(), *batches()], lr=0.05, clip=1.0, radius=radius)
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=1e-4, atol=1e-5)


def test_the_loss_grows():
    model, _ = two_models()
    losses = [climb(model, [batches()]).mean_loss for _ in range(3)]
    assert losses[0] < losses[1] < losses[2]


def test_the_model_stays_in_its_ball_and_no_step_is_longer_than_the_clip():
    model, twin = two_models()
    climb(model, [batches()] * 4, radius=0.03)
    assert distance(model, twin) == pytest.approx(0.03, rel=1e-3)
    model, twin = two_models()
    climb(model, [batches(1)])
    assert distance(model, twin) == pytest.approx(0.05, rel=1e-3)


def test_it_ends_at_the_first_fourth_of_an_epoch_that_is_finished():
    model, _ = two_models()
    checks = []

    def finished():
        checks.append(len(checks))
        return len(checks) == 6

    counts = climb(model, [batches(8)] * 5, finished=finished)
    assert counts.examples == 6 * (8 + 4)
    assert len(checks) == 6
