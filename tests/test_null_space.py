import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import reference
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.unlearning import null_space
from fedunlearn.unlearning.distill import distill


def images(n=6, side=16, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(params=["batch", "group"])
def model(request):
    torch.manual_seed(0)
    model = TwoHeadResNet18(3, 4, width=8, norm=request.param)
    model(images(32, seed=1))  # running statistics that are not those of a new model
    return model


def test_by_hand_a_projector_keeps_directions_that_the_inputs_do_not_have():
    found = null_space.projectors({"layer": torch.diag(torch.tensor([6.0, 0.0, 0.0]))}, ridge=1.0)["layer"]
    assert_close(found, torch.diag(torch.tensor([0.25, 1.0, 1.0])))  # tau = 2


def test_by_hand_of_symmetric_matrices_half_is_sent():
    a = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    sent = null_space.upper({"layer": a, "one": a[:1, :1]})
    assert sent["layer"].tolist() == [1, 2, 3, 4, 5, 6]
    assert_close(null_space.symmetric(sent), {"layer": a, "one": a[:1, :1]})


def test_without_inputs_and_with_a_large_ridge_projectors_are_the_identity():
    covariances = {"none": torch.zeros(3, 3), "some": torch.diag(torch.tensor([3.0, 1.0, 2.0]))}
    found = null_space.projectors(covariances, ridge=1e6)
    assert_close(found["none"], torch.eye(3))
    assert_close(found["some"], torch.eye(3), rtol=0, atol=1e-5)


def test_projectors_equal_those_by_eigenvalues(model):
    covariances = null_space.input_covariances(model, [images()])
    found, expected = null_space.projectors(covariances, ridge=0.05), reference.projectors(covariances, ridge=0.05)
    for name, p in found.items():
        assert_close(p.double(), expected[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("side", [8, 32])
def test_covariances_equal_those_position_by_position(model, side):
    found, expected = (
        null_space.input_covariances(model, [images(2, side)]),
        reference.input_covariances(model, images(2, side)),
    )
    assert found.keys() == expected.keys() == null_space.zero_covariances(model).keys()
    for name, a in found.items():
        assert a.shape == null_space.zero_covariances(model)[name].shape
        assert_close(a.double(), expected[name], rtol=1e-4, atol=1e-5)


def test_covariances_do_not_depend_on_batches_and_the_model_is_as_before(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = null_space.input_covariances(model, [images()])
    assert model.training
    assert_close(null_space.input_covariances(model, images().split([1, 3, 2])), whole)
    assert_close(dict(model.state_dict()), before)


def test_covariances_are_fp32_where_passes_are_bf16(model):
    found, expected = (null_space.input_covariances(model, [images(64)], precision=p) for p in ("bf16", "fp32"))
    for name, a in found.items():
        assert a.dtype == torch.float32
        assert torch.linalg.eigvalsh(a).min() > -1e-6 * a.diagonal().mean() * len(a)
        assert float((a - expected[name]).norm() / expected[name].norm()) < 0.02
    p = null_space.projectors(found, ridge=0.02)
    assert all(torch.linalg.eigvalsh(value).max() < 1.001 for value in p.values())


def test_what_is_no_covariance_is_refused():
    with pytest.raises(ValueError, match=r"stem\.0 .* raise the ridge"):
        null_space.projectors({"stem.0": torch.diag(torch.tensor([3.0, 1.0, -1.0]))}, ridge=0.1)


def test_a_projected_change_changes_outputs_less(model):
    """For inputs like those of A; the change itself is hardly smaller."""
    name, layer = "stages.3.1.conv2", model.stages[3][1].conv2
    a = null_space.input_covariances(model, [images(64)])[name]
    p = null_space.projectors({name: a}, ridge=0.01)[name]
    change = torch.randn(len(layer.weight), len(a), generator=torch.Generator().manual_seed(2))
    changed = [float(((d @ a) * d).sum()) for d in (change, change @ p)]  # mean |d x|^2
    assert changed[1] < 1e-3 * changed[0]
    assert float((change @ p).norm() / change.norm()) > 0.3


def test_gradients_are_multiplied_and_those_of_further_layers_dropped(model):
    out = model(images())
    (out.class_logits.square().sum() + out.client_logits.square().sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    covariances = null_space.input_covariances(model, [images()])
    by = null_space.projectors(covariances, ridge=0.1)
    null_space.project_gradients(model, by)
    for name, p in model.named_parameters():
        layer, kind = name.rsplit(".", 1)
        if layer not in by:
            assert p.grad is None
            continue
        rows = gradients[f"{layer}.weight"].flatten(1)
        if f"{layer}.bias" in gradients:
            rows = torch.cat([rows, gradients[f"{layer}.bias"][:, None]], 1)
        size = gradients[f"{layer}.weight"][0].numel()
        wanted = (rows @ by[layer])[:, :size].reshape(p.shape) if kind == "weight" else (rows @ by[layer])[:, -1]
        assert_close(p.grad, wanted)


def test_distillation_equals_plain_steps(model):
    soft_labels = torch.rand(6, 3, generator=torch.Generator().manual_seed(3)).softmax(1)
    by = null_space.projectors(null_space.input_covariances(model, [images(seed=4)]), ridge=0.1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [[(images()[:4], soft_labels[:4]), (images()[4:], soft_labels[4:])]] * 2
    distill(model, batches, lr=0.05, momentum=0.9, precision="fp32", projectors=by)
    found = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    steps = [torch.arange(4), torch.arange(4, 6)] * 2
    reference.distill(model, images(), soft_labels, by, steps=steps, lr=0.05, momentum=0.9)
    for name, value in found.items():
        assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert not math.isclose(float(found["projection.weight"].norm()), float(start["projection.weight"].norm()))
    for name in (n for n in start if "norm" in n or "client_head" in n or "stem.1" in n):
        assert torch.equal(found[name], start[name]), name


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 9))
def test_symmetric_matrices_survive_their_triangles(seed, size):
    values = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    matrices = {"layer": values + values.T}
    triangles = null_space.upper(matrices)
    assert triangles["layer"].shape == (size * (size + 1) // 2,)
    assert torch.equal(null_space.symmetric(triangles)["layer"], matrices["layer"])


def test_layers_that_the_loss_did_not_reach_are_named(model):
    model(images()).class_logits.square().sum().backward()
    model.class_head.out.weight.grad = None
    with pytest.raises(ValueError, match=r"class_head\.out has no gradient"):
        null_space.project_gradients(model, {"class_head.out": torch.eye(17)})
