import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import factories
import reference
from fedunlearn.nn.model import TwoHeadModel, TwoHeadResNet18
from fedunlearn.unlearning import kronecker
from fedunlearn.unlearning.distill import distill
from fedunlearn.unlearning.fisher import diagonal_fisher


def images(n=6, side=16, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def labelled(n, side=16):
    """A batch with classes and clients."""
    return images(n, side), torch.arange(n) % 3, torch.arange(n) % 4


@pytest.fixture(params=["batch", "group"])
def model(request):
    torch.manual_seed(0)
    model = TwoHeadResNet18(3, 4, width=8, norm=request.param)
    model(images(32, seed=1))  # running statistics that are not those of a new model
    return model


def test_by_hand_a_projector_keeps_directions_that_the_inputs_do_not_have():
    found = kronecker.projectors({"layer.inputs": torch.diag(torch.tensor([6.0, 0.0, 0.0]))}, ridge=1.0)["layer.inputs"]
    assert_close(found, torch.diag(torch.tensor([0.25, 1.0, 1.0])))  # tau = 2


def test_by_hand_of_symmetric_matrices_half_is_sent():
    a = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    sent = kronecker.upper({"layer.inputs": a, "one.outputs": a[:1, :1], "all.diagonal": a})
    assert sent["layer.inputs"].tolist() == [1, 2, 3, 4, 5, 6]
    assert_close(kronecker.symmetric(sent), {"layer.inputs": a, "one.outputs": a[:1, :1], "all.diagonal": a})


def test_without_inputs_and_with_a_large_ridge_projectors_are_the_identity():
    covariances = {"none.inputs": torch.zeros(3, 3), "some.outputs": torch.diag(torch.tensor([3.0, 1.0, 2.0]))}
    found = kronecker.projectors(covariances, ridge=1e6)
    assert_close(found["none.inputs"], torch.eye(3))
    assert_close(found["some.outputs"], torch.eye(3), rtol=0, atol=1e-5)


def test_projectors_equal_those_by_eigenvalues(model):
    covariances = kronecker.input_covariances(model, [images()])
    found, expected = kronecker.projectors(covariances, ridge=0.05), reference.projectors(covariances, ridge=0.05)
    for name, p in found.items():
        assert_close(p.double(), expected[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("side", [8, 32])
def test_covariances_equal_those_position_by_position(model, side):
    found, expected = (
        kronecker.input_covariances(model, [images(2, side)]),
        reference.input_covariances(model, images(2, side)),
    )
    assert found.keys() == expected.keys() == kronecker.zero_input_covariances(model).keys()
    for name, a in found.items():
        assert a.shape == kronecker.zero_input_covariances(model)[name].shape
        assert_close(a.double(), expected[name], rtol=1e-4, atol=1e-5)


def test_covariances_do_not_depend_on_batches_and_the_model_is_as_before(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = kronecker.input_covariances(model, [images()])
    assert model.training
    assert_close(kronecker.input_covariances(model, images().split([1, 3, 2])), whole)
    assert_close(dict(model.state_dict()), before)


def test_covariances_are_fp32_where_passes_are_bf16(model):
    found, expected = (kronecker.input_covariances(model, [images(64)], precision=p) for p in ("bf16", "fp32"))
    for name, a in found.items():
        assert a.dtype == torch.float32
        assert torch.linalg.eigvalsh(a).min() > -1e-6 * a.diagonal().mean() * len(a)
        assert float((a - expected[name]).norm() / expected[name].norm()) < 0.02
    p = kronecker.projectors(found, ridge=0.02)
    assert all(torch.linalg.eigvalsh(value).max() < 1.001 for value in p.values())


def test_what_is_no_covariance_is_refused():
    with pytest.raises(ValueError, match=r"stem\.0\.inputs .* raise the ridge"):
        kronecker.projectors({"stem.0.inputs": torch.diag(torch.tensor([3.0, 1.0, -1.0]))}, ridge=0.1)


def test_a_projected_change_changes_outputs_less(model):
    """For inputs like those of A; the change itself is hardly smaller."""
    name, layer = "stages.3.1.conv2", model.stages[3][1].conv2
    a = kronecker.input_covariances(model, [images(64)])[f"{name}.inputs"]
    p = kronecker.projectors({f"{name}.inputs": a}, ridge=0.01)[f"{name}.inputs"]
    change = torch.randn(len(layer.weight), len(a), generator=torch.Generator().manual_seed(2))
    changed = [float(((d @ a) * d).sum()) for d in (change, change @ p)]  # mean |d x|^2
    assert changed[1] < 1e-3 * changed[0]
    assert float((change @ p).norm() / change.norm()) > 0.3


def reached(model):
    """The gradients of every weight after a backward pass through both heads."""
    out = model(images())
    (out.class_logits.square().sum() + out.client_logits.square().sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def rows_of(gradients, layer):
    """A layer's gradients as a matrix, with the bias as its last column."""
    rows = gradients[f"{layer}.weight"].flatten(1)
    return torch.cat([rows, gradients[f"{layer}.bias"][:, None]], 1) if f"{layer}.bias" in gradients else rows


GUIDES = {
    "inputs": (lambda model: factors_of(model, (".inputs",)), lambda by, n, d: d @ by[f"{n}.inputs"]),
    "kronecker": (
        lambda model: factors_of(model, (".inputs", ".outputs")),
        lambda by, n, d: by[f"{n}.outputs"] @ d @ by[f"{n}.inputs"],
    ),
    "diagonal": (
        lambda model: kronecker.diagonal_guide(model, diagonal_fisher(model, [labelled(6)]), ridge=0.1),
        lambda by, n, d: by[f"{n}.diagonal"] * d,
    ),
}


def factors_of(model, kinds):
    """Projectors of those factors alone."""
    factors = kronecker.kronecker_factors(model, [labelled(6)])
    return kronecker.projectors({n: a for n, a in factors.items() if n.endswith(kinds)}, ridge=0.1)


@pytest.mark.parametrize("guide", GUIDES)
def test_gradients_are_multiplied_and_those_of_further_layers_dropped(model, guide):
    make, expected = GUIDES[guide]
    by = make(model)
    gradients = reached(model)
    guided = {name.rsplit(".", 1)[0] for name in by}
    assert "class_head.out" in guided
    assert "client_head.out" not in guided
    kronecker.guide_gradients(model, by)
    for name, p in model.named_parameters():
        layer = name.rsplit(".", 1)[0]
        if layer not in guided:
            assert p.grad is None
            continue
        size = gradients[f"{layer}.weight"][0].numel()
        rows = expected(by, layer, rows_of(gradients, layer))
        assert_close(p.grad, rows[:, :size].reshape(p.shape) if name.endswith("weight") else rows[:, -1])


def test_a_step_with_both_projectors_is_one_of_natural_gradient_with_factored_damping(model):
    """By the definition: the inverse of (G + tau_G) (x) (A + tau_A), as a matrix, times the gradient as a vector."""
    factors = {n: a.double() for n, a in kronecker.kronecker_factors(model, [labelled(6)]).items()}
    by = kronecker.projectors(factors, ridge=0.1, output_ridge=0.3)
    name, damped = "class_head.hidden", []
    for kind, ridge in ((".outputs", 0.3), (".inputs", 0.1)):
        a = factors[name + kind]
        damped.append(a + ridge * a.diagonal().mean() * torch.eye(len(a)))
    d = torch.randn(len(damped[0]), len(damped[1]), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = (torch.linalg.inv(torch.kron(*damped)) @ d.flatten()).reshape(d.shape)
    found = by[f"{name}.outputs"] @ d @ by[f"{name}.inputs"]
    taus = [ridge * factors[name + kind].diagonal().mean() for kind, ridge in ((".outputs", 0.3), (".inputs", 0.1))]
    assert_close(found, taus[0] * taus[1] * expected)


@pytest.fixture(scope="module")
def memorising():
    """A model that has memorised 48 images, of which the last 16 are to be forgotten."""
    torch.manual_seed(0)
    model = TwoHeadResNet18(3, 4, width=8)
    batch = labelled(48, side=8)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(batch[0]).class_logits, batch[1]).backward()
        optimiser.step()
    with torch.no_grad():
        for _ in range(30):
            model(batch[0])  # running statistics of these weights
    assert (model.eval()(batch[0]).class_logits.argmax(1) == batch[1]).all()
    return model, batch


def guide_of(model, kind, batches):
    """What guides steps of a model that has memorised the batches; its predictions are softened for that."""
    soft = copy.deepcopy(model)
    with torch.no_grad():
        for p in soft.class_head.out.parameters():
            p /= 4
    if kind == "diagonal":
        return kronecker.diagonal_guide(soft, diagonal_fisher(soft, batches), ridge=0.01)
    factors = kronecker.kronecker_factors(soft, batches)
    kinds = (".inputs",) if kind == "inputs" else (".inputs", ".outputs")
    return kronecker.projectors({n: a for n, a in factors.items() if n.endswith(kinds)}, ridge=0.05, output_ridge=0.3)


@pytest.mark.parametrize(("guide", "lr"), [("inputs", 0.004), ("kronecker", 0.01), ("diagonal", 0.01)])
def test_guided_steps_that_forget_as_much_cost_the_retain_images_far_less(memorising, guide, lr):
    model, (images_, labels, clients) = copy.deepcopy(memorising[0]), memorising[1]
    guided = guide_of(model, guide, [(images_[:32], labels[:32], clients[:32])])
    free = {n: torch.eye(len(a)) for n, a in kronecker.zero_input_covariances(model).items()}
    other = torch.nn.functional.one_hot((labels[32:] + 1) % 3, 3).float()
    losses, start = {}, copy.deepcopy(model.state_dict())
    for name, by, rate in (("guided", guided, lr), ("free", free, 0.001)):
        model.load_state_dict(start)
        for _ in range(60):
            distill(model, [[(images_[32:], other)]], lr=rate, momentum=0, precision="fp32", guide=by)
            logits = model(images_).class_logits.detach()
            if (logits[32:].argmax(1) == other.argmax(1)).float().mean() >= 0.9:
                break
        else:
            pytest.fail(f"{name} steps do not relabel")
        losses[name] = float(torch.nn.functional.cross_entropy(logits[:32], labels[:32]))
    assert losses["guided"] < 0.1 * losses["free"]


def test_a_constant_diagonal_gives_plain_gradient_steps(model):
    gradients = reached(model)
    constant = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
    kronecker.guide_gradients(model, kronecker.diagonal_guide(model, constant, ridge=0.25))
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(p.grad, gradients[name] * 0.25 / 1.25)


@pytest.mark.parametrize("side", [8, 32])
def test_factors_equal_those_image_by_image(model, side):
    found, expected = (
        kronecker.kronecker_factors(model, [labelled(3, side)]),
        reference.kronecker_factors(model, *labelled(3, side)[:2]),
    )
    assert found.keys() == expected.keys() == kronecker.zero_factors(model).keys()
    for name, a in found.items():
        assert a.shape == kronecker.zero_factors(model)[name].shape
        assert_close(a.double(), expected[name], rtol=1e-3, atol=1e-6)


def test_factors_do_not_depend_on_batches_and_the_model_is_as_before(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = labelled(6)
    whole = kronecker.kronecker_factors(model, [batch])
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    parts = zip(*(part.split([1, 3, 2]) for part in batch), strict=True)
    found = kronecker.kronecker_factors(model, parts)
    for name, a in found.items():
        assert_close(a, whole[name], rtol=1e-3, atol=1e-6 * float(whole[name].abs().max()))
    assert_close(dict(model.state_dict()), before)


def test_a_large_temperature_leaves_gradients_that_know_only_how_many_classes_there_are(model):
    """T -> inf: every class is as likely, so that d of the last layer is 1/K - [k is the label]."""
    images_, labels, clients = labelled(64)
    with torch.no_grad():
        for p in model.class_head.out.parameters():
            p /= 1e9
    found = kronecker.kronecker_factors(model, [(images_, labels, clients)])["class_head.out.outputs"]
    d = torch.full((64, 3), 1 / 3) - torch.nn.functional.one_hot(labels, 3)
    assert_close(found, d.T @ d / 64)


def test_distillation_equals_plain_steps(model):
    soft_labels = torch.rand(6, 3, generator=torch.Generator().manual_seed(3)).softmax(1)
    by = kronecker.projectors(kronecker.input_covariances(model, [images(seed=4)]), ridge=0.1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [[(images()[:4], soft_labels[:4]), (images()[4:], soft_labels[4:])]] * 2
    distill(model, batches, lr=0.05, momentum=0.9, precision="fp32", guide=by)
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
    matrices = {"layer.inputs": values + values.T}
    triangles = kronecker.upper(matrices)
    assert triangles["layer.inputs"].shape == (size * (size + 1) // 2,)
    assert torch.equal(kronecker.symmetric(triangles)["layer.inputs"], matrices["layer.inputs"])


def test_layers_that_the_loss_did_not_reach_get_no_gradient(model):
    model(images()).class_logits.square().sum().backward()
    model.class_head.out.weight.grad = None
    identity = {"class_head.out.inputs": torch.eye(17), "class_head.hidden.inputs": torch.eye(33)}
    kronecker.guide_gradients(model, identity)
    assert model.class_head.out.weight.grad is None
    assert model.class_head.hidden.weight.grad.abs().sum() > 0


def test_relabelling_with_the_models_own_predictions_moves_nothing(model):
    """The gradient of -sum_k p_k log q_k by the logits is q - p."""
    model.eval()
    own = model(images()).class_logits.detach().softmax(1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    by = kronecker.projectors(kronecker.kronecker_factors(model, [labelled(6)]), ridge=0.1)
    distill(model, [[(images(), own)]] * 5, lr=1.0, momentum=0.9, precision="fp32", guide=by)
    assert_close(dict(model.state_dict()), start, rtol=0, atol=1e-5)


# --- layers of other networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 5, 3, padding=1), (3, 6, 6)),
        (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), dilation=(1, 2), bias=False), (3, 7, 7)),
        (nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect"), (3, 6, 6)),
        (nn.Conv2d(3, 5, 2, padding="same", dilation=2), (3, 6, 6)),
        (nn.Conv1d(3, 5, 4, stride=2, padding=1, padding_mode="circular"), (3, 9)),
        (nn.Conv1d(3, 5, 3, padding="same", bias=False), (3, 7)),
        (nn.Linear(3, 5), (4, 2, 3)),
        (nn.Linear(3, 5), (3,)),
    ],
    ids=str,
)
def test_weights_times_inputs_are_what_the_layer_gives(layer, shape):
    x = torch.randn(4, *shape)
    weights = layer.weight.flatten(1)
    if layer.bias is not None:
        weights = torch.cat([weights, layer.bias[:, None]], 1)
    found, expected = kronecker._inputs(layer, x) @ weights.T, layer(x)
    expected = expected.reshape(4, -1, 5) if isinstance(layer, nn.Linear) else expected.flatten(2).transpose(1, 2)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def transformer():
    torch.manual_seed(0)
    network = factories.TinyTransformer(channels=3, image_size=16)
    return TwoHeadModel({"network": network}, features=16, num_classes=3, num_clients=4)


def test_factors_of_tokens_equal_those_one_by_one():
    model = transformer()
    found, seen = kronecker.kronecker_factors(model, [labelled(5)]), {}
    model.network.qkv.register_forward_hook(lambda layer, inputs, output: seen.update(x=inputs[0], y=output))
    a, g = torch.zeros(17, 17), torch.zeros(48, 48)
    for image, label in zip(images(5), torch.arange(5) % 3, strict=True):
        loss = torch.nn.functional.cross_entropy(model.eval()(image[None]).class_logits, label[None])
        (deltas,) = torch.autograd.grad(loss, seen["y"])
        tokens = torch.cat([seen["x"][0].detach(), torch.ones(17, 1)], 1)
        a += sum(torch.outer(x, x) for x in tokens) / 17 / 5
        g += sum(torch.outer(d, d) for d in deltas[0]) / 17 / 5
    assert_close(found["network.qkv.inputs"], a, rtol=1e-4, atol=1e-6)
    assert_close(found["network.qkv.outputs"], g, rtol=1e-3, atol=1e-9)


def test_what_has_no_guide_stays_as_it_is_and_is_named():
    model = transformer()
    guide = kronecker.projectors(kronecker.kronecker_factors(model, [labelled(5)]), ridge=0.1)
    left = kronecker.unguided(model, guide)
    assert left == ["network.cls_token", "network.positions"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    soft_labels = torch.tensor([[0.0, 0.0, 1.0]]).expand(5, 3)
    distill(model, [[(images(5), soft_labels)]], lr=0.1, momentum=0, precision="fp32", guide=guide)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"network.qkv.weight", "network.patches.weight", "network.mlp.0.bias"} <= moved
    assert not moved & {*left, "network.norm1.weight", "network.gamma"}


def test_depthwise_shared_idle_and_frozen_layers_have_no_guide():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise, self.mixed = nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 1)
            self.one, self.two, self.idle, self.frozen = (nn.Linear(4, 4) for _ in range(4))
            self.two.weight = self.one.weight
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.two(self.one(self.mixed(self.depthwise(x)).mean((2, 3)))))

    model = TwoHeadModel({"network": Network()}, features=4, num_classes=3, num_clients=4)
    for found in (
        kronecker.kronecker_factors(model, [labelled(5)]),
        kronecker.input_covariances(model, [images(5)]),
    ):
        layers = {name.rpartition(".")[0] for name in found if name.startswith("network.")}
        assert layers == {"network.mixed"}
