"""Machines of their own: every node has its own clients' images, and the server has held-out images alone."""

import json
import logging

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from command_line import command
from fedunlearn.apps.client_app import app, resident
from fedunlearn.composing import compose
from fedunlearn.config import Config
from fedunlearn.data.datasets import Owners, load
from fedunlearn.errors import UserError
from fedunlearn.federation import gate, messages
from fedunlearn.federation.machine import Machine, settled
from fedunlearn.runs.keys import id_of
from fedunlearn.runs.receipts import FOLDER
from fedunlearn.runs.verifying import verified
from local_grid import LocalGrid, asked
from naive import ONCE
from test_owners import picture

NAMES = ["hospital_a", "hospital_b", "hospital_c"]
QUICK = "train.batch_size=64 train.client_head_steps=1 batch_norm_fraction=0 clients=3"


def classes(folder, number, names=("no", "yes"), each=5):
    """A machine's folder, CLASS/image."""
    for k, name in enumerate(names):
        for i in range(each):
            picture(folder / name / f"{i}.png", 100 * number + 10 * k + i)
    return folder


def public(key):
    """A key as a SuperLink keeps it."""
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(*form)


class Machines(LocalGrid):
    """A grid whose nodes are started with a folder and a state folder each."""

    def __init__(self, configs, keys=None):
        super().__init__(len(configs))
        self.configs, self.keys = configs, keys

    def get_nodes(self):
        """As Flower's grid: every node with the key that it signs with."""
        return [
            NodeInfo(node_id=node, public_key=public(self.keys[place]) if self.keys else b"")
            for node, place in self.nodes.items()
        ]

    def call(self, message):
        config = self.configs[self.nodes[message.metadata.dst_node_id]]
        self._client_app = lambda message, context: app(message, Context(1, context.node_id, config, RecordDict(), {}))
        return super().call(message)


@pytest.fixture
def hospitals(federate, tmp_path, monkeypatch):
    """Runs the federation of three machines, or of others; `server` is all that the server has."""
    resident.cache_clear()
    classes(tmp_path / "server", 9)
    for number, name in enumerate(NAMES):
        classes(tmp_path / name, number)

    def machine(client, root=None, home=None):
        return {
            "client": client,
            "data-root": str(root or tmp_path / client),
            "home": str(tmp_path / f"at_{home or client}"),
        }

    def run(words="", machines=None, names=NAMES, keys=None):
        about = f"data.name=folder data.root={tmp_path / 'server'} data.image_size=8 data.limit=0 data.test_limit=0"
        about += f" {QUICK} partition.kind=nodes partition.names=[{','.join(names)}] timeout=0.5"
        if "strategy=" not in words:
            about += " strategy=leave"
        return federate(f"{about} {words}", grid=Machines(machines or [machine(name) for name in NAMES], keys))

    run.machine = machine
    yield run
    resident.cache_clear()


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.INFO, "fedunlearn")
    return lambda: caplog.text


def test_a_run_trains_forgets_and_reports_with_every_image_on_its_own_machine(federate, hospitals, capsys):
    grid = hospitals("rounds=2 forget.schedule={1:[hospital_b]}")
    (request,) = federate.requests()
    assert (request.state, request.clients) == ("COMPLETED", [1])
    rows = [row for row in federate.run().metrics() if row["kind"] == "round"]
    assert [row["clients"] for row in rows] == [[0, 1, 2], [0, 2]]
    assert [row["test"]["examples"] for row in rows] == [10, 10]
    assert rows[-1]["forgotten"] == {}
    hosts = {message.metadata.dst_node_id: messages.task_of(message).clients for message in grid.sent_for("train")}
    assert sorted(hosts.values()) == [[0], [1], [2]]
    assert ("train", 1) not in asked(grid)[asked(grid).index(("evaluate", 0)) :]


def test_the_default_strategy_needs_no_more(federate, hospitals):
    hospitals(
        f"rounds=1 strategy=subset unlearn.epochs=1 {ONCE} forget.gate=true forget.budget=1 "
        "forget.schedule={1:[hospital_b]}"
    )
    (request,) = federate.requests()
    assert request.state == "COMPLETED"
    assert "fisher" in request.detail["costs"]
    assert request.detail["after"]["forgotten"] == {}


def test_nobody_reads_anothers_images_and_no_path_of_the_server_travels(federate, hospitals, tmp_path):
    grid = hospitals("rounds=1")
    for name in NAMES:
        (store,) = (tmp_path / f"at_{name}" / "data").glob("owners-*")
        (part,) = store.glob("*/meta.json")
        assert json.loads(part.read_text())["client"] == name
        assert json.loads(part.read_text())["train"] == 10
    (store,) = (federate.home / "data").glob("owners-*")
    (part,) = store.glob("*/meta.json")
    about = json.loads(part.read_text())
    assert (about["client"], about["train"], about["test"]) == ("", 0, 10)
    assert not [message for message in grid.sent if str(tmp_path) in messages.task_of(message).config]


def test_the_fingerprints_are_the_nodes_own_and_are_kept(federate, hospitals, tmp_path, warnings):
    hospitals("rounds=1")
    data = federate.run().about()["data"]
    assert {len(data[str(client)]) for client in range(3)} == {64}
    assert len({*data.values()}) == 4
    picture(tmp_path / "hospital_c" / "no" / "new.png", 999)
    hospitals("rounds=2")
    assert "client hospital_c has other images than when the run began" in warnings()
    assert federate.run().metrics()[-1]["clients"] == [0, 1]
    assert federate.run().about()["data"] == data


def test_the_report_is_written_anew_without_an_auditor(federate, hospitals, capsys):
    hospitals("rounds=1 forget.schedule={1:[hospital_b]}")
    assert command("report", "--run", "test") == 0
    assert "retain clients" in capsys.readouterr().out


def test_a_receipt_says_that_nobody_measured_and_where_the_images_are(federate, hospitals):
    hospitals("rounds=1 forget.schedule={1:[hospital_b]}")
    said = verified((federate.folder() / FOLDER / "r1.json").read_bytes())
    assert [figure.of for figure in said.figures if "client" in figure.of.split()[:1]] == []
    assert "on a machine of their own" in {one.why.partition("are ")[2].partition(",")[0] for one in said.kept}
    report = (federate.folder() / "report" / "index.html").read_text()
    assert "What the model still knows of its images was not measured." in report


def test_images_that_were_forgotten_do_not_come_back_under_another_name(federate, hospitals, tmp_path, warnings):
    hospitals("rounds=1 forget.schedule={1:[hospital_b]}")
    disguised = [
        hospitals.machine("hospital_a"),
        hospitals.machine("hospital_c", tmp_path / "hospital_b", "hospital_b"),
    ]
    grid = hospitals("rounds=2", disguised)
    assert (
        "what it calls client hospital_c are images that were forgotten (client hospital_b, by this run)" in warnings()
    )
    assert {client for _, client in asked(grid)} == {0}
    grid = hospitals("run=second rounds=1 forget.schedule={0:[hospital_b]}", disguised)
    assert {client for _, client in asked(grid)} == {0}


def test_two_machines_that_say_they_are_one_client_are_both_left_out(federate, hospitals, tmp_path, warnings):
    thief = hospitals.machine("hospital_b", classes(tmp_path / "thief", 7), "thief")
    grid = hospitals("rounds=1", [*(hospitals.machine(name) for name in NAMES), thief])
    assert warnings().count("2 nodes say that they are client hospital_b") == 2
    assert {client for _, client in asked(grid)} == {0, 2}


def test_one_machine_may_have_several_clients_each_in_its_folder(federate, hospitals, tmp_path):
    both = classes(tmp_path / "both" / "hospital_a", 0).parent
    classes(both / "hospital_c", 2)
    hospitals("rounds=1", [hospitals.machine("hospital_c, hospital_a", both, "both"), hospitals.machine("hospital_b")])
    assert federate.run().metrics()[-1]["clients"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"client": "hospital_d"}, "the run has no such client"),
        ({"client": "1"}, "give the client's name, not a number"),
        ({"data-root": ""}, "does not say whose images it has"),
        ({"data-root": "/nowhere"}, "data.root=/nowhere does not exist"),
        ({"client": "hospital_b,hospital_c"}, "each has its own folder"),
    ],
)
def test_a_machine_that_is_started_wrongly_says_how_and_the_others_go_on(federate, hospitals, warnings, change, reason):
    wrong = hospitals.machine("hospital_b") | change
    hospitals("rounds=1", [hospitals.machine("hospital_a"), hospitals.machine("hospital_c"), wrong])
    assert reason in warnings()
    assert "clients hospital_b are not connected: the run goes on without them until it is started again" in warnings()
    assert federate.run().metrics()[-1]["clients"] == [0, 2]


def test_a_class_that_nobody_knows_is_named_and_a_client_may_lack_one(federate, hospitals, tmp_path, warnings):
    classes(tmp_path / "few", 4, ("yes",))
    classes(tmp_path / "odd", 5, ("no", "perhaps"))
    machines = [hospitals.machine("hospital_a", tmp_path / "few"), hospitals.machine("hospital_b", tmp_path / "odd")]
    hospitals("rounds=1", [*machines, hospitals.machine("hospital_c")])
    assert "has images of class perhaps, which is none of no, yes" in warnings()
    assert federate.run().metrics()[-1]["clients"] == [0, 2]


def test_training_images_of_a_split_are_taken_and_the_others_left(tmp_path):
    classes(tmp_path / "one" / "train", 1)
    classes(tmp_path / "one" / "test", 2)
    owners = Owners("nodes", "", ("a", "b"), ("maybe", "no", "yes"), ("b",))
    found = load("folder", cache=tmp_path / "cache", root=str(tmp_path / "one"), image_size=8, owners=owners)
    assert [len(own) for own in found.slices] == [0, 10]
    assert sorted({*found.train.labels[:].tolist()}) == [1, 2]
    assert len(found.test.labels) == 0
    held_out = load(
        "folder", cache=tmp_path / "cache", root=str(tmp_path / "one"), image_size=8, owners=owners._replace(here=())
    )
    assert (len(held_out.train.labels), len(held_out.test.labels)) == (0, 10)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("partition.kind=nodes", "the images have 0 owners"),
        ("partition.kind=nodes partition.names=[a,b]", "partition.kind=nodes is for image files"),
        ("partition.classes=[a,b]", "partition.classes is for partition.kind=nodes"),
        ("data.name=folder partition.kind=nodes partition.names=[a,b] partition.classes=[a,a]", "each named once"),
    ],
)
def test_settings_that_do_not_fit_are_refused(home, digits, words, reason):
    with pytest.raises(UserError, match=reason):
        compose(digits, words)


def test_in_a_simulation_a_machine_is_nothing():
    config = Config()
    assert settled(config, Machine("a", "/data")) == (config, None)


@pytest.fixture
def supernodes():
    """The keys of three SuperNodes, and the setting that names them."""
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in NAMES]
    named = ",".join(f"{name}:{id_of(key)}" for name, key in zip(NAMES, keys, strict=True))
    return keys, f"partition.keys={{{named}}}"


def test_a_node_is_who_its_key_says(federate, hospitals, supernodes, tmp_path, warnings):
    keys, setting = supernodes
    stranger = ec.generate_private_key(ec.SECP384R1())
    thief = hospitals.machine("hospital_b", classes(tmp_path / "thief", 7), "thief")
    machines = [*(hospitals.machine(name) for name in NAMES), thief]
    grid = hospitals(f"rounds=1 {setting}", machines, keys=[*keys, stranger])
    assert f"is asked nothing: its key {id_of(stranger)} is no client's" in warnings()
    assert sorted({message.metadata.dst_node_id for message in grid.sent}) == list(grid.nodes)[:3]
    assert federate.run().metrics()[-1]["clients"] == [0, 1, 2]
    assert not [message for message in grid.sent if id_of(keys[0]) in messages.task_of(message).config]


def test_a_node_that_says_it_is_somebody_else_is_not_believed(federate, hospitals, supernodes, warnings):
    keys, setting = supernodes
    hospitals(f"rounds=1 {setting}", keys=[keys[0], keys[2], keys[1]])
    assert "it says that it is client hospital_b, whose key is another (partition.keys)" in warnings()
    assert federate.run().metrics()[-1]["clients"] == [0]
    assert "one client on one machine of its own\n" in warnings()
    assert "(key of hospital_b) is left out: it says that it is client hospital_c, whose key" in warnings()


@pytest.mark.parametrize("are_named", [True, False])
def test_a_forgotten_key_gets_no_message_whatever_it_says_it_is(
    federate, hospitals, supernodes, tmp_path, warnings, are_named
):
    keys, setting = supernodes[0], supernodes[1] if are_named else ""
    hospitals(f"rounds=1 {setting} forget.schedule={{1:[hospital_b]}}", keys=keys)
    assert federate.requests()[0].state == "COMPLETED"
    other_images = hospitals.machine("hospital_a", classes(tmp_path / "new", 8), "new")
    for rounds, machine in ((2, hospitals.machine("hospital_b")), (3, other_images)):
        machines = [hospitals.machine("hospital_a"), machine, hospitals.machine("hospital_c")]
        grid = hospitals(f"rounds={rounds} {setting}", machines, keys=keys)
        assert list(grid.nodes)[1] not in {message.metadata.dst_node_id for message in grid.sent}
        assert federate.run().metrics()[-1]["clients"] == [0, 2]
    assert "its key is that of a client that was forgotten (client hospital_b, by this run)" in warnings()


def test_another_run_knows_a_forgotten_key_too(hospitals, supernodes, warnings):
    keys, setting = supernodes
    hospitals(f"rounds=1 {setting} forget.schedule={{1:[hospital_b]}}", keys=keys)
    with pytest.raises(UserError, match=r"client b was forgotten by run test \(request r1\)"):
        hospitals(f"run=second rounds=1 {setting.replace('hospital_', '')}", names=["a", "b", "c"], keys=keys)
    grid = hospitals("run=third rounds=1 forget.schedule={0:[hospital_b]}", keys=keys)
    assert list(grid.nodes)[1] not in {message.metadata.dst_node_id for message in grid.sent}
    assert "its key is that of a client that was forgotten (run test (request r1))" in warnings()


@pytest.mark.parametrize("are_named", [True, False])
def test_who_is_taken_back_trains_again_on_its_own_machine(federate, hospitals, supernodes, are_named):
    keys, setting = supernodes[0], supernodes[1] if are_named else ""
    hospitals(f"rounds=1 {setting} forget.schedule={{1:[hospital_b,hospital_c]}}", keys=keys)
    hospitals(f"run=second rounds=1 {setting} readmit=[hospital_b] forget.schedule={{0:[hospital_c]}}", keys=keys)
    assert federate.run("second").metrics()[-1]["clients"] == [0, 1]


def test_of_two_clients_of_one_machine_the_other_takes_part_in_further_runs(hospitals, supernodes, federate, tmp_path):
    keys = supernodes[0][:2]
    ids = dict(zip("abc", (id_of(keys[0]), *map(id_of, keys)), strict=True))
    for number, name in enumerate("ab"):
        classes(tmp_path / "two" / name, number)
    c, both = hospitals.machine("c", classes(tmp_path / "c", 2)), hospitals.machine("a, b", tmp_path / "two", "two")

    def run(words, machine, names):
        named = ",".join(f"{name}:{ids[name]}" for name in names)
        hospitals(f"rounds=1 clients={len(names)} partition.keys={{{named}}} {words}", [machine, c], names, keys)

    run("forget.schedule={1:[a]}", both, "abc")
    run("run=second", hospitals.machine("b", tmp_path / "two" / "b", "two"), "bc")
    assert federate.run("second").metrics()[-1]["clients"] == [0, 1]


def test_a_machine_with_nearly_all_images_takes_part_once_somebody_says_so(hospitals, federate, warnings):
    with pytest.raises(UserError, match="no node works"):
        hospitals("rounds=1 client_share=0.3")
    assert (
        "client hospital_b has 10 examples, more than 0.3 of all 30 (client_share); if it has them, start" in warnings()
    )
    hospitals("rounds=1 client_share=1")
    assert federate.run().metrics()[-1]["clients"] == [0, 1, 2]
    hospitals("rounds=2")
    assert federate.run().config.client_share == 1


def test_a_simulation_knows_no_keys_and_asks_nobody_then(hospitals, supernodes, warnings):
    with pytest.raises(UserError, match="no node works"):
        hospitals(f"rounds=1 {supernodes[1]}")
    assert "nobody knows its key, and partition.keys says who may come" in warnings()


def test_keys_are_of_all_clients(home, digits, supernodes):
    some = f"data.name=folder partition.kind=nodes partition.names=[{','.join([*NAMES, 'd'])}] {supernodes[1]}"
    with pytest.raises(UserError, match=r"partition\.keys has no key of client d: all have one, or none"):
        compose(digits, some)
    with pytest.raises(UserError, match="is no id of a key"):
        compose(digits, "forget.keys={1:abc}")


def test_public_and_private_keys_have_one_id(supernodes, tmp_path, capsys):
    key = supernodes[0][0]
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    for data in (public(key), key.public_key().public_bytes(*openssh), key.private_bytes(*private)):
        (tmp_path / "key").write_bytes(data)
        assert command("keys", "id", tmp_path / "key") == 0
        assert capsys.readouterr().out == f"{id_of(key)}\n"


def test_a_request_waits_until_the_run_is_started_again(federate, hospitals, capsys):
    hospitals("rounds=1")
    assert command("forget", "--client", "hospital_b", "--run", "test") == 0
    assert "the request is filed, and applied when the run is started again" in capsys.readouterr().err
    assert [request.state for request in federate.requests()] == ["RECEIVED"]
    grid = hospitals("rounds=1")
    assert [request.state for request in federate.requests()] == ["COMPLETED"]
    assert "train" not in {task for task, _ in asked(grid)}


@pytest.mark.parametrize("strategy", ["retrain", "negate", "federaser"])
def test_a_hospital_whose_machine_is_gone_is_forgotten_without_it(federate, hospitals, warnings, strategy):
    gate = "strategy=federaser unlearn.every=1 forget.gate=true forget.budget=1"
    hospitals(f"rounds=1 {gate}")
    federate.run().request([1], how=None if strategy == "federaser" else {"strategy": strategy, "unlearn": {}})
    hospitals(f"rounds=2 {gate}", [hospitals.machine(name) for name in ("hospital_a", "hospital_c")])
    (request,) = federate.requests()
    assert (request.state, request.detail["strategy"]) == ("COMPLETED", strategy)
    assert request.detail["gate"].keys().isdisjoint({"gap"})
    assert "Client hospital_b did not reply: nobody says how well the model knows its images" in warnings()
    assert [row["clients"] for row in federate.run().metrics() if row["kind"] == "round"][-1] == [0, 2]
    assert federate.state()["pruned"].tolist() == [False, True, False]


def test_what_the_gate_refuses_of_a_hospital_that_is_gone_somebody_may_take(federate, hospitals, monkeypatch):
    words = "rounds=1 strategy=leave forget.gate=true forget.attempts=2"
    hospitals(words)
    federate.run().request([1], how={"strategy": "negate", "unlearn": {}})
    monkeypatch.setattr(gate, "refusal", lambda *figures, **about: "it knows too little")
    there = [hospitals.machine(name) for name in ("hospital_a", "hospital_c")]
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        hospitals(words, there)
    federate.run().ledger.accept("r1", "Dr. Ada Byron")
    hospitals(words, there)
    (request,) = federate.requests()
    assert (request.state, request.detail["accepted_by"]) == ("COMPLETED", "Dr. Ada Byron")
