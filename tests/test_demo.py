"""The demonstration: a client withdraws, beside the model that is retrained without it."""

import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest

from command_line import command
from fedunlearn.apps import demo
from fedunlearn.errors import UserError
from fedunlearn.log import set_up
from fedunlearn.runs.home import log_of, open_run
from fedunlearn.runs.ledger import Request, State

APP = Path(__file__).parent.parent / "simulations" / "digits" / "pyproject.toml"
SMALL = ["data.limit=300", "data.test_limit=60", "model.width=8"]


def test_flwr_run_shows_the_same():
    overrides = tomllib.loads(APP.read_text())["tool"]["flwr"]["app"]["config"]["overrides"]
    assert overrides.split() == demo.WORDS


@pytest.mark.slow
def test_the_demo_takes_a_client_that_was_known_to_where_the_retrained_model_is(home, capsys):
    set_up()
    page = demo.demonstrate("demo")
    assert page is not None
    said = capsys.readouterr().err
    for words in ("Client 7 has", "withdraws", "pruning the output of client 7", "retrained without client 7"):
        assert words in said
    assert "retrained without it" in page.read_text()
    run, retrained = open_run("demo"), open_run("demo-retrained")
    (request,) = run.ledger.requests()
    assert (request.state, request.detail["round"]) == (State.COMPLETED, demo.REQUESTED)
    known, applied = (request.detail[when]["forgotten"]["7"]["class"] for when in ("before", "after"))
    here, there = (each.metrics()[-1]["forgotten"]["7"]["class"] for each in (run, retrained))
    assert known > 0.8
    assert max(applied, here) < 0.55
    assert abs(here - there) < 0.15  # three standard errors
    assert "7" not in retrained.metrics()[-1]["retain_clients"]


@pytest.mark.slow
def test_a_retrained_model_that_fails_is_told(home, monkeypatch):
    monkeypatch.setattr(demo, "WORDS", ["rounds=1", *SMALL])
    monkeypatch.setattr(demo, "RETRAINED", ["rounds=no"])
    with pytest.raises(UserError, match=r"demo-retrained failed: see .*demo-retrained\.log"):
        demo.demonstrate("demo")
    assert "rounds=no" in log_of(home, "demo-retrained").read_text()


def test_a_request_that_failed_ends_the_demo_with_its_reason(home, monkeypatch, capsys):
    refused = Request("r1", [7], State.REFUSED, "", {"reason": "no client would be left"})
    monkeypatch.setattr("fedunlearn.apps.server_app.train", lambda *about: [refused])
    monkeypatch.setattr(demo, "retraining", lambda *about: nullcontext())
    monkeypatch.setattr(demo, "simulate", lambda work, *about, **options: work(None))
    assert command("demo") == 1
    assert "request r1 is REFUSED: no client would be left" in capsys.readouterr().err
