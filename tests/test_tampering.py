"""Whoever changes a run's files without its key is found out, by every command and by the next start."""

import hashlib
import json
import shutil
import sqlite3

import pytest

from command_line import command
from fedunlearn.errors import UserError
from fedunlearn.runs import keys, merkle
from fedunlearn.runs.events import Head, TamperedError
from fedunlearn.runs.keys import new_key
from fedunlearn.runs.ledger import Ledger


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A state folder with a run in which two requests were filed, and what it was before the second of them."""
    home = tmp_path_factory.mktemp("home")
    ledger = Ledger(home / "runs" / "one" / "ledger.sqlite")
    ledger.keep_examples({0: 10, 1: 20, 2: 30})
    ledger.commit(1, "round-00001.safetensors", "11")
    (first,) = ledger.file([1])
    ledger.advance(first, "REFUSED", reason="no")
    shutil.copytree(home / "runs", home / "earlier")
    ledger.file([2])
    ledger.commit(2, "round-00002.safetensors", "22")
    ledger.close()
    return home


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def sql(*statements):
    """Somebody changes the ledger with SQLite."""

    def tamper(place):
        with sqlite3.connect(place / "runs" / "one" / "ledger.sqlite") as db:
            for statement in statements:
                db.execute(statement)
        db.close()

    return tamper


def rewritten(place):
    """Another key signs another history, without a gap."""
    with sqlite3.connect(place / "runs" / "one" / "ledger.sqlite") as db:
        rows = db.execute("SELECT number, at, event FROM events ORDER BY number").fetchall()
        db.execute("DELETE FROM events")
    db.close()
    key = new_key(folder=place / "keys")
    private, leaves, signed = keys.load(keys.file_of(place / "keys", key)), [], []
    for number, at, event in rows:
        text = event.replace("[2]", "[0]") if number > 1 else json.dumps(json.loads(event) | {"key": key})
        leaves.append(merkle.leaf(f"{at}\n{text}".encode()))
        head = Head(key=key, size=number, root=merkle.root(leaves).hex())
        signed.append((number, at, text, keys.signature_of(private, b"event of a " + head.message)))
    with sqlite3.connect(place / "runs" / "one" / "ledger.sqlite") as db:
        db.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", signed)
    db.close()


def rolled_back(place):
    shutil.rmtree(place / "runs")
    (place / "earlier").rename(place / "runs")


def removed(place):
    (place / "runs" / "one" / "ledger.sqlite").unlink()


def emptied(place):
    (place / "runs" / "one" / "ledger.sqlite").write_bytes(b"")


def swapped(place):
    other = Ledger(place / "runs" / "two" / "ledger.sqlite")
    other.commit(1, "round-00001.safetensors", "11")
    other.close()
    shutil.copy(place / "runs" / "two" / "ledger.sqlite", place / "runs" / "one" / "ledger.sqlite")


def head_changed(place):
    file = place / "heads" / "one.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": 1}))


def cut_with_a_head(place):
    """Cut, and the head outside made of what is left: of the signature of its last event."""
    with sqlite3.connect(place / "runs" / "one" / "ledger.sqlite") as db:
        db.execute("DELETE FROM events WHERE number > 3")
        rows = db.execute("SELECT at, event, signature FROM events ORDER BY number").fetchall()
    db.close()
    root = merkle.root([merkle.leaf(f"{at}\n{event}".encode()) for at, event, _ in rows]).hex()
    file = place / "heads" / "one.json"
    key = json.loads(file.read_text())["key"]
    file.write_text(json.dumps({"key": key, "size": 3, "root": root, "signature": rows[-1][2]}))


def head_garbled(place):
    (place / "heads" / "one.json").write_text("{")


def head_of(size, *, is_signed):
    """Cut, and the head outside says so much, signed with a key of whoever did it, or not at all."""

    def tamper(place):
        sql("DELETE FROM events WHERE number > 3")(place)
        key = new_key(folder=place / "others") if is_signed else ""
        message = f"fedunlearn ledger\n{key}\n{size}\n{merkle.root([]).hex()}\n".encode()
        signature = keys.signature_of(keys.load(keys.file_of(place / "others", key)), message) if key else ""
        said = {"key": key, "size": size, "root": merkle.root([]).hex(), "signature": signature}
        (place / "heads" / "one.json").write_text(json.dumps(said))

    return tamper


LAST = "(SELECT max(number) FROM events)"
KINDS = {
    "an event's text": sql("""UPDATE events SET event = replace(event, '"clients": [1]', '"clients": [0]')"""),
    "an event's time": sql("UPDATE events SET at = replace(at, '2026', '2025') WHERE number = 3"),
    "the last event's text": sql(f"UPDATE events SET event = replace(event, '22', '33') WHERE number = {LAST}"),
    "the order of two": sql(
        "UPDATE events SET number = 100 WHERE number = 3", "UPDATE events SET number = 3 WHERE number = 4",
        "UPDATE events SET number = 4 WHERE number = 100"),
    "an event removed": sql("DELETE FROM events WHERE number = 4"),
    "an event removed, others renumbered": sql(
        "DELETE FROM events WHERE number = 4", "UPDATE events SET number = -number WHERE number > 4",
        "UPDATE events SET number = -number - 1 WHERE number < 0"),
    "the last event removed": sql(f"DELETE FROM events WHERE number = {LAST}"),
    "the last four removed": sql(f"DELETE FROM events WHERE number > {LAST} - 4"),
    "all events removed": sql("DELETE FROM events"),
    "a request forged": sql(
        """INSERT INTO events SELECT number + 1, at, '{"request": "r3", "state": "RECEIVED", "clients": [0]}',
        signature FROM events ORDER BY number DESC LIMIT 1"""),
    "a state forged": sql(
        f"""INSERT INTO events VALUES ({LAST} + 1, '2026', '{{"request": "r2", "state": "COMPLETED"}}', '00')"""),
    "an event that is no JSON": sql(f"INSERT INTO events VALUES ({LAST} + 1, '2026', 'a', 'b')"),
    "an event repeated": sql("INSERT INTO events SELECT number + 1, at, event, signature FROM events "
                             "ORDER BY number DESC LIMIT 1"),
    "a signature": sql(f"UPDATE events SET signature = '{'0' * 128}' WHERE number = {LAST}"),
    "the key": sql("UPDATE events SET event = replace(event, '\"key\": \"', '\"key\": \"00') WHERE number = 1"),
    "a whole history with another key": rewritten,
    "the run's folder put back": rolled_back,
    "the ledger removed": removed,
    "the ledger emptied": emptied,
    "another run's ledger": swapped,
    "a signature that is no text": sql(f"UPDATE events SET signature = x'00' WHERE number = {LAST}"),
    "a number for a signature": sql(f"UPDATE events SET signature = 5 WHERE number = {LAST}"),
    "bytes for a time": sql("UPDATE events SET at = x'30' WHERE number = 3"),
    "bytes for an event": sql("UPDATE events SET event = x'7b7d' WHERE number = 3"),
    "a number for the key": sql("""UPDATE events SET event = '{"key": 5, "ledger": 2}' WHERE number = 1"""),
    "a key that is no text": sql(r"""UPDATE events SET event = '{"key": "\ud800", "ledger": 2}' WHERE number = 1"""),
    "a list for the key": sql("""UPDATE events SET event = '{"key": ["a"], "ledger": 2}' WHERE number = 1"""),
    "an event nested too deep": sql(f"UPDATE events SET event = '{'[' * 200_000}' WHERE number = 3"),
    "a number too large": sql("""UPDATE events SET event = '{"examples": {"1e400": 1e400}}' WHERE number = 3"""),
    "an event that is a list": sql("""UPDATE events SET event = '["ledger", "request"]' WHERE number = 3"""),
    "the head outside": head_changed,
    "the last events, and the head outside": cut_with_a_head,
    "the head outside, no JSON": head_garbled,
    "the last events, and an empty head": head_of(0, is_signed=False),
    "the last events, and an empty head of another key": head_of(0, is_signed=True),
    "the last events, and a head of less than none": head_of(-1, is_signed=True),
    "the last events, and an unsigned head": head_of(3, is_signed=False),
    "the last events, and a head of another key": head_of(3, is_signed=True),
    "the last events, and an unsigned head of more": head_of(10**30, is_signed=False),
}  # fmt: skip


@pytest.mark.parametrize("tamper", KINDS.values(), ids=KINDS.keys())
def test_a_changed_ledger_is_not_read_and_not_written(place, tamper):
    tamper(place)
    ledger = Ledger(place / "runs" / "one" / "ledger.sqlite")
    events = ledger._db.rows("SELECT count(*) FROM events")
    for use in (ledger.requests, ledger.current, ledger.head, ledger.events, lambda: ledger.file([0])):
        with pytest.raises(TamperedError, match="put back a copy") as found:
            use()
        assert "\n" not in str(found.value)
    assert ledger._db.rows("SELECT count(*) FROM events") == events
    ledger.close()


def test_a_change_while_the_ledger_is_open_shows_too(place):
    ledger = Ledger(place / "runs" / "one" / "ledger.sqlite")
    assert len(ledger.requests()) == 2
    sql(f"DELETE FROM events WHERE number = {LAST}")(place)
    with pytest.raises(TamperedError, match="events were removed"):
        ledger.requests()
    ledger.close()


def test_what_is_as_it_was_written_is_read(place):
    ledger = Ledger(place / "runs" / "one" / "ledger.sqlite")
    assert [(r.clients, r.state) for r in ledger.requests()] == [([1], "REFUSED"), ([2], "RECEIVED")]
    assert ledger.signed_head() == ledger.kept_head()
    ledger.close()


def test_where_the_head_outside_is_gone_the_ledger_itself_says_so_for_good(place):
    """Whoever cuts the ledger and removes the head is not found out at once, but verify names it ever after."""
    sql(f"DELETE FROM events WHERE number > {LAST} - 2")(place)
    (place / "heads" / "one.json").unlink()
    ledger = Ledger(place / "runs" / "one" / "ledger.sqlite")
    before = len(ledger.events())
    assert ledger.kept_head() is None
    ledger.file([0])
    assert ledger.signed_head() == ledger.kept_head()
    assert ledger.unwitnessed() == [before]
    ledger.close()


@pytest.mark.parametrize("left", [1, 2, 3, 4])
def test_a_ledger_that_was_cut_to_its_beginning_says_so_too_where_the_head_is_gone(place, left):
    sql(f"DELETE FROM events WHERE number > {left}")(place)
    (place / "heads" / "one.json").unlink()
    ledger = Ledger(place / "runs" / "one" / "ledger.sqlite")
    assert ledger.kept_head() is None
    ledger.file([0])
    assert ledger.unwitnessed() == [left]
    ledger.close()


def begun_without_a_word(path):
    """Whether a new run makes its first events, and nothing was amiss."""
    ledger = Ledger(path)
    ledger.begin_anew()
    ledger.commit(1, "round-00001.safetensors", "11")
    is_quiet = ledger.unwitnessed() == [] and ledger.signed_head() == ledger.kept_head()
    ledger.close()
    return is_quiet


def test_a_new_run_that_was_killed_at_its_first_events_begins_anew(tmp_path, monkeypatch):
    """Killed right before they are final, or right after."""
    for name, is_final in (("before", False), ("after", True)):
        path = tmp_path / "runs" / name / "ledger.sqlite"
        ledger = Ledger(path)
        ledger.commit(0, "round-00000.safetensors", "00")
        ledger.close()
        if not is_final:
            with sqlite3.connect(path) as db:
                db.execute("DELETE FROM events")
            db.close()
        assert begun_without_a_word(path)


def test_where_the_first_events_fail_the_same_process_may_try_again(tmp_path):
    path = tmp_path / "runs" / "one" / "ledger.sqlite"
    ledger = Ledger(path)

    def fail():
        with ledger.transaction():
            ledger.record(one=1)
            raise KeyboardInterrupt

    def full(*about):
        raise OSError(28, "full")

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fail()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedunlearn.runs.files.os.replace", full)
        with pytest.raises(UserError, match="full"):
            ledger.commit(1, "round-00001.safetensors", "11")
    assert ledger.events() == []
    ledger.close()
    assert begun_without_a_word(path)


def test_a_copy_is_as_witnessed_as_what_it_is_a_copy_of(place):
    for is_witnessed, name in ((True, "two"), (False, "three")):
        ledger, copy = (Ledger(place / "runs" / run / "ledger.sqlite") for run in ("one", name))
        before = len(ledger.events())
        ledger.copy_to(copy)
        assert copy.unwitnessed() == ([] if is_witnessed else [before])
        (place / "heads" / "one.json").unlink(missing_ok=True)
        ledger.close()
        copy.close()


def test_where_a_commit_fails_nothing_was_filed(place):
    """Somebody reads with a transaction of his own, as a backup does."""
    ledger = Ledger(place / "runs" / "one" / "ledger.sqlite")
    filed = len(ledger.requests())
    with sqlite3.connect(place / "runs" / "one" / "ledger.sqlite", isolation_level=None) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchall()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedunlearn.runs.database.LOCKED_SECONDS", 0)
            with pytest.raises(UserError, match="locked"):
                ledger.file([0])
        assert len(ledger.requests()) == filed
        reader.execute("COMMIT")
    reader.close()
    ledger.file([0])
    assert len(ledger.requests()) == filed + 1
    ledger.close()


def test_a_clock_that_goes_back_leaves_times_in_order(place, monkeypatch):
    ledger = Ledger(place / "runs" / "one" / "ledger.sqlite")
    monkeypatch.setattr("fedunlearn.runs.events.now", lambda: "2020-01-01T00:00:00.000+00:00")
    ledger.file([0])
    times = [event["at"] for event in ledger.events()]
    assert times == sorted(times)
    ledger.close()


def test_an_event_between_the_note_of_new_settings_and_their_file_is_no_tampering(federate):
    """The process was killed there, and then somebody asked for something."""
    federate("rounds=1")
    run = federate.run()
    run.ledger.keep_about("00")
    run.ledger.close()
    federate.run().ledger.file([3])
    federate("rounds=2")
    assert federate.run().ledger.current().round == 2


def test_a_fork_has_a_key_of_its_own_and_its_ledger_is_not_the_other_runs(federate):
    federate("rounds=1 run=base")
    federate("rounds=2 run=fork fork=base")
    base, fork = federate.run("base").ledger, federate.run("fork").ledger
    assert base.key != fork.key
    shutil.copy(federate.folder("fork") / "ledger.sqlite", federate.folder("base") / "ledger.sqlite")
    with pytest.raises(TamperedError):
        federate.run("base")


def test_a_crash_between_the_transaction_and_the_head_outside_is_no_tampering(place, monkeypatch):
    file = place / "heads" / "one.json"
    before = file.read_bytes()
    ledger = Ledger(place / "runs" / "one" / "ledger.sqlite")
    ledger.commit(3, "round-00003.safetensors", "33")
    file.write_bytes(before)
    ledger.close()
    again = Ledger(place / "runs" / "one" / "ledger.sqlite")
    assert again.current().round == 3
    again.commit(4, "round-00004.safetensors", "44")
    assert again.signed_head() == again.kept_head()
    again.close()


def test_a_changed_run_is_named_by_every_command_and_nothing_is_trained(federate, capsys):
    federate("rounds=2 forget.schedule={1:[3]}")
    folder = federate.folder()
    checkpoint = [hashlib.sha256(file.read_bytes()).digest() for file in (folder / "checkpoints").iterdir()]
    for file, change in (
        ("run.json", lambda text: text.replace('"seed": 0', '"seed": 1')),
        ("run.json", lambda text: text.replace('"name": "digits"', '"name": "mnist"')),
    ):
        original = (folder / file).read_text()
        assert change(original) != original
        (folder / file).write_text(change(original))
        for words in (
            ["forget", "--list", "--run", "test"],
            ["requests", "--run", "test"],
            ["report", "--run", "test"],
            ["run", "digits", "run=test", "--engine", "local"],
            ["forget", "--client", "1", "--run", "test", "--engine", "local"],
        ):
            assert command(*words) == 2
            assert f"{folder / file} is damaged, or not as this run wrote it" in capsys.readouterr().err
        (folder / file).write_text(original)
    assert [hashlib.sha256(file.read_bytes()).digest() for file in (folder / "checkpoints").iterdir()] == checkpoint
    (folder / "run.json").unlink()
    assert command("run", "digits", "run=test", "--engine", "local") == 2
    assert "run.json is missing" in capsys.readouterr().err


def test_a_run_of_a_name_that_was_removed_begins_anew(federate):
    federate("rounds=1")
    first = federate.run().ledger.head()
    shutil.rmtree(federate.folder())
    federate("rounds=1")
    assert federate.run().ledger.head().key != first.key
    (ended,) = (federate.home / "heads").glob("test.ended-*.json")
    assert json.loads(ended.read_text())["root"] == first.root
