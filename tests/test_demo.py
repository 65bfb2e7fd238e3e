"""The demonstration, smaller: a client withdraws, beside the model that is retrained without it."""

import re
import tomllib
from pathlib import Path

import pytest

from fedunlearn.apps import demo
from fedunlearn.errors import UserError
from fedunlearn.log import set_up
from fedunlearn.runs.home import log_of, open_run
from fedunlearn.runs.ledger import State

APP = Path(__file__).parent.parent / "simulations" / "digits" / "pyproject.toml"
SMALL = ["data.limit=300", "data.test_limit=60", "model.width=8"]


def test_flwr_run_shows_the_same():
    overrides = tomllib.loads(APP.read_text())["tool"]["flwr"]["app"]["config"]["overrides"]
    assert overrides.split() == demo.WORDS


@pytest.mark.slow
def test_the_demo_forgets_on_the_way_and_compares_with_the_retrained_model(home, monkeypatch, capsys):
    for name in ("WORDS", "RETRAINED"):
        words = [re.sub(r"rounds=\d+", "rounds=4", word) for word in getattr(demo, name)]
        monkeypatch.setattr(demo, name, [*(word.replace("{12:", "{2:") for word in words), *SMALL])
    set_up()
    page = demo.demonstrate("demo")
    said = capsys.readouterr().err
    for words in ("Client 7 has", "withdraws", "pruning the output of client 7", "retrained without client 7"):
        assert words in said
    assert "retrained without it" in page.read_text()
    run, retrained = open_run("demo"), open_run("demo-retrained")
    (request,) = run.ledger.requests()
    assert (request.state, request.detail["round"]) == (State.COMPLETED, 2)
    assert [row["round"] for row in retrained.metrics() if row["kind"] == "round"] == [1, 2, 3, 4]
    assert "7" not in retrained.metrics()[-1]["retain_clients"]


@pytest.mark.slow
def test_a_retrained_model_that_fails_is_told(home, monkeypatch):
    monkeypatch.setattr(demo, "WORDS", ["rounds=1", *SMALL])
    monkeypatch.setattr(demo, "RETRAINED", ["rounds=no"])
    with pytest.raises(UserError, match=r"demo-retrained failed: see .*demo-retrained\.log"):
        demo.demonstrate("demo")
    assert "rounds=no" in log_of(home, "demo-retrained").read_text()
