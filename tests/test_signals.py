"""Ctrl-C, SIGTERM, SIGHUP and the end of a SuperLink: nothing goes on unseen, and the run resumes to the same bits."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.superlink import superlink
from command_line import command
from fedunlearn.apps import signals
from fedunlearn.runs.home import open_run
from fedunlearn.runs.ledger import State
from fedunlearn.runs.lock import holder

SMALL = ["clients=4", "data.limit=200", "data.test_limit=40", "train.client_head_steps=20", "strategy=leave"]
RUN = ["run", "digits", *SMALL, "rounds=6", "forget.schedule={3:[1]}"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Stopped:
    """A command in a session of its own, stopped when a line of its output says that it is in mid-round."""

    def __init__(self, words, number, *, at, group=False, ignored=()):
        def ignore():
            for each in ignored:
                signal.signal(each, signal.SIG_IGN)

        with subprocess.Popen(
            [sys.executable, "-m", "fedunlearn", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=ignore,
        ) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if re.search(at, line):
                    time.sleep(0.1)
                    self.started = psutil.Process(process.pid).children(recursive=True)
                    (os.killpg if group else os.kill)(process.pid, number)
                    began = time.monotonic()
                    break
            else:
                pytest.fail("".join(lines))
            self.rest = process.stdout.read()
            self.status = process.wait()
            self.seconds = time.monotonic() - began

    @property
    def left(self):
        """Processes that were below the command and are still there, ten seconds later at most."""
        return psutil.wait_procs(self.started, timeout=max(0.1, 10 - self.seconds))[1]


def digest(home, run):
    (file,) = (home / "runs" / run / "checkpoints").iterdir()
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_that_was_stopped_three_times_ends_with_the_same_bits(home):
    local = ["--engine", "local", "--nodes", "2"]
    assert command(*RUN, "run=whole", *local) == 0
    stopping = [*RUN, "run=stopped", *local]
    for number, after in ((signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGHUP, 4)):
        stopped = Stopped(stopping, number, at=rf"^round +{after}/6 ")
        assert stopped.status == 128 + number
        assert stopped.seconds < 5
        goes_on = r"`fedunlearn (run digits .* run=stopped --engine=local --nodes=2)` goes on after round \d of 6"
        said = re.fullmatch(rf"(?:round .*\n)?stopped by {number.name}: {goes_on}\n", stopped.rest)
        stopping = shlex.split(said[1])  # as somebody would who pastes it
    assert command(*stopping) == 0
    assert digest(home, "whole") == digest(home, "stopped")


@pytest.mark.ray
def test_with_a_run_on_ray_all_its_processes_end(home):
    """Ray takes SIGTERM for itself when it starts."""
    stopped = Stopped([*RUN, "--nodes", "2", "--workers", "1"], signal.SIGTERM, at=r"^round +1/6 ")
    assert stopped.status == 128 + signal.SIGTERM
    assert len(stopped.started) > 2
    assert stopped.left == []
    assert "Traceback" not in stopped.rest


@pytest.mark.ray
@pytest.mark.thorough
def test_a_scaling_study_ends_with_the_run_that_it_measures(home):
    overrides = "data.limit=200 train.client_head_steps=20 model.width=8"
    study = ["scale", "clients=[4]", "actors=[1]", "rounds=300", f"overrides={overrides}"]
    logs = home / "scaling" / "scaling"
    start = [sys.executable, "-m", "fedunlearn", *study]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not any("round   2/" in log.read_text() for log in logs.glob("*.log")):
            assert process.poll() is None
            time.sleep(0.2)
        below = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=10) == 128 + signal.SIGINT
        assert process.stderr.read().splitlines()[-1] == "stopped by SIGINT: the same command goes on"
    assert len(below) > 3
    assert psutil.wait_procs(below, timeout=10)[1] == []


def test_a_request_that_was_stopped_stays_filed_and_is_applied_by_the_same_command(home):
    run = ["run", "digits", *SMALL[:-1], "strategy=retrain", "rounds=4", "run=demo", "--engine", "local"]
    assert command(*run) == 0
    asking = ["forget", "--client", "1", "--engine", "local"]
    stopped = Stopped(asking, signal.SIGINT, at="is applied here")
    assert stopped.status == 130
    assert stopped.rest.splitlines()[-1] == (
        "stopped by SIGINT: the request stays filed, and the same command goes on with it"
    )
    (request,) = open_run("demo").ledger.requests()
    assert request.state in (State.RECEIVED, State.COLLECTING)
    assert command(*asking) == 0
    assert open_run("demo").ledger.request("r1").state == State.COMPLETED


def test_a_signal_that_is_ignored_stays_ignored(home):
    run = [*RUN, "rounds=3", "run=nohup", "--engine", "local"]
    stopped = Stopped(run, signal.SIGHUP, at=r"^round +1/3 ", ignored=[signal.SIGHUP])
    assert stopped.status == 0
    assert "report: " in stopped.rest


@pytest.mark.ray
def test_a_run_of_flwr_ends_with_its_superlink(home):
    with superlink(home / "flower") as environment:
        overrides = " ".join([*SMALL, "rounds=500", "run=orphan"])
        start = ["flwr", "run", "simulations/digits", "--stream", "--federation-config", "num-supernodes=2"]
        start += ["--run-config", f"overrides={json.dumps(overrides)}"]
        with subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, text=True) as run:
            for line in run.stdout:
                if line.startswith("round   2/"):
                    break
            server = psutil.Process(int(holder(home / "runs" / "orphan")))
            below = [server, *server.children(recursive=True)]
            (link,) = (process for process in server.parents() if "flower-superlink" in " ".join(process.cmdline()))
            link.kill()
            link.wait()  # else it stays there as a zombie
            assert psutil.wait_procs(below, timeout=10)[1] == []
            run.kill()


def test_who_waits_in_vain_is_told_for_what_and_ended(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr("fedunlearn.log.FIRST_WORD", 0.05)
    monkeypatch.setattr(signals, "end", lambda line, status: ended.append((line, status)))
    with signals.patience("Ray to start", limit=0.3):
        time.sleep(0.8)
    assert ended == [("error: waited 0.3 s for Ray to start, in vain", 3)]
    with signals.patience("nothing", limit=0.3):
        pass
    time.sleep(0.5)
    assert len(ended) == 1
