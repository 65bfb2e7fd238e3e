"""`fedunlearn deploy check`, against certificates and keys that the scripts made."""

import os
import re
import shlex
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from socket import create_server

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

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
def clock():
    """What the server's clock says."""
    return [datetime.now(UTC)]


@pytest.fixture
def listening(deployment, clock):
    """The port of a server with the SuperLink's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(deployment / "certificates" / "server.pem", deployment / "certificates" / "server.key")
    with create_server(("127.0.0.1", 0)) as server:

        def answer():
            for _ in range(2):
                with (
                    suppress(OSError),
                    server.accept()[0] as connection,
                    context.wrap_socket(connection, server_side=True) as secure,
                ):
                    secure.recv(4096)
                    secure.sendall(f"HTTP/1.1 404\r\ndate: {format_datetime(clock[0], usegmt=True)}\r\n\r\n".encode())

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_machine_that_has_everything_is_told_so(deployment, listening, tmp_path, capsys):
    for name in ("no", "yes"):
        picture(tmp_path / "b" / name / "0.png")
    words = ["--client", "hospital_b", "--images", tmp_path / "b", "--held-out", tmp_path / "b", "--read"]
    assert command("deploy", "check", deployment, *words, "--superlink", f"127.0.0.1:{listening}") == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'b'}: every image can be read" in out
    assert "this machine's clock is" in out
    assert "2 images of client hospital_b (no 1, yes 1)" in out
    assert "its certificate is by this authority" in out
    assert (deployment / "keys" / "hospital_b").stat().st_mode & 0o077 == 0


def test_everything_that_is_missing_is_named(deployment, tmp_path, capsys):
    picture(tmp_path / "one" / "no" / "0.png")
    words = ["--client", "hospital_c", "--images", tmp_path / "nowhere", "--held-out", tmp_path / "one"]
    assert command("deploy", "check", deployment, *words, "--superlink", "127.0.0.1:1") == 1
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISSING")]
    for reason, line in zip(
        ("`key.sh hospital_c` makes it", "nowhere is no folder: give", "has one class", "is the SuperLink started"),
        missing,
        strict=True,
    ):
        assert reason in line


def test_a_superlink_of_another_authority_is_not_trusted(deployment, listening, tmp_path, capsys):
    environment = os.environ | {"DEPLOYMENT": str(tmp_path)}
    subprocess.run(["sh", SCRIPTS / "certificates.sh"], env=environment, check=True, capture_output=True)
    assert command("deploy", "check", tmp_path, "--superlink", f"127.0.0.1:{listening}") == 1
    assert re.search("MISSING  127.0.0.1.* is not by the authority of ca.crt .*: copy the", capsys.readouterr().out)
    (tmp_path / "certificates" / "ca.crt").write_bytes((deployment / "certificates" / "ca.crt").read_bytes())
    assert command("deploy", "check", tmp_path) == 1
    assert "is not by the authority" in capsys.readouterr().out
    assert command("deploy", "check", tmp_path / "nothing") == 1
    assert "ca.crt is not here: copy it from the SuperLink's machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (-60, r"6\d s ahead of the SuperLink's, which refuses"),
        (600, r"(59\d|600) s behind the SuperLink's, which refuses"),
    ],
)
def test_a_clock_with_which_a_superlink_refuses_a_node_is_named(deployment, listening, clock, capsys, difference, said):
    clock[0] += timedelta(seconds=difference)
    assert command("deploy", "check", deployment, "--superlink", f"127.0.0.1:{listening}") == 1
    assert re.search(f"MISSING  this machine's clock is {said}", capsys.readouterr().out)


def test_a_superlink_that_is_called_by_another_name_or_is_none_is_told_so(deployment, listening, monkeypatch, capsys):
    call = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda to, **about: call(("127.0.0.1", to[1]), **about))
    with create_server(("127.0.0.1", 0)) as mail:

        def greet():
            with suppress(OSError), mail.accept()[0] as connection:
                connection.sendall(b"220 mail\r\n")
                connection.recv(4096)

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        for address, said in (
            (f"192.0.2.9:{listening}", "is not for 192.0.2.9: `certificates.sh 192.0.2.9` on its machine"),
            (f"127.0.0.1:{mail.getsockname()[1]}", "does not speak TLS"),
            ("https://127.0.0.1:1", "is no HOST:PORT"),
        ):
            assert command("deploy", "check", deployment, "--superlink", address) == 1
            assert said in capsys.readouterr().out
        thread.join()


def certificate(since, until):
    """A certificate, signed by itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, since, until).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("since", "until", "status", "said"),
    [
        (-9, 9, 0, r"ok +\S+ holds until \S+: `certificates.sh` makes another"),
        (-9, -1, 1, r"MISSING +\S+ has held until \S+: `certificates.sh`"),
        (1, 99, 1, r"MISSING +\S+ holds from .* on, and here it is .*: set this machine's clock"),
    ],
)
def test_until_when_a_certificate_holds_is_said_before_it_is_too_late(tmp_path, capsys, since, until, status, said):
    (tmp_path / "certificates").mkdir()
    days = (datetime.now(UTC) + timedelta(days=number) for number in (since, until))
    (tmp_path / "certificates" / "ca.crt").write_bytes(certificate(*days))
    assert command("deploy", "check", tmp_path) == status
    assert re.search(said, capsys.readouterr().out)


def test_damaged_images_are_named_before_the_run_waits_for_them(deployment, tmp_path, capsys):
    whole = picture(tmp_path / "b" / "no" / "0.png")
    (tmp_path / "b" / "no" / "1.png").write_bytes(whole.read_bytes()[:60])
    words = ["--client", "hospital_b", "--images", tmp_path / "b"]
    assert command("deploy", "check", deployment, *words) == 0
    assert command("deploy", "check", deployment, *words, "--read") == 1
    assert f"MISSING  {tmp_path / 'b' / 'no' / '1.png'} is not a readable image" in capsys.readouterr().out


class Machine:
    """Runs scripts with a folder of their own, and with programs in the place of Flower's."""

    def __init__(self, folder):
        self.folder = folder
        self._path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        (folder / "bin").mkdir(parents=True)

    def program(self, name, text):
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def script(self, name, *words, **environment):
        """The status with which a script ends, and what it says."""
        kept = {k: v for k, v in os.environ.items() if k not in ("FLWR_HOME", "FEDUNLEARN_HOME", "NODE_CONFIG")}
        kept |= {"PATH": self._path, **environment}
        about = {"cwd": self.folder, "env": kept, "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(["sh", SCRIPTS / name, *map(str, words)], **about)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "a machine")


@pytest.mark.parametrize("name", ["key.sh", "register.sh", "run.sh", "supernode.sh"])
def test_a_script_that_is_called_without_words_says_how_it_is_called(machine, name):
    status, said = machine.script(name)
    assert (status, f"#   {name} " in said) == (2, True)


def test_a_supernode_that_lacks_something_is_not_started_and_says_what(machine):
    machine.program("flower-supernode", "echo started")
    status, said = machine.script("supernode.sh", "hospital_b", "data/b")
    assert (status, "started" in said) == (1, False), said
    for reason in ("ca.crt is not here", "`key.sh hospital_b` makes it", f"no absolute path: {machine.folder}/data/b?"):
        assert reason in said


def test_a_superlink_without_certificates_is_not_started_and_says_what_makes_them(machine):
    machine.program("flower-superlink", "echo started")
    status, said = machine.script("superlink.sh")
    assert (status, "started" in said, "certificates.sh" in said) == (1, False, True)


def test_keys_after_one_that_is_refused_are_registered_all_the_same(machine):
    machine.program(
        "flwr", 'case $3 in old*) echo already in use; exit 1;; bad*) echo no key; exit 1;; esac; echo "$3 is in"'
    )
    status, said = machine.script("register.sh", "old.pub", "new.pub")
    assert (status, "old.pub was registered before" in said, "new.pub is in" in said) == (0, True, True)
    status, said = machine.script("register.sh", "bad.pub", "new.pub")
    assert (status, "bad.pub is not registered: no key" in said, "new.pub is in" in said) == (1, True, True)


def test_settings_reach_a_run_as_they_were_typed_and_its_failure_is_the_scripts(machine):
    listed = """case $1 in
run) echo "Successfully started run 7"; eval "last=\\${$#}"; cp "$last" seen.toml ;;
ls) echo "{\\"runs\\": [{\\"run-id\\": \\"7\\", \\"status\\": \\"finished:$ENDED\\"}]}" ;;
esac"""
    machine.program("flwr", listed)
    words = ["data.root=/srv/held out", r"""partition.names=["St. Mary's", 'C:\b']"""]
    for ended, status in (("completed", 0), ("failed", 1)):
        assert machine.script("run.sh", *words, DEPLOYMENT="own", ENDED=ended)[0] == status
    settings = tomllib.loads((machine.folder / "seen.toml").read_text())
    assert settings == {"overrides": f"data.name=folder partition.kind=nodes {' '.join(words)}"}
    assert (
        f'root-certificates = "{machine.folder}/own/' in (machine.folder / "own" / "flwr" / "config.toml").read_text()
    )


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
