"""The whole thing as a user runs it: `flwr run` in processes of its own, Ray, two actors, a worker that is killed."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from fedunlearn.apps import simulate
from fedunlearn.errors import UserError

APP = Path(__file__).parent.parent / "simulations" / "digits"
SMALL = "rounds=4 data.limit=200 data.test_limit=40 forget.schedule={2:[3]}"


@pytest.fixture
def superlink(home):
    with simulate.superlink(home / "flower") as environment:
        yield environment


def flwr_run(environment, overrides, federation):
    """`flwr run --stream`, ended; its output."""
    command = ["flwr", "run", str(APP), "--stream", "--federation-config", federation]
    command += ["--run-config", f"overrides={json.dumps(f'{SMALL} {overrides}')}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280).stdout


def checkpoint(home, run):
    (file,) = (home / "runs" / run / "checkpoints").iterdir()
    return hashlib.sha256(file.read_bytes()).hexdigest()  # of bytes, pytest would show the difference for minutes


def workers(environment):
    """Process ids of this SuperLink's Ray workers that run client apps."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            named = b"ray::RetryingActor" in (process / "cmdline").read_bytes()
            ours = environment["FLWR_HOME"].encode() in (process / "environ").read_bytes()
        except OSError:
            continue
        if named and ours:
            found.append(int(process.name))
    return found


@pytest.mark.timeout(600)
def test_flwr_run_on_one_actor_on_two_and_with_a_killed_worker_gives_the_same_bits(home, superlink):
    output = flwr_run(superlink, "run=one", "num-supernodes=4 client-resources-num-cpus=2 init-args-num-cpus=2")
    assert "10 clients on 4 virtual nodes" in output
    assert 'one each: --federation-config "num-supernodes=10"' in output
    assert re.search(r"request r1, forgotten after round 2 .* client 3: .* client-ID \S+ → 0\.000", output)
    assert re.search(r"round +4/4 .* left", output)
    assert (home / "runs" / "one" / "report" / "index.html").exists()

    resources = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"
    command = ["flwr", "run", str(APP), "--stream", "--federation-config", resources]
    command += ["--run-config", f"overrides={json.dumps(f'{SMALL} run=two')}"]
    killed = []
    with subprocess.Popen(command, env=superlink, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("round   1/4"):
                killed = workers(superlink)
                environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in killed]
                os.kill(killed[0], signal.SIGKILL)
    assert len(killed) == 2
    assert all(b"glibc.malloc.hugetlb=1" in environment for environment in environments)
    assert checkpoint(home, "one") == checkpoint(home, "two")


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_to_the_same_bits(home, superlink):
    flwr_run(superlink, "run=whole", "num-supernodes=2")
    command = ["flwr", "run", str(APP), "--stream", "--run-config", f"overrides={json.dumps(f'{SMALL} run=killed')}"]
    with subprocess.Popen(command, env=superlink, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("round   1/4"):
                time.sleep(0.1)  # into round 2
                os.kill(int((home / "runs" / "killed" / "lock").read_text()), signal.SIGKILL)
                run.terminate()
                break
    assert checkpoint(home, "whole") != checkpoint(home, "killed")
    output = flwr_run(superlink, "run=killed", "num-supernodes=2")
    assert "run killed goes on after round " in output
    assert checkpoint(home, "whole") == checkpoint(home, "killed")


def test_a_terminated_process_ends_its_superlink(home):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fedunlearn import simulate\n"
        "with simulate.superlink(Path(sys.argv[1])) as environment:\n"
        "    print(environment['FLWR_LOCAL_SUPERLINK_HTTP_API_PORT'], flush=True)\n    time.sleep(100)\n"
    )
    command = [sys.executable, "-c", code, str(home / "flower")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline())
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize("text", ["a=1 b='x y'", 'a=1 b="x y"', "strategy=ssd forget.schedule={2:[3]}", "a=ü"])
def test_settings_reach_flower_as_they_are(text):
    assert parse_config_args([f"overrides={simulate.quoted(text)}"]) == {"overrides": text}


def test_quotes_of_both_kinds_are_refused():
    with pytest.raises(UserError, match="both kinds of quotes"):
        simulate.quoted("""a='x' b="y" """)


def test_bad_settings_end_with_one_line_and_a_status(home, superlink, capfd):
    assert simulate.main([str(APP), "bogus=1"]) == 2
    assert simulate.main([str(APP.parent / "nothing")]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "Key 'bogus' not in 'Config'" in errors[0]
    assert "is an app such as" in errors[1] or "has no config.yaml" in errors[1]
    output = flwr_run(superlink, "data.name=folder data.root=/nowhere", "num-supernodes=2")
    assert "data.root=/nowhere does not exist" in output
    assert "Traceback" not in output
    assert not (home / "runs").exists()
