"""`fedunlearn deploy check`, against certificates and keys that the scripts made."""

import os
import re
import shlex
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from socket import create_server

import pytest
import yaml

from command_line import command
from test_owners import picture

SCRIPTS = Path(__file__).parent.parent / "simulations" / "deployment"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """A machine's folder with a certificate for localhost, and the key of hospital_b."""
    folder = tmp_path_factory.mktemp("machine") / "deployment"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"DEPLOYMENT": str(folder), "PATH": path}
    for script, *words in (("certificates.sh", "superlink.example.org", "192.0.2.7"), ("key.sh", "hospital_b")):
        done = subprocess.run(["sh", SCRIPTS / script, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("02", "03"))
    return folder


@pytest.fixture
def listening(deployment):
    """The address of a server with the SuperLink's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(deployment / "certificates" / "server.pem", deployment / "certificates" / "server.key")
    with create_server(("127.0.0.1", 0)) as server:

        def answer():
            for _ in range(2):
                try:
                    context.wrap_socket(server.accept()[0], server_side=True).close()
                except OSError:
                    continue

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


def test_a_machine_that_has_everything_is_told_so(deployment, listening, tmp_path, capsys):
    for name in ("no", "yes"):
        picture(tmp_path / "b" / name / "0.png")
    words = ["--client", "hospital_b", "--images", tmp_path / "b", "--held-out", tmp_path / "b"]
    assert command("deploy", "check", deployment, *words, "--superlink", f"127.0.0.1:{listening}") == 0
    out = capsys.readouterr().out
    assert "2 images of client hospital_b (no 1, yes 1)" in out
    assert "its certificate is by this authority" in out
    assert (deployment / "keys" / "hospital_b").stat().st_mode & 0o077 == 0


def test_everything_that_is_missing_is_named(deployment, tmp_path, capsys):
    picture(tmp_path / "one" / "no" / "0.png")
    words = ["--client", "hospital_c", "--images", tmp_path / "nowhere", "--held-out", tmp_path / "one"]
    assert command("deploy", "check", deployment, *words, "--superlink", "127.0.0.1:1") == 1
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISSING")]
    for reason, line in zip(
        ("hospital_c cannot be read", "is no folder", "has one class", "does not answer"), missing, strict=True
    ):
        assert reason in line


def test_a_superlink_of_another_authority_is_not_trusted(deployment, listening, tmp_path, capsys):
    environment = os.environ | {"DEPLOYMENT": str(tmp_path)}
    subprocess.run(["sh", SCRIPTS / "certificates.sh"], env=environment, check=True, capture_output=True)
    assert command("deploy", "check", tmp_path, "--superlink", f"127.0.0.1:{listening}") == 1
    assert "MISSING  127.0.0.1" in capsys.readouterr().out
    (tmp_path / "certificates" / "ca.crt").write_bytes((deployment / "certificates" / "ca.crt").read_bytes())
    assert command("deploy", "check", tmp_path) == 1
    assert "is not by the authority" in capsys.readouterr().out
    assert command("deploy", "check", tmp_path / "nothing") == 1
    assert "MISSING" in capsys.readouterr().out


def test_in_containers_only_scripts_and_services_that_there_are_get_called():
    services = yaml.safe_load((SCRIPTS / "compose.yaml").read_text())["services"]
    (block,) = re.findall(r"```sh\n(.*?)```", (SCRIPTS / "README.md").read_text(), re.DOTALL)
    lines = [shlex.split(line.removeprefix("docker compose ")) for line in block.splitlines()]
    inside = [shlex.join(words[words.index("superlink") + 1 :]) for words in lines if "superlink" in words]
    started = [service["command"] for service in services.values()]
    scripts = {text.split()[0] for text in [*inside, *started] if text.startswith("./")}
    assert scripts == {"./certificates.sh", "./key.sh", "./register.sh", "./run.sh", "./superlink.sh", "./supernode.sh"}
    assert all(os.access(SCRIPTS / script, os.X_OK) for script in scripts)
    clients = {name for name in services if name != "superlink"}
    assert clients == set(re.findall(r"hospital_\w", block))
    for name in clients:
        sources = [volume.partition(":")[0] for volume in services[name]["volumes"]]
        of_others = [source for source in sources if any(other in source for other in clients - {name})]
        assert f"./{name}" in sources
        assert not of_others
        assert not any(source.endswith((".key", "/deployment", "/held-out")) for source in sources)
