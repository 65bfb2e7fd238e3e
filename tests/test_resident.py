"""The process that stays on a machine between messages: one for many, and never one too many."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedunlearn.apps import resident
from fedunlearn.errors import UserError

APP = "node_app_of_tests:app"


def wait_until(holds, limit=20):
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(folder, what="", idle=60.0):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(RecordDict({"do": ConfigRecord({"what": what})}), 7, "query")
    message.metadata.__dict__["_message_id"] = "one"
    return resident.answer(message, Context(1, 7, {}, RecordDict(), {}), APP, folder, idle=idle).content["about"]["pid"]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def folder(tmp_path):
    """Where the processes of a test have their files; those that are left are ended."""
    yield tmp_path / "resident"
    for file in (tmp_path / "resident").glob("*.json"):
        os.kill(json.loads(file.read_text())["pid"], signal.SIGKILL)


def test_messages_that_come_at_once_or_later_find_the_same_process(folder):
    with ThreadPoolExecutor(4) as pool:
        first = set(pool.map(lambda _: ask(folder), range(4)))
    assert first == {ask(folder)}
    assert first != {os.getpid()}


def test_after_a_failure_it_answers_on_and_after_its_end_another_one_does(folder):
    first = ask(folder)
    with pytest.raises(UserError, match=r"^ValueError: no such thing$"):
        ask(folder, "fail")
    assert ask(folder) == first
    with pytest.raises(UserError, match="ended before it had answered"):
        ask(folder, "end")
    assert ask(folder) != first


def test_it_is_for_whoever_can_read_its_file_alone(folder):
    ask(folder)
    (file,) = folder.glob("*.json")
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises((AuthenticationError, EOFError, ConnectionError)):
        Client((resident.LOOPBACK, json.loads(file.read_text())["port"]), authkey=b"guessed").recv()
    ask(folder)


def test_it_ends_when_nobody_asks_or_whoever_asked_is_gone(folder):
    idle = ask(folder, idle=0.5)
    wait_until(lambda: not is_running(idle))
    assert not list(folder.glob("*.json"))
    code = f"import sys; sys.path[:0] = {sys.path}; import test_resident as t; t.ask(t.Path({str(folder)!r}), 'wait')"
    asker = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: list(folder.glob("*.json")))
    (file,) = folder.glob("*.json")
    pid = json.loads(file.read_text())["pid"]
    time.sleep(0.5)
    asker.kill()
    asker.wait()
    wait_until(lambda: not is_running(pid))


def test_it_ends_with_what_starts_apps_on_the_machine(folder):
    ask_once = f"import sys; sys.path[:0] = {sys.path}; import test_resident as t; t.ask(t.Path({str(folder)!r}))"
    code = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {ask_once!r}]); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: list(folder.glob("*.json")))
    (file,) = folder.glob("*.json")
    pid = json.loads(file.read_text())["pid"]
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(pid))
    assert not file.exists()


def test_one_that_cannot_start_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(resident.sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="does not start"):
        ask(folder)
