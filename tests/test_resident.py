"""The process that stays on a machine between messages: one for many, and never one too many."""

import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Listener
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedunlearn.apps import resident
from fedunlearn.errors import UserError
from fedunlearn.runs.lock import holder, is_locked

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
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def there(folder):
    """The processes that live and listen."""
    return [int(holder(file.parent)) for file in folder.glob("*/socket") if is_locked(file.parent, patience=0)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the processes of a test are found; those that are left are ended."""
    with TemporaryDirectory() as short:
        monkeypatch.setenv("TMPDIR", short)
        yield tmp_path / "resident"
        for pid in there(tmp_path / "resident"):
            os.kill(pid, signal.SIGKILL)


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
    with pytest.raises(UserError, match="ended before they had answered"):
        ask(folder, "end")
    assert ask(folder) != first


def test_it_is_for_its_owner_alone(folder):
    ask(folder)
    (file,) = folder.glob("*/socket")
    for private in (folder, Path(file.read_text()).parent):
        assert (private.stat().st_mode & 0o077, private.owner()) == (0, Path.home().owner())


def test_it_ends_when_nobody_asks_or_whoever_asked_is_gone(folder):
    idle = ask(folder, idle=0.5)
    (file,) = folder.glob("*/socket")
    wait_until(lambda: not is_running(idle))
    assert not Path(file.read_text()).parent.exists()
    code = f"import sys; sys.path[:0] = {sys.path}; import test_resident as t; t.ask(t.Path({str(folder)!r}), 'wait')"
    asker = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: there(folder))
    (pid,) = there(folder)
    time.sleep(0.5)
    asker.kill()
    asker.wait()
    wait_until(lambda: not is_running(pid))


def test_it_ends_with_what_starts_apps_on_the_machine(folder):
    ask_once = f"import sys; sys.path[:0] = {sys.path}; import test_resident as t; t.ask(t.Path({str(folder)!r}))"
    code = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {ask_once!r}]); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: there(folder))
    (pid,) = there(folder)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(pid))
    ask(folder)
    assert len(list(folder.glob("*/"))) == 1


def test_one_that_cannot_start_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(resident.sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="does not start"):
        ask(folder)


def test_what_a_killed_one_has_left_keeps_nobody_waiting(folder):
    first = ask(folder)
    (file,) = folder.glob("*/socket")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not there(folder))
    with Listener() as silent, ThreadPoolExecutor(4) as pool:
        file.write_text(silent.address)
        (second,) = set(pool.map(lambda _: ask(folder), range(4), timeout=20))
    assert second != first


def test_whoever_asks_one_that_is_killed_meanwhile_is_answered_by_another(folder):
    first = ask(folder)
    os.kill(first, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        askers = [pool.submit(ask, folder, "x" * 10**7), pool.submit(ask, folder)]
        time.sleep(0.5)
        os.kill(first, signal.SIGKILL)
        (second,) = {asker.result(timeout=20) for asker in askers}
    assert second != first


def test_a_folder_that_others_can_write_to_is_not_used(folder):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UserError, match="others"):
        ask(folder)
    folder.chmod(0o700)
    link = folder.parent / "link"
    link.symlink_to(folder)
    with pytest.raises(UserError, match="others"):
        ask(link)
    assert not list(folder.iterdir())


def test_it_takes_no_modules_from_the_folder_where_it_is_started(folder, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('taken from a folder that anybody may write to')")
    monkeypatch.chdir(tmp_path)
    assert ask(folder)


def test_what_ends_other_programs_of_a_terminal_does_not_end_it(folder):
    pid = ask(folder)
    assert os.getpgid(pid) != os.getpgrp()


def test_errors_of_any_class_come_back(folder):
    with pytest.raises(UserError, match=r"^3 things$"):
        ask(folder, "fail in its own way")


def test_on_a_full_disk_one_that_is_there_answers(folder):
    first = ask(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        assert ask(folder) == first
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
