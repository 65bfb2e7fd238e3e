"""Log lines for people: on stderr, whatever that is at the moment, ours alone unless more is asked for."""

import io
import logging
import sys
import warnings

import pytest

from fedunlearn.log import ROUNDS, prefixed, set_up

log = logging.getLogger("fedunlearn")


@pytest.fixture(autouse=True)
def as_before():
    """Other tests set up logging too: everything is put back."""
    loggers = [logging.getLogger(name) for name in ("fedunlearn", "flwr", "ray", ROUNDS)]
    kept = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, level, propagate, handlers in kept:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


def test_lines_go_to_stderr_as_they_are_and_once(capsys):
    set_up()
    set_up()
    log.info("run %s starts", "demo")
    logging.getLogger("fedunlearn.rounds").info("round 1")
    assert capsys.readouterr() == ("", "run demo starts\nround 1\n")


def test_lines_follow_stderr_where_it_goes(monkeypatch, capsys):
    set_up()
    other = io.StringIO()
    monkeypatch.setattr(sys, "stderr", other)
    log.info("elsewhere")
    assert other.getvalue() == "elsewhere\n"
    assert capsys.readouterr().err == ""


def test_lines_reach_no_handler_of_the_root():
    reached: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = reached.append
    logging.getLogger().addHandler(handler)
    try:
        set_up()
        log.info("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert reached == []


@pytest.mark.parametrize("name", ["flwr", "ray"])
def test_lines_of_flower_and_ray_show_only_where_asked_for(name):
    for verbose, shown in ((True, True), (False, False)):
        logging.getLogger(name).setLevel(logging.INFO)
        set_up(verbose=verbose)
        assert logging.getLogger(name).isEnabledFor(logging.WARNING) == shown
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)


def test_one_logger_can_be_silenced_without_the_rest(capsys):
    set_up()
    logging.getLogger(ROUNDS).setLevel(logging.WARNING)
    logging.getLogger(ROUNDS).info("round 1")
    log.info("request r1")
    assert capsys.readouterr().err == "request r1\n"


def test_lines_begin_with_the_prefix_of_their_context(capsys):
    set_up()
    with prefixed("ssd seed 0"):
        log.info("starts at %d %%", 5)
        with prefixed("inner"):
            log.warning("deeper")
        logging.getLogger(ROUNDS).info("round 1")
    with pytest.raises(KeyError), prefixed("broken"):
        raise KeyError
    log.info("100 %")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["ssd seed 0: starts at 5 %", "inner: deeper", "ssd seed 0: round 1", "100 %"]
