from dataclasses import asdict
from pathlib import Path

import pytest

from fedunlearn import config
from fedunlearn.errors import UserError

REPOSITORY = Path(__file__).parent.parent
APPS = sorted((REPOSITORY / "simulations").glob("*/conf"))


@pytest.mark.parametrize("conf", APPS, ids=lambda conf: conf.parent.name)
def test_every_app_composes_and_survives_json(conf):
    composed = config.compose(conf)
    assert config.from_json(config.to_json(composed)) == composed


def test_overrides_of_all_kinds():
    text = "rounds=40 unlearn.alpha=inf train.flip=true forget.schedule={6: [3], 7:[1, 2]} run=a.b-c"
    composed = config.compose(REPOSITORY / "simulations/digits/conf", text)
    assert (composed.rounds, composed.unlearn.alpha, composed.train.flip) == (40, float("inf"), True)
    assert composed.forget.schedule == {6: [3], 7: [1, 2]}
    assert config.from_json(config.to_json(composed)) == composed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("bogus=1", "Key 'bogus' not in 'Config'"),
        ("unlearn.alpha=abc", "'abc' of type 'str' could not be converted to Float"),
        ("unlearn.alpha=-1", r"unlearn.alpha=-1.0 is not in 0..inf"),
        ("unlearn.alpha=nan", "unlearn.alpha=nan is not in"),
        ("clients=1", r"clients=1 is not in 2..1000000"),
        ("train.schedule=often", "train.schedule=often is not one of steps, cosine, constant"),
        ("scale=huge", "scale=huge is not one of auto, full, laptop"),
        ("rounds", "Error parsing override 'rounds'"),
        ("forget.schedule={3:[12]}", r"client 12 is not in 0\.\.9"),
        ("forget.schedule={999:[1]}", r"round 999 is not in 1\.\."),
        ("forget.schedule={3:[]}", "no client to forget"),
        ("run=../elsewhere", "is no name"),
        ("run=..", "is no name"),
        ("unlearn.head=client model.client_head=false", "unlearn.head=client needs model.client_head=true"),
    ],
)
@pytest.mark.parametrize("app", ["digits", "cifar10"])
def test_bad_overrides_get_one_line(app, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        config.compose(REPOSITORY / "simulations" / app / "conf", overrides)
    assert "\n" not in str(caught.value)


def test_scale_auto_is_laptop_without_a_gpu_and_full_with_one(monkeypatch):
    conf = REPOSITORY / "simulations/cifar10/conf"
    for gpu, scale, width in ((False, "laptop", 16), (True, "full", 64)):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        for overrides in ("", "scale=auto"):
            composed = config.compose(conf, overrides)
            assert (composed.scale, composed.model.width) == (scale, width)
    assert config.compose(conf, "scale=laptop model.width=32").model.width == 32


def test_a_setting_that_is_no_more_is_named():
    with pytest.raises(UserError, match="weight is no setting of this version"):
        config.from_json('{"unlearn": {"weight": 0.5}}')


def test_the_papers_values_are_the_defaults():
    loss = asdict(config.Config().loss)
    paper = {"class_weight": 1, "client_weight": 1, "disentangle_weight": 0.1, "pull": 1, "push": 1, "margin": 1}
    assert paper.items() <= loss.items()
    composed = config.compose(REPOSITORY / "simulations/cifar100/conf", "scale=full")
    assert (composed.rounds, composed.model.width, composed.data.limit) == (200, 64, 0)
    assert composed.loss.warmup * composed.rounds == 20


def test_readme_lists_every_setting():
    readme = (REPOSITORY / "README.md").read_text()
    missing = [name for name, _, _ in config.settings(config.Config()) if f"`{name}`" not in readme]
    assert not missing


def test_state_home_prefers_the_setting_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path))
    assert config.state_home() == tmp_path
    assert config.state_home("~/here") == Path.home() / "here"
    monkeypatch.delenv("FEDUNLEARN_HOME")
    assert config.state_home() == Path.home() / ".fedunlearn"
