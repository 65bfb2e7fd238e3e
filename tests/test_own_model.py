"""Networks by name and by factory: what they are, what is refused, and runs that train and forget with them."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import factories
from command_line import command
from fedunlearn import build, config
from fedunlearn.apps import client_app, server_app
from fedunlearn.composing import compose
from fedunlearn.errors import UserError
from fedunlearn.federation.server_data import ServerData
from fedunlearn.nn.model import TwoHeadModel, TwoHeadResNet18
from fedunlearn.nn.networks import network_of
from fedunlearn.nn.sgd import LocalSGD
from fedunlearn.runs.home import open_run
from fedunlearn.runs.ledger import State
from fedunlearn.unlearning.fisher import _PerExample
from local_grid import LocalGrid, equal
from naive import ONCE

DIGIT = (8, 8, 1)


def of(name, shape=DIGIT, **options):
    torch.manual_seed(0)
    return network_of(name, shape, num_classes=10, options=options)


def model_of(words, digits, shape=DIGIT):
    images = build.Images([str(k) for k in range(10)], shape)
    return build.model_of(compose(digits, words), images)


# --- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_small_cnn_gives_four_times_its_width(norm):
    network = network_of("small_cnn", (9, 7, 3), num_classes=10, width=8, norm=norm)
    assert network.module(torch.zeros(2, 3, 9, 7)).shape == (2, network.features) == (2, 32)
    kinds = {type(layer) for layer in network.module}
    assert kinds & {nn.BatchNorm2d, nn.GroupNorm} == {"batch": {nn.BatchNorm2d}, "group": {nn.GroupNorm}}.get(
        norm, set()
    )


def test_a_classifier_of_torchvision_warns_of_nothing(recwarn, monkeypatch):
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, **about: weight)  # which takes seconds
    assert of("torchvision:googlenet", (32, 32, 3), aux_logits=False).features == 1024
    assert not [str(warning.message) for warning in recwarn]


def test_a_classifier_of_torchvision_loses_its_last_layer_and_takes_the_images_channels():
    network = of("torchvision:mobilenet_v3_small", (32, 32, 1), width_mult=0.25)
    assert network.features == 256
    assert isinstance(network.module.classifier[-1], nn.Identity)
    assert network.module.features[0][0].weight.shape == (8, 1, 3, 3)


def test_a_model_of_timm_gets_what_it_takes():
    pytest.importorskip("timm")
    network = of("timm:vit_tiny_patch16_224", (32, 32, 1), depth=1)
    assert (network.features, network.module.pos_embed.shape[1]) == (192, 5)
    assert of("test_efficientnet.r160_in1k", (32, 32, 3)).features == 256  # which takes no img_size


def test_without_timm_its_names_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"vit_tiny_patch16_224: timm is not installed: pip install 'fedunlearn\[timm\]'"
    ):
        of("timm:vit_tiny_patch16_224")
    hint = (
        r"pip install 'fedunlearn\[timm\]', on every machine, if it is one of timm's; one of your own is module:factory"
    )
    for name in ("vit_tiny_patch16_224", "mobilenet_v3_smal"):
        with pytest.raises(UserError, match=rf"{name}: there is no such network.*\(timm is not installed: {hint}\)"):
            of(name)


def test_with_timm_a_wrong_name_is_none_of_its(monkeypatch):
    monkeypatch.setattr("fedunlearn.nn.networks._has_timm", lambda: True)
    monkeypatch.setattr("fedunlearn.nn.networks._timm_names", lambda: ["vit_tiny_patch16_224"])
    with pytest.raises(UserError, match=r"no such network: did you mean vit_tiny_patch16_224\? \(one of your own"):
        of("vit_tiny_patch16_225")


def test_a_factory_gets_what_it_declares_and_options():
    assert of("factories:counted").features == 1 + 8 + 10
    assert of("factories:without_batch_norm", width=4).features == 8
    assert of("factories:TinyTransformer", dim=8).features == 8


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere:network", "No module named 'nowhere' (is its folder in PYTHONPATH, on every machine?)"),
        ("factories:nothing", "has no attribute 'nothing'"),
        ("factories:says_nothing", "does not say that it gives a network: write `-> nn.Module`"),
        ("subprocess:run", "does not say that it gives a network"),
        ("os:system", "does not say that it gives a network"),
        ("factories:gives_text", "what was made is no torch.nn.Module but str"),
        ("factories:raises", "FileNotFoundError while it was made: weights.pt"),
        ("factories:gives_maps", "of 4 images it gives torch.float32 [4, 4, 6, 6], and not features [4, f]"),
        ("factories:gives_nothing_finite", "features that are not finite"),
        ("factories:mixes_examples", "depend on the other images of a batch"),
        ("factories:in_double", "scale is not of finite numbers in fp32"),
        ("factories:wants_larger_images", "RuntimeError on images [4, 1, 8, 8]"),
        ("factories:changes_in_place", "RuntimeError where its gradients are computed: one of the variables"),
        ("factories:is_complex", "phase is not of finite numbers in fp32"),
        ("factories:keeps_words", "_extra_state is no tensor"),
        ("factories:has_idle_batch_norm", "BatchNorm layer aside sees 0 values of an image of 64 pixels"),
        ("factories:without_batch_norm(8)", "(is its folder in PYTHONPATH"),
        ("mobilenet_v3_smal", "there is no such network: did you mean mobilenet_v3_small?"),
        ("torchvision:resnet19", "torchvision has no classifier of that name: did you mean resnet18?"),
    ],
)
def test_networks_that_no_run_can_use_are_refused_with_the_reason(name, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as refused:
        of(name)
    assert str(refused.value).startswith(f"model.name={name}: ")


def test_wrong_options_are_named():
    with pytest.raises(UserError, match="unexpected keyword argument 'heigth'"):
        of("factories:counted", heigth=3)
    with pytest.raises(UserError, match=r"small_cnn has model\.width"):
        of("small_cnn", depth=3)


def test_a_network_that_views_its_maps_trains_in_plain_order_on_its_first_output(digits):
    model = build.on_device(model_of("model=factories:ViewedMaps", digits), torch.device("cpu"))
    images = torch.randn(6, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    assert model.plain
    assert model(images).embedding.shape == (6, 16)  # half of [8, 2, 2]
    local = LocalSGD(model, momentum=0.9, weight_decay=0.0, precision="fp32", batch_size=6)
    batch = images, torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    before = model.state_dict()["network.layers.0.weight"].clone()
    assert local.fit([[batch]], lr=0.1, loss={}).examples == 6
    assert not torch.equal(model.state_dict()["network.layers.0.weight"], before)


# --- the model -----------------------------------------------------------------------------------------------------


def test_resnet18_has_the_names_and_draws_that_it_always_had(digits):
    found = model_of("seed=3", digits)
    assert isinstance(found, TwoHeadResNet18)
    prefixes = list(dict.fromkeys(name.split(".")[0] for name in found.state_dict()))
    assert prefixes == ["pruned", "pruned_classes", "stem", "stages", "projection", "class_head", "client_head"]
    with torch.random.fork_rng():
        torch.manual_seed(build.generator_of(3).initial_seed())
        first, second = nn.Conv2d(1, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
    assert torch.equal(found.stem[0].weight, first.weight)
    assert torch.equal(found.stages[0][0].conv1.weight, second.weight)


def test_heads_scale_with_the_networks_features_and_one_seed_gives_one_model(digits):
    model, again, other = (
        model_of(f"model=factories:counted model.head_size=small seed={seed}", digits) for seed in (1, 1, 2)
    )
    assert model.projection.weight.shape == (19 // 4, 19)
    assert model.class_head.hidden.in_features == model.client_head.hidden.in_features == 4
    assert equal(model.state_dict(), again.state_dict())
    assert not torch.equal(model.projection.weight, other.projection.weight)


def test_too_few_features_for_the_heads_are_refused(digits):
    with pytest.raises(UserError, match=r"factories:gives_few: 3 features are too few for head_size='medium'"):
        model_of("model=factories:gives_few", digits)
    assert model_of("model=factories:gives_few model.head_size=large", digits).class_head.hidden.in_features == 3


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("resnet18", "stem.0.weight"),
        ("factories:TinyTransformer", "network.patches.weight"),
        ("small_cnn", "network.0.weight"),
    ],
)
def test_the_first_weights_are_asked_of_the_model(name, first, digits):
    model = model_of(f"model={name}", digits)
    assert model.first_weights() is dict(model.named_parameters())[first]


# --- settings ------------------------------------------------------------------------------------------------------


def test_a_group_alone_names_what_it_is_about(digits):
    found = compose(digits, "model=small_cnn partition=iid data=random model.width=16")
    assert (found.model.name, found.partition.kind, found.data.name) == ("small_cnn", "iid", "random")
    assert found.model.width == 16
    assert compose(digits, "model='timm:x y'").model.name == "timm:x y"
    mapped = compose(digits, "model={name: small_cnn, width: 12}")
    assert (mapped.model.name, mapped.model.width) == ("small_cnn", 12)
    assert config.from_json(config.to_json(found)) == found


def test_what_changes_nothing_of_a_model_is_refused(digits):
    for setting in ("model.width=16", "model.norm=group"):
        with pytest.raises(
            UserError, match=rf"{setting.split('=')[0]} changes nothing of model.name=mobilenet_v3_small"
        ):
            compose(digits, f"model=mobilenet_v3_small {setting}")
    with pytest.raises(UserError, match=r"resnet18 has model\.width and model\.norm, and no options"):
        model_of("model.options={depth:3}", digits)


def test_options_are_asked_for_one_by_one(digits):
    words = ["model=factories:TinyTransformer", "model.options.dim=12"]
    asked = server_app.asked_for(words, compose(digits, words))
    assert asked == {"model.name": "factories:TinyTransformer", "model.options.dim": 12}
    assert model_of(words, digits).network.cls_token.shape == (1, 1, 12)


def test_weights_that_several_layers_share_travel_once_and_arrive_everywhere(digits):
    model = model_of("model=factories:shared", digits)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert {name for name, _ in model.named_parameters()} == {name for name in state if not name.startswith("pruned")}
    assert not {"network.5.weight", "network.5.bias", "network.7.weight"} & state.keys()
    model.load_state_dict(state | {"network.3.weight": state["network.3.weight"] + 1})
    for layer in (3, 5, 7):
        assert torch.equal(model.get_submodule(f"network.{layer}").weight, state["network.3.weight"] + 1)


def test_momentum_of_the_server_moves_weights_that_layers_share(federate):
    states = []
    for rounds in (1, 2):
        federate(
            f"model=factories:shared strategy=leave data.limit=40 rounds={rounds} train.server_momentum=0.9", nodes=1
        )
        states.append(federate.server_state())
    first, second = states
    name = "network.3.weight"
    assert_close(second.params[name] - first.params[name], second.momentum[name], rtol=1e-3, atol=1e-6)
    assert second.momentum[name].abs().max() > 1e-5


# --- runs ----------------------------------------------------------------------------------------------------------

QUICK = {
    "subset": f"strategy=subset unlearn.rounds=1 unlearn.epochs=1 {ONCE} unlearn.epsilon=0.01 unlearn.guide_images=20",
    "ssd": "strategy=ssd unlearn.tune=fixed unlearn.alpha=1 unlearn.lambda_=0.5",
    "negate": "strategy=negate unlearn.repair_rounds=0",
    "gradients": "strategy=gradients unlearn.steps=1 unlearn.guide_images=20",
}
NETWORKS = {
    "cnn": "model=factories:without_batch_norm",
    "small_cnn": "model=small_cnn model.norm=none",
    "transformer": "model=factories:TinyTransformer model.options={dropout:0.3}",
    "mobilenet": "model=mobilenet_v3_small model.options={width_mult:0.25}",
    "vit_tiny": "model=vit_tiny_patch16_224 model.options={depth:2,patch_size:4}",
}
CASES = [(network, "subset") for network in NETWORKS] + [("transformer", "negate"), ("transformer", "gradients")]
CASES += [pytest.param(n, "ssd", marks=pytest.mark.thorough) for n in NETWORKS if n != "small_cnn"]


@pytest.mark.parametrize(("network", "strategy"), CASES)
def test_a_client_is_forgotten_whatever_the_network(federate, memorised, network, strategy):
    if network == "vit_tiny":
        pytest.importorskip("timm")
    words = f"{NETWORKS[network]} rounds=2 data.limit=40 batch_norm_fraction=1"
    federate.shared(words)
    before = federate.state("before")
    federate(f"{words} {QUICK[strategy]} forget.schedule={{2:[3]}} fork=before", nodes=1)
    (request,) = federate.requests()
    assert request.state == State.COMPLETED
    after = federate.state()
    assert after["pruned"].tolist() == [False, False, False, True]
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("network.") for name in moved)
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
    if strategy == "subset":
        assert request.detail["relabelled"] == [3]


@pytest.mark.parametrize("strategy", ["ssd", "subset"])
def test_the_server_says_once_a_run_what_a_fisher_costs_and_nodes_need_not(federate, capsys, monkeypatch, strategy):
    monkeypatch.setattr("fedunlearn.unlearning.fisher._PerExample.add", _in_another_process)
    words = f"model=factories:TinyTransformer rounds=2 data.limit=40 {QUICK[strategy]} batch_norm_fraction=0"
    for run in ("one", "two") if strategy == "ssd" else ("one",):  # "two" in a process that has said it before
        federate(f"{words} forget.schedule={{1:[3],2:[2]}} run={run}", nodes=2)
        assert capsys.readouterr().err.count("Fisher: one backward pass an example for network.cls_token, ") == 1


def _in_another_process(self, batch, add=_PerExample.add):
    """Add a batch where no log line reaches the server."""
    with pytest.MonkeyPatch.context() as there:
        there.setattr("fedunlearn.unlearning.fisher.said_once", lambda line: None)
        return add(self, batch)


@pytest.mark.thorough
@pytest.mark.parametrize("page", ["docs/own-model.md", "examples/own_model.py"])
def test_the_documented_commands_show_a_network_that_learns_and_forgets(home, tmp_path, monkeypatch, page):
    text = (Path(__file__).parent.parent / page).read_text()
    (tmp_path / "my_module.py").write_text("".join(re.findall(r"```python\n(.*?)```", text, re.S)[:1]))
    for folder in (tmp_path, Path(__file__).parent.parent / "examples"):
        monkeypatch.syspath_prepend(str(folder))
    (line,) = re.findall(r"PYTHONPATH=\S+ fedunlearn (run digits model=\S+:.*\\\n.*)", text)
    assert command(*shlex.split(line.replace("\\\n", "")), "run=shown", "--engine", "local") == 0
    (row,) = (row for row in open_run("shown").metrics() if row["kind"] == "forget")
    before, after = row["before"], row["after"]
    assert before["test"]["class"] > 0.88
    assert before["forgotten"]["3"]["class"] > after["forgotten"]["3"]["class"] + 0.02
    assert after["test"]["class"] > 0.85


def test_dropout_draws_the_same_whoever_hosts_a_client(federate):
    words = "model=factories:TinyTransformer model.options={dropout:0.5} rounds=2 strategy=leave"
    torch.manual_seed(1)
    federate(f"{words} run=one", nodes=1)
    torch.manual_seed(2)
    federate(f"{words} run=three", nodes=3)
    federate(f"{words} run=none model.options={{dropout:0.0}}", nodes=1)
    one, three, none = (federate.state(run) for run in ("one", "three", "none"))
    for name, value in one.items():
        assert_close(value, three[name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(one["network.qkv.weight"], none["network.qkv.weight"], atol=1e-4)


def test_nothing_drops_out_of_the_servers_loss(home, digits):
    words = "model=factories:TinyTransformer model.options={dropout:0.9} data.limit=40 data.test_limit=40"
    server = ServerData(compose(digits, words))
    assert server.loss(server.model, 20) == server.loss(server.model, 20) > 0


def test_the_model_of_a_run_is_its_network_and_predicts(federate):
    federate("model=factories:TinyTransformer rounds=1 strategy=leave")
    run = federate.run()
    assert isinstance(run.model(), TwoHeadModel)
    assert run.predict(np.zeros((3, 8, 8, 1), np.uint8)).shape == (3, 10)
    assert json.loads((run.folder / "run.json").read_text())["config"]["model"]["name"] == "factories:TinyTransformer"


def test_a_network_that_is_not_here_ends_the_run_before_it_begins(federate):
    with pytest.raises(UserError, match=r"model\.name=nowhere:network: No module named 'nowhere'"):
        federate("model=nowhere:network")
    assert not federate.folder().exists()


def test_nodes_without_the_factory_say_so(federate, monkeypatch, capsys):
    def elsewhere(message, context):
        with monkeypatch.context() as machine:
            machine.delattr(factories, "without_batch_norm")
            client_app.resident.cache_clear()
            return client_app.app(message, context)

    with pytest.raises(UserError, match="no node works"):
        federate("model=factories:without_batch_norm", grid=LocalGrid(1, elsewhere))
    assert "model.name=factories:without_batch_norm: module 'factories' has no attribute" in capsys.readouterr().err
