"""A SuperLink on free ports, and `flwr run` against it, for measurements and tests.

`flwr run` alone shares one background SuperLink, which keeps its first environment and answers 0 also for runs that
fail.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

START_SECONDS = 120


def run_app(
    app: Path, run_config: str, federation: str, *, environment: dict[str, str], output: IO[str] | None = None
) -> int:
    """`flwr run` with its log streamed, to `output` where given; returns 0 if the run was completed, else 1."""
    command = ["flwr", "run", str(app), "--stream", "--federation-config", federation]
    if run_config:
        command += ["--run-config", run_config]
    if subprocess.run(command, env=environment, stdout=output, stderr=output).returncode:
        return 1
    listing = subprocess.run(["flwr", "ls", "--format", "json"], env=environment, capture_output=True, text=True)
    return int(json.loads(listing.stdout)["runs"][0]["status"] != "finished:completed")


@contextmanager
def superlink(flower_home: Path) -> Iterator[dict[str, str]]:
    """A local SuperLink that lives as long as the context; gives the environment that `flwr` needs to find it."""
    port, control_port = free_ports(2)
    flower_home.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(flower_home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control_port),
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--control-api-address", f"127.0.0.1:{control_port}"]
    with open(flower_home / "superlink.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _await_health(port, process, flower_home / "superlink.log")
        yield environment
    finally:
        process.terminate()
        process.wait()


def _await_health(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the SuperLink did not start: see {log}")


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
