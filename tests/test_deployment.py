"""Three SuperNodes and a SuperLink on this machine, with TLS and keys: train, forget, end and start parts anew."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.superlink import free_ports
from command_line import command
from fedunlearn.runs.run import Run
from test_owners import picture

SCRIPTS = Path(__file__).parent.parent / "simulations" / "deployment"
NAMES = ("hospital_a", "hospital_b", "hospital_c")
QUICK = (
    "data.image_size=8 model=small_cnn model.width=8 model.norm=none strategy=leave forget.gate=false "
    "evaluate_every=100 timeout=100 train.client_head_by=local forget.purge=never"
)

pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.timeout(900)]


class Deployment:
    """Everything below one folder; processes are ended by their ids, each with those that it has started."""

    def __init__(self, folder, stack):
        self.folder, self._stack = folder, stack
        self.port, *self._ports = free_ports(1 + len(NAMES))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._common = {"DEPLOYMENT": str(folder), "SUPERLINK": f"127.0.0.1:{self.port}", "HOST": "127.0.0.1"}
        self._common |= {"PATH": path, "OMP_NUM_THREADS": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}

    def environment(self, **others):
        kept = {name: value for name, value in os.environ.items() if name not in ("FLWR_HOME", "FEDUNLEARN_HOME")}
        return kept | self._common | others

    def script(self, name, *words):
        """Run a script to its end; gives what it prints."""
        command = ["sh", str(SCRIPTS / name), *map(str, words)]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=400)
        return done.stdout + done.stderr

    def start(self, name, *words, log, **environment):
        """Start a script that runs until it is ended."""
        with open(self.folder / f"{log}.log", "ab") as output:
            process = subprocess.Popen(
                ["sh", str(SCRIPTS / name), *map(str, words)],
                env=self.environment(**environment),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        process.flower_home = Path(environment.get("FLWR_HOME", self.folder / "flwr"))
        self._stack.callback(end, process)
        return process

    def superlink(self):
        return self.start("superlink.sh", log="superlink")

    def supernode(self, place, client=None):
        name = NAMES[place]
        at = {"PORT": str(self._ports[place])}
        at |= {what: str(self.folder / "at" / name / what) for what in ("FLWR_HOME", "FEDUNLEARN_HOME")}
        return self.start("supernode.sh", client or name, self.folder / name, log=name, **at)

    def run(self):
        return Run.opened(self.folder / "fedunlearn" / "runs" / "real")

    def server_app(self):
        """The id of the process of the server app, which the SuperLink has started."""
        (found,) = (
            process.pid
            for process in psutil.Process(self.link.pid).children(recursive=True)
            if "flwr-serverapp" in " ".join(process.cmdline())
        )
        return found

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, name, text, times=1, limit=180):
        deadline = time.monotonic() + limit
        while not (self.folder / f"{name}.log").exists() or len(re.findall(text, self.log(name))) < times:
            assert time.monotonic() < deadline, self.log(name)[-2000:]
            time.sleep(0.2)


def stop(process):
    """End a script as a service ends: the SuperNode tells the SuperLink that it goes."""
    process.terminate()
    process.wait(60)


def end(process):
    """End a script and what it has started, without a word."""
    file = process.flower_home / "supernode.pid"
    nodes = [int(file.read_text())] if file.exists() else []
    for group in (process.pid, *nodes):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    process.wait()


@pytest.fixture
def deployment(tmp_path, monkeypatch):
    """A SuperLink that knows three keys, and their SuperNodes."""
    with ExitStack() as stack:
        for number, name in enumerate((*NAMES, "held-out")):
            for k, class_ in enumerate(("no", "yes")):
                for i in range(4):
                    picture(tmp_path / name / class_ / f"{i}.png", 100 * number + 10 * k + i)
        made = Deployment(tmp_path, stack)
        made.script("certificates.sh")
        keys = ",".join(f"{name}:{made.script('key.sh', name).split()[-1]}" for name in NAMES)
        words = f"run=real data.root={tmp_path / 'held-out'} partition.names=[{','.join(NAMES)}] {QUICK}"
        made.words = [*words.split(), f"partition.keys={{{keys}}}"]
        made.link = made.superlink()
        made.wait_for("superlink", "Uvicorn running")
        registered = made.script("register.sh", *(tmp_path / "keys" / f"{name}.pub" for name in NAMES))
        assert registered.count("registered successfully") == 3
        made.nodes = [made.supernode(place) for place in range(3)]
        monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path / "fedunlearn"))
        yield made


def messages_of(log):
    """How many messages a SuperNode has received."""
    return log.count("Receiving: ")


def trained(deployment):
    """The clients of every round that was trained."""
    return [row["clients"] for row in deployment.run().metrics() if row["kind"] == "round"]


def test_a_forgotten_hospital_gets_no_message_whatever_it_says_that_it_is(deployment):
    deployment.start("run.sh", *deployment.words, "rounds=2", log="run")
    deployment.wait_for("run", r"round +1/2 ")
    assert command("forget", "--client", "hospital_b", "--run", "real") == 0
    deployment.wait_for("run", "report: ")
    assert "3 clients on 3 machines of their own" in deployment.log("run")

    end(deployment.link)
    deployment.superlink()
    deployment.wait_for("superlink", "Uvicorn running", times=2)
    stop(deployment.nodes[1])
    before = messages_of(deployment.log("hospital_b"))
    deployment.start(
        "supernode.sh",
        "hospital_b",
        deployment.folder / "hospital_b",
        log="again",
        PORT=str(free_ports(1)[0]),
        NODE_CONFIG='client="hospital_a" partition-id=0',
        FLWR_HOME=str(deployment.folder / "at" / "again"),
    )
    deployment.wait_for("again", "SuperNode ID")
    said = deployment.script("run.sh", *deployment.words, "rounds=3")
    assert "its key is that of a client that was forgotten" in said
    rounds = trained(deployment)
    assert (len(rounds), rounds[0], rounds[-1]) == (3, [0, 1, 2], [0, 2])
    assert (before > 0, messages_of(deployment.log("again"))) == (True, 0)


def test_work_goes_on_after_the_end_of_any_part(deployment):
    deployment.start("run.sh", *deployment.words, "rounds=4", log="run")
    deployment.wait_for("run", r"round +1/4 ")
    os.kill(deployment.server_app(), signal.SIGKILL)
    key, home = deployment.folder / "keys" / "hospital_b", deployment.folder / "at" / "hospital_b" / "FEDUNLEARN_HOME"
    assert command("leave", "--client", "hospital_b", "--key", str(key), "--home", str(home)) == 0

    end(deployment.nodes[2])
    end(deployment.link)
    deployment.superlink()
    deployment.supernode(2)
    deployment.wait_for("superlink", "Uvicorn running", times=2)
    deployment.wait_for("hospital_c", "SuperNode ID", times=2)
    said = deployment.script("run.sh", *deployment.words, "rounds=4")
    (request,) = deployment.run().ledger.requests()
    assert (request.state, request.detail["asked_by"]) == ("COMPLETED", "fedunlearn leave"), said[-2000:]
    rounds = trained(deployment)
    assert (len(rounds), rounds[0], rounds[-1]) == (4, [0, 1, 2], [0, 2])
