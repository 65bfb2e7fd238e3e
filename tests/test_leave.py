"""`fedunlearn leave`: a client asks from its own machine, its node carries what it has signed, the server files it."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from command_line import command
from fedunlearn.errors import UserError
from fedunlearn.federation import messages, withdrawals
from fedunlearn.federation.requests import Requests
from fedunlearn.federation.withdrawals import MOST_SAID, RECORD, SIGNED, Withdrawals, believed
from fedunlearn.runs import keys, taking_part
from fedunlearn.runs.receipts import FOLDER
from fedunlearn.runs.signed import UnsignedError, read, sign
from fedunlearn.runs.taking_part import LONGEST, MOST, kept, noted
from fedunlearn.runs.verifying import verified
from local_grid import LocalGrid, asked
from test_nodes_of_their_own import NAMES, Machines, hospitals, public, supernodes, warnings  # noqa: F401
from test_owners import picture

OTHER_RUN = "ab" * 32


def written(file, key):
    """A private key as `ssh-keygen` writes it."""
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    file.write_bytes(key.private_bytes(*form))
    return file


class Hospitals:
    """Three hospitals with a key each, and what they can do on their own machines.

    Attributes:
        carry: by the place of a node, what it carries in place of what was asked there.
        while_training: called when a round asks a node to train, before that answers.
    """

    def __init__(self, run, keys, setting, folder, federate):
        self._run, self.keys, self.setting, self.folder, self.federate = run, keys, setting, folder, federate
        self.files = [written(folder / f"key_{name}", key) for name, key in zip(NAMES, keys, strict=True)]
        self.carry, self.while_training = {}, lambda round_: None
        self.machine = run.machine

    def __call__(self, words, machines=None):
        return self._run(words if "partition.keys" in words else f"{words} {self.setting}", machines, keys=self.keys)

    def home(self, place=1):
        return self.folder / f"at_{NAMES[place]}"

    def asked_files(self, place=1):
        return (self.home(place) / taking_part.FOLDER).glob("*-*.json")

    def leave(self, *words, place=1, key=None):
        about = ("--client", NAMES[place], "--key", key or self.files[place], "--home", self.home(place))
        return command("leave", *about, *words)

    def leave_unchecked(self, key):
        """Hospital b's machine carries what this key has signed, whatever the run will believe."""
        taking_part.keep(self.home(), sign([1], run=self.federate.run().ledger.key, key=key))

    def signed(self, place, number=None, **others):
        """What a hospital signs, with some values replaced and signed again."""
        run = others.pop("run", self.federate.run().ledger.key)
        asked = sign([place if number is None else number], run=run, key=self.files[place])
        asked = replace(asked, **others)
        return replace(asked, signature=keys.signature_of(self.keys[place], asked.message))


@pytest.fixture
def three(hospitals, supernodes, federate, tmp_path, monkeypatch):  # noqa: F811
    found = Hospitals(hospitals, *supernodes, tmp_path, federate)
    call = Machines.call

    def carrying(self, message):
        place, task = self.nodes[message.metadata.dst_node_id], messages.task_of(message)
        if task.name == "train":
            found.while_training(task.round)
        reply = call(self, message)
        if place in found.carry and reply.has_content():
            reply.content[RECORD] = found.carry[place]
        return reply

    monkeypatch.setattr(Machines, "call", carrying)
    return found


def listed(*texts):
    return ConfigRecord({SIGNED: [text if isinstance(text, str) else json.dumps(asdict(text)) for text in texts]})


# --- on the client's machine --------------------------------------------------------------------------------------


def test_a_machine_writes_down_for_whom_it_takes_part_in_which_run(three):
    three("rounds=1")
    for place, name in enumerate(NAMES):
        (one,) = noted(three.home(place))
        assert (one.run, one.clients) == (three.federate.run().ledger.key, {place: name})
    three("rounds=2")
    assert noted(three.home(2)) == [one]


def test_a_machine_with_several_clients_writes_all_of_them_down(hospitals, federate, tmp_path):  # noqa: F811
    for name in ("hospital_a", "hospital_c"):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "both" / name)
    both = hospitals.machine("hospital_c, hospital_a", tmp_path / "both", "both")
    hospitals("rounds=1", [both, hospitals.machine("hospital_b")])
    assert noted(tmp_path / "at_both")[0].clients == {0: "hospital_a", 2: "hospital_c"}


def test_in_a_simulation_nothing_is_written_down_and_messages_name_no_run(federate):
    grid = federate("rounds=1 strategy=leave")
    assert not (federate.home / taking_part.FOLDER).exists()
    assert {"run" in message.content["task"] for message in grid.sent} == {False}


def test_the_command_says_what_will_happen(three, capsys):
    three("rounds=1")
    capsys.readouterr()
    run = three.federate.run().ledger.key
    assert three.leave("--days", "3") == 0
    out = capsys.readouterr().out
    assert f"client hospital_b asks run {run[:12]} to be forgotten" in out
    assert keys.id_of(three.keys[1]) in out
    (asked_for,) = kept(three.home(), run)
    assert (asked_for.clients, asked_for.key, asked_for.run) == ([1], keys.id_of(three.keys[1]), run)
    assert f"until {asked_for.expires_at[:16]} UTC" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--client", "hospital_a"), "no client 'hospital_a' takes part from this machine: there is hospital_b"),
        (("--client", "1"), "no client '1' takes part"),
        (("--home", "/nowhere"), "this machine has taken part in no run (/nowhere)"),
        (("--key", "/nowhere/key"), "the private key /nowhere/key cannot be read"),
        (("--run", "zz"), "--run zz begins the keys of 0 runs, not of one: there are "),
        (("--run", "a"), "--run a begins the keys of 2 runs, not of one: there are "),
        (("--days", "1e9"), "in 0..36500 days"),
    ],
)
def test_what_cannot_be_asked_gets_one_line(supernodes, tmp_path, capsys, words, message):  # noqa: F811
    for run in (OTHER_RUN, "a1" * 32):
        taking_part.note(tmp_path, run, {1: "hospital_b"}, {})
    key = written(tmp_path / "key", supernodes[0][1])
    usual = {"--client": "hospital_b", "--key": key, "--home": tmp_path} | dict([words])
    assert command("leave", *(part for pair in usual.items() for part in pair)) == 2
    error = capsys.readouterr().err
    assert (message in error, error.count("\n")) == (True, 1)
    assert not kept(tmp_path, OTHER_RUN)


def test_all_runs_are_asked_or_the_one_that_is_named(supernodes, tmp_path):  # noqa: F811
    for number, run in enumerate((OTHER_RUN, "cd" * 32)):
        taking_part.note(tmp_path, run, {number: "hospital_b"}, {})
    key = written(tmp_path / "key", supernodes[0][1])
    about = ("leave", "--client", " hospital_b", "--key", key, "--home", tmp_path)
    assert command(*about, "--run", "CD") == 0
    assert kept(tmp_path, OTHER_RUN) == []
    assert command(*about) == 0
    assert [kept(tmp_path, run)[0].clients for run in (OTHER_RUN, "cd" * 32)] == [[0], [1]]


def test_a_key_that_the_run_will_not_believe_is_refused_on_the_machine(three, capsys):
    three("rounds=1")
    run = three.federate.run().ledger.key
    assert three.leave(key=three.files[2]) == 2
    right, wrong = keys.id_of(three.keys[1]), keys.id_of(three.keys[2])
    assert (
        f"for client hospital_b, believes the key {right[:16]}…, and --key has {wrong[:16]}…" in capsys.readouterr().err
    )
    assert kept(three.home(), run) == []
    assert three.leave() == 0


def test_who_signs_is_known_without_partition_keys_too(hospitals, supernodes, federate, tmp_path):  # noqa: F811
    hospitals("rounds=1", keys=supernodes[0])
    signers = [noted(tmp_path / f"at_{name}")[0].signers for name in NAMES]
    assert signers == [{place: keys.id_of(key)} for place, key in enumerate(supernodes[0])]
    hospitals("rounds=1 run=signed forget.signed=true", keys=supernodes[0])
    assert noted(tmp_path / "at_hospital_b")[-1].signers == {1: ""}
    about = ("--client", "hospital_b", "--home", tmp_path / "at_hospital_b", "--run", federate.run("signed").ledger.key)
    assert command("leave", *about, "--key", written(tmp_path / "key", supernodes[0][1])) == 2


@pytest.mark.parametrize("said", ["", "[]", "{", '{"b": "key"}', "1"])
def test_of_a_server_that_does_not_say_whom_it_believes_nothing_is_expected(three, said):
    three("rounds=1")
    task = messages.Task("{}", "identify", 0, [], run=OTHER_RUN, signers=said)
    assert withdrawals._signers_of(asdict(task)) == {}
    taking_part.note(three.home(), OTHER_RUN, {1: "hospital_b"}, {})
    assert three.leave("--run", OTHER_RUN, key=three.files[2]) == 0


def test_a_name_that_the_terminal_cannot_show_keeps_nobody_from_asking(supernodes, tmp_path):  # noqa: F811
    taking_part.note(tmp_path, OTHER_RUN, {1: "Süd, 病院"}, {})
    words = [
        "leave",
        "--client",
        "Su\u0308d, 病院",
        "--key",
        written(tmp_path / "key", supernodes[0][1]),
        "--home",
        tmp_path,
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "fedunlearn", *words], env=environment, timeout=120, capture_output=True
    )
    assert (done.returncode, b"client S\\xfcd, \\u75c5\\u9662 asks run" in done.stdout) == (0, True)


def test_what_root_has_asked_can_be_read_by_the_user_of_the_supernode(supernodes, tmp_path):  # noqa: F811
    key = written(tmp_path / "key", supernodes[0][1])
    assert taking_part.keep(tmp_path, sign([1], run=OTHER_RUN, key=key)).stat().st_mode & 0o044 == 0o044


def test_what_has_expired_or_is_damaged_is_not_carried_and_the_newest_is_first(supernodes, tmp_path, caplog):  # noqa: F811
    key = written(tmp_path / "key", supernodes[0][1])
    taking_part.note(tmp_path, OTHER_RUN, {1: "hospital_b"}, {})
    for client, days in ((4, 0), (5, 1), (6, 2)):
        taking_part.keep(tmp_path, sign([client], run=OTHER_RUN, key=key, days=days))
    for name, content in ((f"{OTHER_RUN}-7.json", "{}"), (f"{'cd' * 32}.json", "[1"), ("other.json", "1")):
        (tmp_path / taking_part.FOLDER / name).write_text(content)
    assert [one.clients for one in kept(tmp_path, OTHER_RUN)] == [[6], [5]]
    assert [one.run for one in noted(tmp_path)] == [OTHER_RUN]
    assert f"{'cd' * 32}.json cannot be read" in caplog.text


def test_a_run_whose_name_is_a_path_is_not_written_down(three, tmp_path):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = messages.request(messages.Task("{}", "identify", 0, [], run=f"../{OTHER_RUN}"), {})
    context = type("Context", (), {"node_config": three.machine("hospital_b")})
    answered = Message(RecordDict(), 1, "query")
    assert withdrawals.carried(Message(message, 1, "query"), context, lambda *about: answered) is answered
    assert (dict(answered.content), list(tmp_path.rglob(f"*{OTHER_RUN}*"))) == ({}, [])


def test_where_nothing_can_be_written_down_replies_go_out_all_the_same(three, warnings):  # noqa: F811
    three.home().mkdir()
    (three.home() / taking_part.FOLDER).write_text("a file")
    three("rounds=1")
    assert "what this machine's clients have signed cannot be carried" in warnings()
    assert three.federate.run().metrics()[-1]["clients"] == [0, 1, 2]


def test_what_runs_on_the_node_for_it_needs_no_torch():
    code = "import sys, fedunlearn.federation.withdrawals, fedunlearn.leave; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_on_the_node_what_a_person_can_put_right_is_logged_in_one_line_and_all_else_in_full():
    code = """
import logging, sys, fedunlearn.apps.node_app
from fedunlearn.errors import UserError
for error in (UserError("no such folder"), KeyError("ours")):
    logging.getLogger("flwr").error("it has failed", exc_info=error)
"""
    said = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    out = said.stdout + said.stderr
    assert ("no such folder" in out, "UserError" in out, "KeyError: 'ours'" in out) == (True, False, True)


# --- from its reply to its receipt --------------------------------------------------------------------------------


def test_a_client_that_asked_on_its_machine_is_forgotten_at_the_next_boundary(three, warnings):  # noqa: F811
    three("rounds=1")
    assert three.leave() == 0
    (asked_for,) = kept(three.home(), three.federate.run().ledger.key)
    grid = three("rounds=2")
    (request,) = three.federate.requests()
    assert (request.state, request.clients, request.detail["round"]) == ("COMPLETED", [1], 1)
    assert (request.detail["asked_by"], request.detail["signed"]) == ("fedunlearn leave", asdict(asked_for))
    assert three.federate.run().metrics()[-1]["clients"] == [0, 2]
    assert warnings().count("Client hospital_b asks from its own machine to be forgotten: request r1") == 1
    assert "is not filed" not in warnings()
    receipt = verified((three.federate.folder() / FOLDER / "r1.json").read_bytes())
    assert asked_for.signature in receipt.events[1].text
    assert ("train", 1) not in asked(grid)
    node = list(three("rounds=3").nodes)[1]
    assert node not in {message.metadata.dst_node_id for message in three("rounds=4").sent}
    assert len(three.federate.requests()) == 1


def test_a_run_that_cannot_hear_it_any_more_says_how_it_forgets_the_client_too(three, warnings):  # noqa: F811
    three("rounds=1")
    three("run=other fork=test rounds=2")
    assert three.leave() == 0
    three("rounds=2")
    three("run=other rounds=3")
    assert three.federate.requests("other") == []
    hint = "`fedunlearn forget --client hospital_b --run=other` has this run forget it too"
    assert f"(run test (request r1)): {hint}" in warnings()
    assert command("forget", "--run", "other", "--client", "hospital_b") == 0
    three("run=other rounds=4")
    assert [(r.state, r.clients) for r in three.federate.requests("other")] == [("COMPLETED", [1])]


def test_a_live_run_takes_it_after_the_round_in_which_it_was_asked(three):
    three.while_training = lambda round_: three.leave() if round_ == 2 and not list(three.asked_files()) else None
    three("rounds=3")
    (request,) = three.federate.requests()
    assert (request.state, request.detail["round"]) == ("COMPLETED", 2)
    rows = [row["clients"] for row in three.federate.run().metrics() if row["kind"] == "round"]
    assert rows == [[0, 1, 2], [0, 1, 2], [0, 2]]


def test_what_is_asked_while_another_request_is_applied_is_filed_before_the_run_ends(three, monkeypatch):
    three("rounds=1")
    assert three.leave() == 0
    apply = Requests._apply

    def meanwhile(self, request, meant):
        found = apply(self, request, meant)
        if request.clients == [1]:
            asked_for = three.signed(2)
            self._federation.nodes.withdrawals._texts = {list(self._federation.nodes.nodes)[2]: [text_of(asked_for)]}
        return found

    monkeypatch.setattr(Requests, "_apply", meanwhile)
    three("rounds=1")
    assert [(r.state, r.clients) for r in three.federate.requests()] == [("COMPLETED", [1]), ("COMPLETED", [2])]


def text_of(asked_for):
    return json.dumps(asdict(asked_for))


def test_a_server_that_ends_before_it_files_loses_nothing(three, monkeypatch):
    three("rounds=1")
    assert three.leave() == 0
    with monkeypatch.context() as patched:
        patched.setattr(Requests, "file_carried", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            three("rounds=2")
    assert three.federate.requests() == []
    three("rounds=2")
    assert [request.state for request in three.federate.requests()] == ["COMPLETED"]


def test_asked_twice_is_one_request(three, warnings):  # noqa: F811
    three("rounds=1")
    three.federate.run().request([1])
    assert (three.leave(), three.leave()) == (0, 0)
    three("rounds=2")
    assert [(r.id, r.state) for r in three.federate.requests()] == [("r1", "COMPLETED")]
    assert "request r1, which is RECEIVED" in warnings()
    run = three.federate.run()
    assert len(run.ledger.nonces()) == 1
    assert [event["asked_again"] for event in run.ledger.events() if "asked_again" in event] == [[1]]


def test_a_client_that_signs_anew_all_the_time_is_heard_once_a_round(three, monkeypatch):
    three("rounds=1")

    def anew(self, request, meant):
        node = list(self._federation.nodes.nodes)[1]
        self._federation.nodes.withdrawals._texts = {node: [text_of(three.signed(1)) for _ in range(MOST)]}
        return self._not_taken(request, {"passed": False, "reason": "it knows too little"})

    monkeypatch.setattr(Requests, "_apply", anew)
    assert three.leave() == 0
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        three("rounds=2")
    events = three.federate.run().ledger.events()
    assert [event["request"] for event in events if event.get("state") == "RECEIVED"] == ["r1", "r2"]
    assert not [event for event in events if "asked_again" in event]


def test_the_same_in_other_characters_is_the_same(three):
    three("rounds=1")
    one = text_of(three.signed(1))
    three.carry[1] = listed(one, f" {one}")
    three("rounds=2")
    assert [r.state for r in three.federate.requests()] == ["COMPLETED"]


def test_a_machine_that_is_left_out_since_its_images_have_changed_may_still_ask(three, tmp_path, warnings):  # noqa: F811
    three("rounds=1")
    assert three.leave() == 0
    picture(tmp_path / "hospital_b" / "no" / "new.png", 999)
    three("rounds=2")
    assert "client hospital_b has other images than when the run began" in warnings()
    assert [(r.state, r.clients) for r in three.federate.requests()] == [("COMPLETED", [1])]


def test_without_keys_in_the_settings_the_key_that_the_superlink_knows_counts(hospitals, three, warnings):  # noqa: F811
    hospitals("rounds=1", keys=three.keys)
    three.leave_unchecked(three.files[2])
    hospitals("rounds=2", keys=three.keys)
    assert warnings().count("its key is not that of client hospital_b") == 1
    assert three.federate.requests() == []
    assert three.leave() == 0
    hospitals("rounds=3", keys=three.keys)
    assert [request.state for request in three.federate.requests()] == ["COMPLETED"]


# --- what is not believed -----------------------------------------------------------------------------------------


def test_nothing_is_filed_of_what_is_not_right_and_it_is_said_once(three, warnings):  # noqa: F811
    three("rounds=1")
    right, of_another = three.signed(1), three.signed(2)
    three.carry = {
        0: listed(right, "garbage"),  # by another node
        1: listed(
            replace(right, signature=of_another.signature),
            three.signed(1, run=OTHER_RUN),
            replace(three.signed(2, 1), key=of_another.key),
            three.signed(1, expires_at="2026-01-01T00:00:00+00:00"),
            three.signed(1, action="cancel r1"),
        ),
        2: MetricRecord({"signed": 1}),
    }
    three("rounds=3")
    assert three.federate.requests() == []
    assert [row["clients"] for row in three.federate.run().metrics()] == [[0, 1, 2]] * 3
    for reason in (
        "it is about client hospital_b, for whom this node does not speak",
        "this is no signed request",
        "its signature is not valid",
        "it was signed for another run",
        "its key is not that of client hospital_b",
        "it has expired on 2026-01-01",
        "what was signed is to cancel r1 clients [hospital_b]",
        "it is no list of signed requests",
    ):
        assert warnings().count(reason) == 1, reason
    assert not [event for event in three.federate.run().ledger.events() if "turned_away" in event]


def answer(record):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    found = Message(RecordDict({"task": ConfigRecord({})}), 7, "query")
    return Message(RecordDict({"metrics": MetricRecord({}), RECORD: record}), reply_to=found)


@pytest.mark.parametrize(
    "record",
    [
        ConfigRecord({}),
        ConfigRecord({"other": ["a"]}),
        ConfigRecord({SIGNED: "a"}),
        ConfigRecord({SIGNED: b"\xff"}),
        ConfigRecord({SIGNED: 5}),
        ConfigRecord({SIGNED: [1.5]}),
        ConfigRecord({SIGNED: [b"{}"]}),
        ConfigRecord({SIGNED: ["x" * (LONGEST + 1)]}),
        ConfigRecord({SIGNED: ["x" * 10**6] * 3}),
        MetricRecord({SIGNED: [1, 2]}),
        ArrayRecord({SIGNED: Array("float32", (1,), "numpy.ndarray", b"nothing")}),
    ],
    ids=range(11),
)
def test_other_forms_are_taken_out_of_the_reply_and_dropped(record, caplog):
    found, reply = Withdrawals(), answer(record)
    for _ in range(3):
        found.take(7, answer(record))
    found.take(7, reply)
    assert RECORD not in reply.content
    assert found.drain() == []
    assert caplog.text.count("node 7") == 1


def test_what_is_kept_and_what_is_said_of_a_node_is_bounded(caplog):
    found = Withdrawals()
    for number in range(100):
        found.take(7, answer(listed(*(f"{number} {place}" for place in range(3)))))
        found.refuse(7, f"reason {number}")
    found.take(8, answer(listed(*map(str, range(1000)))))
    drained = found.drain()
    assert [sum(node == one for one, _ in drained) for node in (7, 8)] == [MOST, MOST]
    assert (found.drain(), caplog.text.count("node 7")) == ([], MOST_SAID)
    found.refuse(9, "\x1b[8m\n" * 1000)
    assert len(caplog.messages[-1]) < 2500
    assert caplog.messages[-1].isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", "[" * 1900, "1" * 1999, '"\ud800"', "\x00", "NaN",
        '{"run":1,"action":1,"clients":{},"issued_at":1,"expires_at":1,"nonce":[],"key":1,"signature":{}}',
        '{"run":"","action":"","clients":[-1],"issued_at":"2026-01-01T00:00Z","expires_at":"2026-01-01T00:00Z",'
        '"nonce":"","key":"","signature":""}',
    ],
    ids=range(11),
)  # fmt: skip
def test_no_text_of_whatever_form_raises_anything_else(text):
    with pytest.raises(UnsignedError, match="no signed request"):
        believed(text, run=OTHER_RUN, owners={1: "a"}, used=set(), name=str)


@pytest.mark.parametrize(
    "change",
    [{"clients": [1, 2]}, {"clients": []}, {"clients": [-1]}, {"clients": [9]}, {"nonce": "é" * 8}, {"nonce": ""}],
    ids=str,
)
def test_only_what_the_command_signs_counts_though_the_key_is_right(tmp_path, change):
    key = ec.generate_private_key(ec.SECP384R1())
    asked_for = replace(sign([1], run=OTHER_RUN, key=written(tmp_path / "key", key)), **change)
    text = text_of(replace(asked_for, signature=keys.signature_of(key, asked_for.message)))
    owners = dict.fromkeys((1, 2), asked_for.key)
    with pytest.raises(UnsignedError):
        believed(text, run=OTHER_RUN, owners=owners, used=set(), name=str)
    right = text_of(sign([1], run=OTHER_RUN, key=tmp_path / "key"))
    assert believed(right, run=OTHER_RUN, owners=owners, used=set(), name=str) == read(right.encode())
    assert believed(right, run=OTHER_RUN, owners=owners, used={read(right.encode()).nonce}, name=str) is None


def test_the_longest_signature_fits(tmp_path):
    key = written(tmp_path / "key", ec.generate_private_key(ec.SECP521R1()))
    assert len(text_of(sign([2**31], run=OTHER_RUN, key=key))) < LONGEST / 2


def test_in_a_simulation_nobody_may_carry_anything(federate, warnings):  # noqa: F811
    grid = LocalGrid(2)

    def carrying(message):
        reply = grid.call(message)
        if messages.task_of(message).name == "train":
            reply.content[RECORD] = listed("x")
        return reply

    grid.deliver = carrying
    with pytest.raises(UserError, match="no client answered"):
        federate("rounds=1 strategy=leave", grid=grid)
    assert "it sent 'withdrawals', which nobody asked for" in warnings()


# --- where only signed requests count -----------------------------------------------------------------------------


def test_with_forget_signed_the_key_of_the_supernode_counts_as_the_clients(three, capsys):
    three("rounds=1 forget.signed=true")
    assert command("forget", "--run", "test", "--client", "hospital_b") == 2
    assert "it is not signed" in capsys.readouterr().err
    assert three.leave() == 0
    three("rounds=2 forget.signed=true")
    assert [(r.state, r.clients) for r in three.federate.requests()] == [("COMPLETED", [1])]
    assert command("forget", "--run", "test", "--client", "hospital_c", "--key", three.files[2]) == 0


def test_a_key_that_is_named_for_requests_counts_in_place_of_the_supernodes(three, tmp_path, warnings):  # noqa: F811
    own = tmp_path / "own.pem"
    words = f"forget.signed=true forget.keys={{hospital_b:{keys.new_key(own)}}}"
    three(f"rounds=1 {words}")
    three.leave_unchecked(three.files[1])
    three(f"rounds=2 {words}")
    assert three.federate.requests() == []
    assert warnings().count("its key is not that of client hospital_b (forget.keys, partition.keys)") == 1
    assert three.leave(key=own) == 0
    three(f"rounds=3 {words}")
    assert [request.state for request in three.federate.requests()] == ["COMPLETED"]


def test_with_forget_signed_a_key_that_only_the_superlink_knows_does_not_count(hospitals, three, warnings):  # noqa: F811
    hospitals("rounds=1 forget.signed=true", keys=three.keys)
    assert three.leave() == 2
    three.leave_unchecked(three.files[1])
    hospitals("rounds=2", keys=three.keys)
    assert three.federate.requests() == []
    assert "its key is not that of client hospital_b" in warnings()
