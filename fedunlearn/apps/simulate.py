"""Run a Flower app with a SuperLink of its own: `python -m fedunlearn.simulate simulations/digits --nodes 10`.

`flwr run` shares one background SuperLink, which keeps its first environment and answers 0 also for runs that fail.
This command starts a SuperLink on free ports, streams the run, ends the SuperLink, and exits non-zero on failure.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedunlearn.config import compose, state_home
from fedunlearn.errors import UserError

START_SECONDS = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if the run was completed, 1 if not, 2 for bad input or no SuperLink."""
    p = argparse.ArgumentParser("python -m fedunlearn.simulate", description="Run a Flower app and wait for its end.")
    p.add_argument("app", help="the app's folder, as simulations/digits")
    p.add_argument("overrides", nargs="*", help="settings, as rounds=40 'forget.schedule={6:[3]}'")
    p.add_argument("--nodes", type=int, default=10, help="virtual nodes (default: 10)")
    p.add_argument("--cpus", type=int, default=1, help="CPUs of a node while it works (default: 1)")
    p.add_argument("--gpus", type=float, default=0.0, help="GPU share of a node while it works (default: 0)")
    options = p.parse_intermixed_args(arguments)
    app, overrides = Path(options.app), " ".join(options.overrides)
    resources = f"client-resources-num-cpus={options.cpus} client-resources-num-gpus={options.gpus}"
    try:
        compose(app / "conf", overrides)
        with superlink(state_home() / "flower") as environment:
            return run(app, overrides, f"num-supernodes={options.nodes} {resources}", environment=environment)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(
    app: Path, overrides: str, federation: str, *, environment: dict[str, str], output: IO[str] | None = None
) -> int:
    """`run_app` of one of our apps, whose run config is one string of settings."""
    run_config = f"overrides={quoted(overrides)}" if overrides else ""
    return run_app(app, run_config, federation, environment=environment, output=output)


def quoted(text: str) -> str:
    """A string of TOML, as much of it as Flower's command line reads: no quotes of both kinds."""
    if "'" in text and '"' in text:
        raise UserError(f"settings have both kinds of quotes, take one: {text}")
    return f"'{text}'" if '"' in text else json.dumps(text, ensure_ascii=False)


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
    """A local SuperLink that lives as long as the context; gives the environment that `flwr` needs to find it.

    SIGTERM ends the context as an exit does.
    """
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
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        _await_health(port, process, flower_home / "superlink.log")
        yield environment
    finally:
        signal.signal(signal.SIGTERM, before)
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
    raise UserError(f"the SuperLink did not start: see {log}")


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
