"""Receipts: what they say follows from the run; whoever changes one byte or one field of them is found out."""

import base64
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope

from command_line import command
from fedunlearn.errors import UserError
from fedunlearn.runs import keys, merkle, receipts
from fedunlearn.runs.events import Head, entry
from fedunlearn.runs.ledger import State
from fedunlearn.runs.statement import Event, Receipt, Told, content, told_by
from fedunlearn.runs.verifying import InvalidError, verified

WORDS = "rounds=3 forget.schedule={1:[3]} forget.gate=true forget.budget=1 evaluate_every=1"


@pytest.fixture
def run(federate):
    federate.shared(WORDS, name="one")
    run = federate.run("one")
    yield run
    run.ledger.close()


@pytest.fixture
def first(run):
    return run.folder / "receipts" / "r1.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Bytes of a receipt, made once; the properties below look at many changes of it."""
    from conftest import Federate
    from fedunlearn.runs.run import Run
    from local_grid import LocalGrid

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("FEDUNLEARN_HOME", str(home))
        patch.setattr("fedunlearn.apps.server_app.report.write", lambda *about, **words: Path())
        Federate(home, home)(WORDS, grid=LocalGrid(2))
    run = Run.opened(home / "runs" / "test")
    data, key = (run.folder / "receipts" / "r1.json").read_bytes(), run.ledger.keys
    run.ledger.close()
    return data, keys.file_of(key, json.loads(payload(data))["predicate"]["head"]["key"])


def payload(data):
    return base64.b64decode(json.loads(data)["payload"])


def resigned(data, change, key):
    """A receipt whose statement was changed, signed anew."""
    statement = json.loads(payload(data))
    change(statement)
    return receipts.as_file(receipts.sign(Envelope(rfc8785.dumps(statement), receipts.PAYLOAD_TYPE, {}), key))


def test_a_receipt_says_what_the_ledger_knows(run, first):
    (request,) = run.ledger.requests()
    receipt = verified(first.read_bytes(), key=run.ledger.key, log=run.folder / "ledger.sqlite")
    events = run.ledger.events()
    commits = [event for event in events if "checkpoint" in event]
    assert (receipt.request, receipt.clients, receipt.state) == ("r1", [3], "COMPLETED")
    assert receipt.received_at == request.received_at
    assert receipt.before.sha256 == next(c["sha256"] for c in commits if c["checkpoint"] == "round-00001.safetensors")
    assert receipt.after.sha256 == next(c["sha256"] for c in commits if c["checkpoint"] == "round-00001-r1.safetensors")
    figures = {one.of: (one.before, one.after) for one in receipt.figures}
    before, after = request.detail["before"], request.detail["after"]
    assert figures["held-out images"] == (before["test"]["class"], after["test"]["class"])
    assert figures["client 3"] == (before["forgotten"]["3"]["class"], after["forgotten"]["3"]["class"])
    assert receipt.gate["gap"] == request.detail["gate"]["gap"]
    assert receipt.examples == {"3": run.ledger.examples()[3]}
    assert receipt.rounds == 1
    assert receipt.asked_by == "forget.schedule"
    assert [step.state for step in receipt.states] == ["RECEIVED", "COLLECTING", "APPLIED", "RECOVERING", "COMPLETED"]
    page = first.with_suffix(".html").read_text()
    assert receipt.after.sha256 in page
    assert "What this does not prove" in page


def test_it_says_nothing_about_single_other_clients(run, first):
    text = payload(first.read_bytes()).decode()
    for row in run.metrics():
        for client, scores in row.get("retain_clients", {}).items():
            if client == "3":
                continue
            assert f'"{client}":{{"class":{scores["class"]}' not in text.replace(" ", "").replace("\\", "")
    assert '\\"retain_clients\\": {}' in text


def test_after_further_rounds_a_further_receipt_is_written_and_the_first_stays(run, first):
    assert verified(first.read_bytes()).later is None
    second = verified((first.parent / "r1-2.json").read_bytes())
    last = run.metrics()[-1]
    assert second.later.round == last["round"] == 3
    assert second.later.figures["client 3"] == last["forgotten"]["3"]["class"]
    assert sorted(file.name for file in first.parent.glob("*.json")) == ["r1-2.json", "r1.json"]


def test_a_refused_and_a_cancelled_request_have_receipts_too(federate, home, capsys):
    with pytest.raises(UserError, match="request r1 is REFUSED"):
        federate("rounds=1 forget.schedule={0:[0,1,2,3]}")
    (refused,) = (federate.folder() / "receipts").glob("*.json")
    receipt = verified(refused.read_bytes())
    assert (receipt.state, receipt.reason, receipt.applied_at) == ("REFUSED", "no client would be left", None)
    federate.run().ledger.file([1])
    assert command("forget", "--run", "test", "--cancel", "r2") == 0
    assert verified((federate.folder() / "receipts" / "r2.json").read_bytes()).state == State.CANCELLED


def test_a_crash_before_the_receipt_is_written_leaves_it_to_the_next_start(federate, monkeypatch, capsys):
    def crash(*about, **words):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedunlearn.runs.receipts.write", crash)
        with pytest.raises(KeyboardInterrupt):
            federate("rounds=2 forget.schedule={1:[3]}")
    assert federate.requests()[0].state == State.COMPLETED
    assert command("verify", "--run", "test") == 1
    assert "wrong: request r1 is COMPLETED, and has no receipt of how it stands" in capsys.readouterr().out
    federate("rounds=2 forget.schedule={1:[3]}")
    assert command("verify", "--run", "test") == 0
    assert verified((federate.folder() / "receipts" / "r1.json").read_bytes()).state == State.COMPLETED


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_with_one_changed_byte_none_is_valid(sound, data):
    original, _ = sound
    place = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[place] = data.draw(st.integers(0, 255).filter(lambda value: value != original[place]))
    with pytest.raises(InvalidError):
        verified(bytes(changed))


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -100])
def test_cut_or_longer_none_is_valid(sound, cut):
    original, _ = sound
    for changed in (original[:cut], original + b"\n", b" " + original, b"[]", b"null", b"{}", b"\xff"):
        with pytest.raises(InvalidError):
            verified(changed)


def leaves_of(value, path=()):
    """The paths to all that a statement says."""
    if isinstance(value, dict) and value:
        for name, one in value.items():
            yield from leaves_of(one, (*path, name))
    elif isinstance(value, list) and value:
        for place, one in enumerate(value):
            yield from leaves_of(one, (*path, place))
    else:
        yield path


def changed_at(path):
    def change(statement):
        *groups, last = path
        for name in groups:
            statement = statement[name]
        old = statement[last]
        statement[last] = old + "0" if isinstance(old, str) else (old or 0) + 1 if isinstance(old, int | float) else 7

    return change


def test_with_one_changed_field_none_is_valid_whoever_signs(sound, tmp_path):
    """The run's own key does not help where the field follows from the ledger; another key never does."""
    data, key = sound
    keys.new_key(tmp_path / "other.pem")
    paths = list(leaves_of(json.loads(payload(data))))
    assert len(paths) > 150
    told = [path for path in paths if path[0] != "predicate" or path[1] in {*Told.model_fields, "events", "head"}]
    assert len(told) > 100
    for path in paths:
        with pytest.raises(InvalidError):
            verified(resigned(data, changed_at(path), tmp_path / "other.pem"))
    for path in told:
        with pytest.raises(InvalidError):
            verified(resigned(data, changed_at(path), key))


def test_what_is_signed_anew_unchanged_is_valid_and_another_key_is_named(sound, tmp_path):
    data, key = sound
    assert resigned(data, lambda statement: None, key) == data
    with pytest.raises(InvalidError, match="it is not signed with the key 00, but with"):
        verified(data, key="00")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["predicate"]["events"].pop(),
        lambda s: s["predicate"]["events"].reverse(),
        lambda s: s["predicate"]["events"].append(s["predicate"]["events"][-1]),
        lambda s: s["predicate"].update(events=[]),
        lambda s: s.update(subject=[]),
        lambda s: s["predicate"].update(more=1),
        lambda s: s["predicate"].pop("kept"),
        lambda s: s.update(predicate=None),
        lambda s: s["predicate"]["gate"].update(passed=False),
    ],
)
def test_parts_that_are_missing_moved_or_foreign_are_not_valid_even_with_the_runs_key(sound, change):
    data, key = sound
    with pytest.raises(InvalidError):
        verified(resigned(data, change, key))


def rewritten(data, key, change):
    """A receipt of another history of the same request: its events are others, of a ledger of their own, all signed."""
    statement = json.loads(payload(data))
    said = statement["predicate"]
    events = [(event["at"], json.loads(event["text"])) for event in said["events"]]
    for place, (at, event) in enumerate(events):
        events[place] = (change(event) or at, event)
    told = told_by((number, at, event) for number, (at, event) in enumerate(events, 1))
    texts = [(at, json.dumps(event, sort_keys=True)) for at, event in events]
    leaves, owner = [merkle.leaf(entry(*one)) for one in texts], keys.id_of(keys.load(key))
    head = Head(key=owner, size=len(leaves), root=merkle.root(leaves).hex())
    signature = keys.signature_of(keys.load(key), head.message)
    said |= told.model_dump() | {"head": head.model_copy(update={"signature": signature}).model_dump()}
    said["events"] = [
        {"number": n, "at": at, "text": text, "proof": [step.hex() for step in merkle.proof(leaves, n - 1)]}
        for n, (at, text) in enumerate(texts, 1)
    ]
    return receipts.signed(receipts.statement_of(Receipt.model_validate(said)), key)


def of_the_gate(change):
    """Changes what the gate says of the model."""
    return lambda event: change(event["gate"]) if "gate" in event else None


def only(**said):
    def change(gate):
        gate.clear()
        gate.update(said)

    return change


GATES = {
    "nothing": only(),
    "the verdict alone": only(passed=True, reason=""),
    "a refusal alone": only(passed=False, reason="the model is not finite"),
    "no errors": lambda gate: only(**{name: value for name, value in gate.items() if name != "errors"})(gate),
    "no errors and a refusal": lambda gate: gate.update(passed=False, reason="no") or gate.__delitem__("errors"),
    "errors that are a list": lambda gate: gate.update(errors=[]),
    "no figures of retain clients": lambda gate: gate.__delitem__("retain"),
    "one figure that is null": lambda gate: gate.update(passed=False) or gate["retain"].__setitem__(0, None),
    "text for figures": lambda gate: gate.update(retain="xy"),
    "a verdict that is a number": lambda gate: gate.update(passed=1),
}


@pytest.mark.parametrize("change", GATES.values(), ids=GATES.keys())
def test_where_the_gates_figures_are_missing_or_no_figures_none_is_valid_whoever_signs(sound, change):
    data, key = sound
    assert verified(rewritten(data, key, lambda event: None)).gate["passed"] is True
    with pytest.raises(InvalidError, match="gate"):
        verified(rewritten(data, key, of_the_gate(change)))


def test_a_gate_that_could_not_measure_a_figure_is_checked_all_the_same(sound):
    data, key = sound

    def unmeasured(gate):
        gate["gap"], gate["errors"]["gap"] = [None, None], [None, None]

    assert verified(rewritten(data, key, of_the_gate(unmeasured))).gate["gap"] == [None, None]


def with_times(zone=None, due=None):
    """Changes the times of all events, and when the request is due."""

    def change(event):
        if due and "due_at" in event:
            event["due_at"] = due
        return zone

    return change


@pytest.mark.parametrize(
    "change",
    [
        with_times(due="2026-12-29T11:14:07"),
        with_times(due="2026-12-29"),
        with_times(due="x"),
        with_times(zone="2026-11-29T11:14:07"),
        with_times(zone="2026-11-29T11:14:07", due="2026-12-29T11:14:07"),
        with_times(zone="x"),
    ],
)
def test_times_without_a_zone_or_that_are_none_are_not_valid(sound, change):
    data, key = sound
    with pytest.raises(InvalidError, match="its times are not sound"):
        verified(rewritten(data, key, change))


FORGED = "one, client 3: COMPLETED\nsigned with the run's key 00, as you asked\n\x1b[8m"


@pytest.mark.parametrize("name", [FORGED, "", "a b", "../a", "one\n"])
def test_a_receipt_of_a_run_or_a_request_that_is_no_name_is_not_valid(sound, name):
    data, key = sound

    def rename(event):
        if "request" in event:
            event["request"] = name

    for changed in (
        resigned(data, lambda s: s["predicate"].update(run=name), key),
        rewritten(data, key, rename),
    ):
        with pytest.raises(InvalidError, match="no name"):
            verified(changed)


def test_what_a_receipt_says_cannot_look_like_what_verify_says(sound, tmp_path, capsys):
    data, _ = sound
    key, file = tmp_path / "own.pem", tmp_path / "r1.json"
    keys.new_key(key)

    def rename(event):
        if "strategy" in event:
            event["strategy"] = FORGED

    changed = rewritten(data, key, rename)
    file.write_bytes(
        resigned(changed, lambda s: s["predicate"]["does_not_prove"].append("\x1b[2K\u202e" + FORGED), key)
    )
    assert command("verify", str(file)) == 0
    said = capsys.readouterr().out
    assert "\nsigned with the run's key 00" not in said
    assert not {"\x1b", "\u202e"} & set(said)
    assert r"COMPLETED\nsigned with the run's key 00, as you asked\n\x1b[8m" in said
    file.write_bytes(resigned(changed, lambda s: s["predicate"]["events"][1].update(at=FORGED), key))
    assert command("verify", str(file)) == 1
    file.write_bytes(resigned(data, lambda s: s["predicate"]["head"].update(key=FORGED), key))
    assert command("verify", str(file)) == 1
    said = capsys.readouterr().out
    assert "is not signed with the run's key one, client 3" in said
    assert "\x1b" not in said
    assert "\nsigned" not in said


def test_the_client_countersigns_and_both_signatures_count(first, tmp_path, capsys):
    own = keys.new_key(tmp_path / "client3.pem")
    assert command("keys", "sign", str(first), "--key", str(tmp_path / "client3.pem")) == 0
    signed = Path(capsys.readouterr().out.strip())
    assert verified(signed.read_bytes(), key=own).request == "r1"
    assert command("keys", "sign", str(signed), "--key", str(tmp_path / "client3.pem")) == 2
    assert command("verify", str(signed), "--key", own) == 0
    assert f"signed with a countersigner's key {own}, as you asked" in capsys.readouterr().out
    assert command("verify", "--run", "one") == 0
    content = json.loads(signed.read_bytes())
    for place in (0, 1):
        content["signatures"][place]["sig"] = base64.b64encode(b"0" * 64).decode()
        with pytest.raises(InvalidError):
            verified(rfc8785.dumps(content) + b"\n")
        content = json.loads(signed.read_bytes())
        content["signatures"][place]["more"] = 1
        with pytest.raises(InvalidError):
            verified(rfc8785.dumps(content) + b"\n")
        content = json.loads(signed.read_bytes())


def test_the_log_must_hold_the_events(run, first, federate):
    data = first.read_bytes()
    assert verified(data, log=run.folder / "ledger.sqlite")
    federate("rounds=1 run=other")
    for other in (federate.folder("other") / "ledger.sqlite", federate.home / "heads" / "other.json", first):
        with pytest.raises(InvalidError):
            verified(data, log=other)


def test_a_head_of_more_or_of_fewer_events_is_no_check_and_verify_says_so(run, first, tmp_path, capsys):
    head, file = verified(first.read_bytes()).head, tmp_path / "head.json"
    private = keys.load(keys.file_of(run.ledger.keys, run.ledger.key))

    def kept(size, root):
        other = head.model_copy(update={"size": size, "root": root})
        signature = keys.signature_of(private, other.message)
        file.write_text(other.model_copy(update={"signature": signature}).model_dump_json())
        return command("verify", str(first), "--log", str(file))

    assert kept(head.size, head.root) == 0
    assert kept(head.size, "00" * 32) == 1
    capsys.readouterr()
    for size in (head.size - 1, head.size + 1):
        assert kept(size, "00" * 32) == 2
        said = capsys.readouterr()
        assert "no head alone shows that" in said.err
        assert "is valid" not in said.out


def without(run, first, is_left_out, *, also=()):
    """A receipt that the run signs, with fewer events of the same ledger."""
    receipt = verified(first.read_bytes())
    numbers = [event.number for event in receipt.events if not is_left_out(content(event))]
    found, head = run.ledger.evidence(lambda events: [*numbers, *also])
    events = [Event(number=n, at=at, text=text, proof=proof) for n, at, text, proof in found]
    told = told_by((event.number, event.at, content(event)) for event in events)
    said = receipt.model_dump() | told.model_dump() | {"events": events, "head": head}
    return receipts.signed(
        receipts.statement_of(Receipt.model_validate(said)), keys.file_of(run.ledger.keys, run.ledger.key)
    )


def test_with_the_ledger_no_event_can_be_left_out_by_whoever_has_the_key(run, first, capsys):
    run.ledger.keep_purge(run.ledger.request("r1"), deleted=["all"], kept=[{"what": "a copy", "why": "it is needed"}])
    receipts.write_all(run)
    last, log = first.parent / "r1-3.json", run.folder / "ledger.sqlite"
    assert verified(last.read_bytes(), log=log).deleted == ["all"]
    assert command("verify", "--run", "one") == 0
    commits = [n for n, event in enumerate(run.ledger.events(), 1) if "checkpoint" in event]
    before = next(content(event) for event in verified(last.read_bytes()).events if "checkpoint" in event.text)
    for changed, why in (
        (without(run, last, lambda event: "purged" in event), "it leaves out event"),
        (without(run, last, lambda event: event == before, also=commits[:1]), "it leaves out event"),
        (without(run, last, lambda event: False, also=commits[:1]), "other events"),
    ):
        assert verified(changed, key=run.ledger.key).request == "r1"  # alone it cannot show that
        with pytest.raises(InvalidError, match=why):
            verified(changed, key=run.ledger.key, log=log)
        (first.parent / "r7.json").write_bytes(changed)
        assert command("verify", "--run", "one") == 1
        assert "r7.json: the ledger does not know it, and it " in capsys.readouterr().out


def test_that_a_model_was_refused_first_cannot_be_left_out(federate):
    federate("rounds=1")
    run = federate.run()
    (request,) = run.ledger.file([3])
    run.ledger.advance(request, State.COLLECTING)
    run.ledger.advance(request, State.QUARANTINED, reason="no", gate={"passed": False, "reason": "no"})
    run.ledger.accept("r1", by="somebody")
    run.ledger.advance(request, State.QUARANTINED, reason="no reply")
    (file,) = receipts.write_all(run)
    assert verified(file.read_bytes(), log=run.folder / "ledger.sqlite").reason == "no reply"
    first_try = iter(["COLLECTING", "QUARANTINED", ""])
    left_out = [next(first_try)]

    def is_of_the_first_try(event):
        is_next = event.get("state") == left_out[-1]
        if is_next:
            left_out.append(next(first_try))
        return is_next

    changed = without(run, file, is_of_the_first_try)
    assert [step.state for step in verified(changed).states] == ["RECEIVED", "COLLECTING", "QUARANTINED"]
    with pytest.raises(InvalidError, match="it leaves out event"):
        verified(changed, log=run.folder / "ledger.sqlite")
    run.ledger.close()


def test_verify_of_a_run_names_what_was_changed(run, first, capsys):
    assert command("verify", "--run", "one") == 0
    assert "are as they were written" in capsys.readouterr().out
    original = first.read_bytes()
    first.write_bytes((first.parent / "r1-2.json").read_bytes())  # valid, but not this one
    assert command("verify", "--run", "one") == 1
    assert f"wrong: {first}: it is not the one that was written" in capsys.readouterr().out
    first.unlink()
    assert command("verify", "--run", "one") == 1
    first.write_bytes(original)
    (first.parent / "r9.json").write_text("{}")
    assert command("verify", "--run", "one") == 1
    assert "r9.json: the ledger does not know it" in capsys.readouterr().out
    (first.parent / "r9.json").unlink()
    (first.parent / "r9.json").mkdir()
    assert command("verify", "--run", "one") == 1
    assert "r9.json: the ledger does not know it, and it cannot be read" in capsys.readouterr().out
    (first.parent / "r9.json").rmdir()
    first.unlink()
    first.mkdir()
    assert command("verify", "--run", "one") == 1
    assert f"{first} cannot be read (Is a directory)" in capsys.readouterr().out
    first.rmdir()
    first.write_bytes(original)
    (checkpoint,) = (run.folder / "checkpoints").iterdir()
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert command("verify", "--run", "one") == 1
    assert checkpoint.name in capsys.readouterr().out


def test_without_a_head_outside_verify_says_what_is_not_known(run, federate, capsys):
    shutil.rmtree(federate.home / "heads", ignore_errors=True)
    assert command("verify", "--run", "one") == 1
    assert "heads/one.json is missing: nobody can say whether events were cut off" in capsys.readouterr().out


def test_verify_needs_neither_torch_nor_flower(first):
    code = f"""
import sys
sys.argv = ["fedunlearn", "verify", {str(first)!r}]
from fedunlearn.cli import main
try:
    main()
finally:
    assert not {{"torch", "flwr", "ray"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "is valid: request r1 of run one, client 3: COMPLETED" in done.stdout
    assert "\nasked by " in done.stdout


def test_verify_of_a_run_looks_at_the_key_and_the_head_that_somebody_has_kept(run, federate, tmp_path, capsys):
    kept = tmp_path / "kept.json"
    kept.write_bytes((federate.home / "heads" / "one.json").read_bytes())
    run.ledger.file([1])
    assert command("verify", "--run", "one", "--key", run.ledger.key, "--log", str(kept)) == 0
    assert command("verify", "--run", "one", "--key", "0" * 64) == 1
    assert "the run's key is" in capsys.readouterr().out
    federate("rounds=1 run=other")
    assert command("verify", "--run", "other", "--log", str(kept)) == 1
    assert "does not continue" in capsys.readouterr().out
    assert command("verify", "--run", "one", "--key", "client3.pem") == 2
    (run.folder / "checkpoints" / "old.safetensors").write_bytes(b"")
    assert command("verify", "--run", "one") == 1
    assert "old.safetensors should not be there" in capsys.readouterr().out


def test_a_receipt_of_a_late_request_is_valid_and_says_that_it_is_late(federate, capsys):
    federate("rounds=1")
    run = federate.run()
    run.ledger.file([1], months=0)
    receipts.cancel(run, "r1")
    run.ledger.close()
    file = federate.folder() / "receipts" / "r1.json"
    assert verified(file.read_bytes()).is_late
    assert command("verify", str(file)) == 0
    assert "CANCELLED, LATE" in capsys.readouterr().out


def test_events_that_come_while_a_receipt_is_written_do_not_spoil_it(run, monkeypatch):
    packages = receipts.packages_sha256

    def meanwhile():
        run.ledger.write_down([1], "forget", "it is not signed")
        return packages()

    monkeypatch.setattr("fedunlearn.runs.receipts.packages_sha256", meanwhile)
    (request,) = run.ledger.requests()
    assert verified(receipts.write(run, request).read_bytes()).request == "r1"


def test_steps_of_two_requests_or_without_some_make_no_receipt(sound):
    data, key = sound
    for place in (1, 2, 3, 4):
        with pytest.raises(InvalidError):
            verified(resigned(data, lambda s, place=place: s["predicate"]["events"].pop(place), key))


def test_a_receipt_gives_away_neither_keys_nor_schedules_nor_paths(first):
    settings = verified(first.read_bytes()).settings
    assert (settings["forget"]["schedule"], settings["forget"]["keys"], settings["home"]) == ({}, {}, "")


def test_verify_ends_with_one_line_for_a_file_that_is_none(tmp_path, capsys):
    assert command("verify", str(tmp_path / "none.json")) == 2
    (tmp_path / "some.json").write_bytes(random.Random(0).randbytes(100))
    assert command("verify", str(tmp_path / "some.json")) == 1
    assert "is NOT valid: it is no envelope" in capsys.readouterr().out


def test_keys_are_never_overwritten_nor_readable_by_others(tmp_path, capsys):
    file = tmp_path / "client3.pem"
    assert command("keys", "new", str(file)) == 0
    key = capsys.readouterr().out.strip()
    assert file.stat().st_mode & 0o77 == 0
    assert command("keys", "new", str(file)) == 2
    assert command("keys", "id", str(file)) == 0
    assert capsys.readouterr().out.strip() == key


def test_who_asks_and_by_what_right_is_written_down_and_what_is_overdue_is_listed(run, capsys, federate):
    assert command("requests", "--run", "one", "--overdue") == 0
    run.request([1], by="Ms Example", right="Art. 17 GDPR")
    assert run.ledger.request("r2").detail["right"] == "Art. 17 GDPR"
    assert command("requests", "--run", "one", "--overdue") == 0
    run.ledger.file([2], months=0)
    assert command("requests", "--run", "one", "--overdue") == 1
    assert "r3  RECEIVED" in capsys.readouterr().out
    for state in (State.COLLECTING, State.APPLIED):  # in time, as far as anybody can say now
        assert len(run.ledger.overdue()) == 1
        run.ledger.advance(run.ledger.request("r3"), state)
    assert run.ledger.overdue() == []


def test_a_portion_took_part_in_the_rounds_of_its_client_before_the_request(federate):
    federate("rounds=2")
    assert (
        command("forget", "--run", "test", "--client", "1", "--class", "2", "strategy=leave", "--engine", "local") == 0
    )
    federate("rounds=3")
    run = federate.run()
    (request,) = run.ledger.requests()
    assert receipts._rounds(run, request) == 2
