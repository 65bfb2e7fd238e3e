"""The whole thing as a user runs it: processes of its own, Ray, two workers, one of which is killed."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import command_line
from benchmarks.superlink import superlink as started
from fedunlearn.runs.lock import holder

APP = Path(__file__).parent.parent / "simulations" / "digits"
SMALL = "rounds=4 data.limit=200 data.test_limit=40 forget.schedule={2:[3]}"

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What a run on four nodes in one process leaves: its checkpoint's hash."""
    folder = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDUNLEARN_HOME", str(folder))
        words = [*SMALL.split(), "run=local", "--engine", "local", "--nodes", "4"]
        assert command_line.command("run", "digits", *words) == 0
    return checkpoint(folder, "local")


@pytest.fixture
def superlink(home):
    with started(home / "flower") as environment:
        yield environment


def flwr_command(words, federation="num-supernodes=2"):
    """`flwr run --stream`."""
    command = ["flwr", "run", str(APP), "--stream", "--federation-config", federation]
    return [*command, "--run-config", f"overrides={json.dumps(f'{SMALL} {words}')}"]


def flwr_run(environment, words, federation="num-supernodes=2"):
    """Its output, when it has ended."""
    command = flwr_command(words, federation)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550).stdout


def fedunlearn_run(*words):
    """`fedunlearn run digits`, to its end. A person's lines are on stderr."""
    command = [sys.executable, "-m", "fedunlearn", "run", "digits", *SMALL.split(), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=550)


def checkpoint(home, run):
    (file,) = (home / "runs" / run / "checkpoints").iterdir()
    return hashlib.sha256(file.read_bytes()).hexdigest()  # of bytes, pytest would show the difference for minutes


def workers(home):
    """Process ids of the Ray workers that run client apps for runs in this state folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            named = b"ray::RetryingActor" in (process / "cmdline").read_bytes()
            ours = f"FEDUNLEARN_HOME={home}\0".encode() in (process / "environ").read_bytes()
        except OSError:
            continue
        if named and ours:
            found.append(int(process.name))
    return found


def test_flwr_run_on_two_actors_gives_the_bits_of_one_process_whatever_is_killed(home, superlink, local):
    two = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"
    killed, lines = [], []
    with subprocess.Popen(flwr_command("run=two", two), env=superlink, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            lines.append(line)
            if line.startswith("round   1/4"):
                killed = workers(home)
                environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in killed]
                os.kill(killed[0], signal.SIGKILL)
            if line.startswith("round   2/4"):
                time.sleep(0.1)  # into round 3
                os.kill(int(holder(home / "runs" / "two")), signal.SIGKILL)
                run.terminate()
                break
    assert len(killed) == 2
    assert all(b"glibc.malloc.hugetlb=1" in environment for environment in environments)
    assert checkpoint(home, "two") != local
    output = "".join(lines)
    assert "10 clients on 4 virtual nodes" in output
    assert 'one each: --nodes 10, of flwr run --federation-config "num-supernodes=10"' in output
    again = flwr_run(superlink, "run=two", two)
    assert "run two goes on after round " in again
    assert re.search(r"request r1, forgotten after round 2 .* client 3: .* client-ID \S+ → 0\.000", output + again)
    assert re.search(r"round +4/4 .* left", again)
    assert (home / "runs" / "two" / "report" / "index.html").exists()
    assert checkpoint(home, "two") == local


def test_settings_reach_the_server_and_a_mistake_in_them_ends_with_one_line(home, superlink):
    output = flwr_run(superlink, "data.name=folder data.root=/no where/é")
    assert "data.root=/no where/é does not exist" in output
    assert "Traceback" not in output
    assert not (home / "runs").exists()


@pytest.mark.thorough
def test_fedunlearn_run_on_one_ray_actor_gives_the_bits_of_one_process(home, local):
    """Flower's and Ray's lines are not among a person's."""
    done = fedunlearn_run("run=ray", "--engine", "ray", "--nodes", "4", "--workers", "1")
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("10 clients on 4 virtual nodes; one each: --nodes 10") for line in lines)
    assert any(line.startswith("report: ") for line in lines)
    assert not [line for line in lines if "ROUND" in line or "ServerApp" in line]
    assert checkpoint(home, "ray") == local


def test_a_mistake_that_shows_on_ray_only_ends_with_one_line_and_status_2(home):
    wrong = ["run=bad", "data.name=folder", "data.root=/nowhere"]
    done = fedunlearn_run("--engine", "ray", "--nodes", "2", "--workers", "1", *wrong)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: data.root=/nowhere does not exist")
    assert "Traceback" not in done.stderr
