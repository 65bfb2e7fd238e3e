"""Runs of clients with names: what people type and read, what changes of images do, and what is removed."""

import json
import os
import re
import shlex
import shutil

import pytest

from command_line import command
from fedunlearn.apps.serve.ask import Asked, outlook
from fedunlearn.build import open_dataset
from fedunlearn.composing import compose
from fedunlearn.config import from_json
from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError
from fedunlearn.federation import messages
from fedunlearn.live.auditing import by_names, plan_of, settings_of
from fedunlearn.live.starting import open_run
from fedunlearn.live.words import words_of
from fedunlearn.runs import scan
from fedunlearn.runs.ledger import State
from fedunlearn.runs.receipts import FOLDER, write
from fedunlearn.runs.verifying import verified
from test_owners import hospitals, picture

QUICK = "strategy=leave train.batch_size=64 train.client_head_steps=1 batch_norm_fraction=0"
CLIENTS = ("amt <1>", "b", "c, d", "3")
NUMBERS = {"3": 0, "amt <1>": 1, "b": 2, "c, d": 3}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Ray and Flower have no files here."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))


@pytest.fixture
def tree(tmp_path):
    return hospitals(tmp_path / "tree", CLIENTS)


@pytest.fixture
def hosted(federate, tree):
    """Runs of the hospitals; `strategy=leave` forgets at no cost."""

    def run(words="", rounds=1):
        about = f"data.name=folder data.root={tree} data.image_size=8 data.limit=0 data.test_limit=0 {QUICK}"
        return federate(f"{about} partition.kind=folders rounds={rounds} {words}", nodes=1)

    return run


def receipt(federate, name="test"):
    (file,) = (federate.folder(name) / FOLDER).glob("r1.json")
    return verified(file.read_bytes())


def test_a_client_is_forgotten_by_name_and_everybody_calls_it_so(federate, hosted, tree, capsys):
    hosted("forget.schedule={1:['c, d']}")
    federate.run().request(["b"])
    assert [request.clients for request in federate.requests()] == [[3], [2]]
    out = capsys.readouterr()
    assert "request r1, forgotten after round 1" in out.err
    assert "client 'c, d': class" in out.err
    for words in (("requests",), ("forget", "--list")):
        assert command(*words, "--run", "test") in (0, 1)
        assert "client 'c, d'  after round 1; class accuracy client 'c, d'" in capsys.readouterr().out
    command("requests", "--json")
    assert [request["names"] for request in json.loads(capsys.readouterr().out)] == [["c, d"], ["b"]]


def test_no_message_has_a_name_and_each_machine_knows_its_own(hosted, federate, tree):
    grid = hosted("forget.schedule={1:[b]}", rounds=2)
    configs = [messages.task_of(message).config for message in grid.sent]
    assert len(configs) > 5
    assert not [config for config in configs if any(f'"{name}"' in config for name in CLIENTS)]
    shutil.rmtree(tree / "b")
    sent = from_json(configs[-1])
    here = open_dataset(sent.model_copy(update={"home": str(federate.home)}))
    assert [len(own) for own in here.slices] == [10, 10, 0, 10]
    assert here.class_names == ["no", "yes"]


def test_the_receipt_has_name_and_number_and_nobody_elses(federate, hosted, capsys):
    hosted("forget.schedule={1:['amt <1>']}")
    said = receipt(federate)
    assert (said.clients, said.names) == ([1], {"1": "amt <1>"})
    assert "names" not in said.settings["partition"]
    file = federate.folder() / FOLDER / "r1.json"
    assert command("verify", file) == 0
    printed = capsys.readouterr().out
    assert "client 'amt <1>' (number 1): COMPLETED" in printed
    assert "class accuracy, client 'amt <1>' (number 1):" in printed
    page = file.with_suffix(".html").read_text()
    assert "amt &lt;1&gt;&#39; (number 1)" in page
    assert "<1>" not in page
    assert "c, d" not in page
    report = (federate.folder() / "report" / "index.html").read_text()
    assert "amt &lt;1&gt;" in report
    assert "<1>" not in report


def test_where_a_name_is_a_number_nobody_is_asked_for_by_place(federate, hosted, capsys):
    hosted("forget.schedule={1:[3]}")
    assert federate.requests()[0].clients == [NUMBERS["3"]]
    capsys.readouterr()
    assert command("forget", "--client", "3", "--dry-run", "--run", "test") == 0
    assert "client 3  " in capsys.readouterr().out
    assert command("forget", "--client", "amt", "--run", "test") == 2
    assert "no client is called 'amt': did you mean amt <1>?" in capsys.readouterr().err
    assert open_run("test").request([3]).requests()[0].clients == [NUMBERS["3"]]
    unknown = (
        "no client is called '1': as names are numbers here, a number is a name; there are 3, 'amt <1>', b, 'c, d'"
    )
    for name in ("forget", "scan", "purge"):
        assert command(name, "--client", "1", "--run", "test") == 2
        assert unknown in capsys.readouterr().err
    for ask in (federate.run().request, open_run("test").request):
        with pytest.raises(UserError, match=re.escape(unknown)):
            ask([1])
    with pytest.raises(UserError, match=re.escape(unknown)):
        outlook(federate.run(), Asked(clients="1"))


def test_an_audit_leaves_out_whom_the_run_has_forgotten_also_where_names_are_numbers(federate, hosted, tree, digits):
    for old, new in (("b", "1"), ("c, d", "2\\")):
        os.rename(tree / old, tree / new)
    hosted("forget.schedule={1:[1]} forget.purge=never")
    run = federate.run()
    plan = plan_of(run, [run.config.partition.names.index("1")], 1)
    again = compose(digits, words_of(by_names(settings_of(plan)) | {"home": str(federate.home)}))
    assert again.forget.schedule == plan.forget.schedule
    assert again.partition == plan.partition


def test_a_client_that_comes_later_changes_no_run(federate, hosted, tree):
    hosted()
    hospitals(tree, ("aaa",))
    hosted(rounds=2)
    assert federate.run().config.partition.names == ["3", "amt <1>", "b", "c, d"]
    assert federate.run().ledger.current().round == 2


def test_whose_images_have_changed_is_said_by_name(hosted, tree):
    hosted()
    picture(tree / "c, d" / "no" / "new.png", 999)
    with pytest.raises(UserError, match=r"run test was trained on other data \(other images of client 'c, d'\)"):
        hosted(rounds=2)


def test_what_is_left_of_a_client_is_its_part_and_it_may_delete_its_files(federate, hosted, tree, capsys):
    hosted("forget.schedule={1:[b]}")
    store = open_dataset(federate.run().config_here()).store
    assert len(list(store.glob("*/meta.json"))) == 3
    said = receipt(federate)
    assert "12 decoded images of client b, with their labels" in said.deleted
    listed = (store / "files-to-delete.txt").read_text().splitlines()
    assert listed == [str(tree / "b" / name / f"{i}.png") for name in ("no", "yes") for i in range(6)]
    capsys.readouterr()
    assert command("scan", "--client", "b", "--run", "test", "--also", tree) == 1
    assert "12 files of" in capsys.readouterr().out
    shutil.rmtree(tree / "b")
    hosted("forget.schedule={1:[b]}", rounds=2)
    assert federate.run().ledger.current().round == 2


def test_a_client_that_another_run_needs_keeps_its_part(federate, hosted):
    hosted("run=other")
    hosted("forget.schedule={1:[b]}")
    assert "needed by run other" in {one.why for one in receipt(federate).kept}
    assert len(list(open_dataset(federate.run().config_here()).store.glob("*/meta.json"))) == 4


def test_scan_finds_held_out_images_of_a_client_too(federate, hosted):
    hosted()
    with scan.owned_by(federate.run(), [NUMBERS["b"]]) as owned:
        pass
    assert (len(owned.images.images), len(owned.images.others), len(owned.images.files)) == (12, 36, 12)
    assert owned.class_counts == {"2": [5, 5]}
    store = open_dataset(federate.run().config_here()).store
    shutil.rmtree(store)
    with scan.owned_by(federate.run(), [NUMBERS["b"]]) as again:
        pass
    assert (again.images.images == owned.images.images).all()


def test_who_was_forgotten_is_known_by_name_whatever_its_images_are(federate, hosted, tree):
    hosted("forget.schedule={1:[b]}")
    picture(tree / "b" / "no" / "new.png", 999)
    with pytest.raises(
        UserError, match=r"client b was forgotten by run test.*forget.schedule=\{0:\[b\]\}.*readmit=\[b\]"
    ):
        hosted("run=second")
    before = sorted((federate.home / "data").rglob("*"))
    (tree.parent / "alias").symlink_to(tree)
    for words in ("data.image_size=16", f"data.root={tree.parent}/alias/", f"data.root={tree}/../tree/."):
        with pytest.raises(UserError, match="client b was forgotten by run test"):
            hosted(f"run=second {words}")
    assert sorted((federate.home / "data").rglob("*")) == before  # nothing is decoded for a run that is refused
    hosted("run=second readmit=[b]")
    assert [len(own) for own in open_dataset(federate.run("second").config_here()).slices] == [10, 10, 11, 10]


def test_everybody_who_was_forgotten_is_named_at_once_and_what_is_said_can_be_pasted(federate, hosted):
    hosted("forget.schedule={1:['c, d'], 2:[b]}", rounds=2)
    with pytest.raises(UserError) as refused:
        hosted("run=second forget.schedule={1:['amt <1>']}")
    without, back = (word.removesuffix(",") for word in shlex.split(str(refused.value)) if "=" in word)
    said = r"client b was forgotten by run test \(request r2\); client 'c, d' was .* \(request r1\): leave them out"
    assert re.match(said, str(refused.value))
    assert (without, back) == ('forget.schedule={0:[b,"c, d"],1:["amt <1>"]}', 'readmit=[b,"c, d"]')
    with pytest.raises(UserError, match=r"^client 'c, d' was .*: leave it .*'readmit=\[b,\"c, d\"\]'$"):
        hosted("run=second readmit=[b]")
    hosted(f"run=second {back}")


def test_hints_about_clients_have_their_names(federate, hosted, capsys):
    hosted()
    assert command("purge", "--client", "b", "--client", "c, d", "--run", "test") == 2
    hint = "clients b and 'c, d' are not forgotten in run test: "
    hint += "fedunlearn forget --client b --client 'c, d' --run=test"
    assert hint in capsys.readouterr().err
    for name in ("purge", "scan"):
        assert command(name, "--run", "test") == 2
        assert "nobody is named: say whom with --client" in capsys.readouterr().err
    ledger = federate.run().ledger
    ledger.advance(ledger.file([0, 3])[0], State.QUARANTINED, gate={"passed": False})
    ledger.advance(ledger.file([0])[0], State.COLLECTING)
    with pytest.raises(UserError, match="`fedunlearn forget --client 'c, d' --run=test` asks for the rest"):
        federate.run().ledger.accept("r1", "somebody")


def test_a_purged_client_and_its_held_out_images_leave_a_run_that_goes_on(federate, hosted):
    hosted("forget.schedule={1:[b]} forget.gate=true forget.budget=1", rounds=2)
    assert [len(probs) for probs in federate.server_state().predictions.values()] == [8]
    hosted("forget.gate=true", rounds=3)
    assert {round_: len(probs) for round_, probs in federate.server_state().predictions.items()} == {"3": 6}
    federate.run().request(["c, d"])
    hosted("forget.gate=true", rounds=3)
    assert [request.state for request in federate.requests()] == ["COMPLETED", "COMPLETED"]
    assert federate.requests()[1].detail["after"]["test"]["examples"] == 6


def test_a_patient_and_single_files_of_a_client_are_forgotten(federate, tree):
    places = [(c, k, i) for c in ("b", "3", "amt <1>", "c, d") for k in ("no", "yes") for i in range(6)]
    lines = [f'"{c}/{k}/{i}.png","{c}",{"test" if i == 5 else "train"},p{i // 2}' for c, k, i in places]
    (tree / "clients.csv").write_text("\n".join(["path,client,split,patient", *lines]))
    about = f"data.name=folder data.root={tree} data.image_size=8 data.limit=0 data.test_limit=0 {QUICK}"
    about += " partition.file=clients.csv"
    federate(f"{about} rounds=1", nodes=1)
    federate.run().request(["b"], selection=Selection.by(patients=["p1"]))
    federate.run().request(["c, d"], selection=Selection.by(examples=["c, d/no/0.png"]))
    federate(f"{about} rounds=1", nodes=1)
    requests = federate.requests()
    assert [(request.owners, request.state) for request in requests] == [([2], "COMPLETED"), ([3], "COMPLETED")]
    assert [sum(r.detail["after"]["forgotten"][str(c)]["examples"] for c in r.clients) for r in requests] == [4, 1]
    assert receipt(federate).names == {"2": "b", "4": "patient p1 of client b"}
    assert any("patient p1 of client b" in one.what for one in receipt(federate).kept)
    gone = [line for line in lines if line.startswith('"b/') and line.endswith(",p1")]
    for line in gone:
        (tree / line.split('"')[1]).unlink()
    left = [line for line in lines if line not in gone]
    (tree / "clients.csv").write_text("\n".join(["path,client,split,patient", *left]))
    federate(f"{about} rounds=2", nodes=1)
    before, after = [row["examples"] for row in federate.run().metrics() if row["kind"] == "round"]
    assert after == before - 5


def test_receipts_of_runs_without_names_are_read_as_they_were(federate):
    federate(f"forget.schedule={{1:[3]}} rounds=1 data.limit=40 data.test_limit=20 {QUICK}", nodes=1)
    said = receipt(federate)
    assert (said.names, said.who, said.shown("client 3")) == ({}, "client 3", "client 3")
    about = json.loads((federate.folder() / "run.json").read_text())
    assert about["config"]["partition"].keys() == {"kind", "dirichlet_alpha", "seed"}
    run = federate.run()
    assert run.named([1, 3]) == "clients 1 and 3"
    assert verified(write(run, run.ledger.request("r1")).read_bytes()).names == {}


def test_a_run_goes_on_when_files_of_whom_it_forgot_are_gone_and_a_table_still_names_them(federate, tree, capsys):
    names = [f"{c}/{k}/{i}.png" for c in ("b", "3", "amt <1>", "c, d") for k in ("no", "yes") for i in range(6)]
    lines = [f'"{name}","{name.partition("/")[0]}"' for name in names]
    (tree / "clients.csv").write_text("\n".join(["path,client", *lines]))
    about = f"data.name=folder data.root={tree} data.limit=0 data.test_limit=0 {QUICK} partition.file=clients.csv"
    federate(f"{about} data.image_size=8 rounds=1 forget.schedule={{1:[b]}}", nodes=1)
    (tree / "b" / "no" / "0.png").unlink()
    federate(f"{about} data.image_size=8 rounds=2", nodes=1)
    shutil.rmtree(tree / "b")
    federate(f"{about} data.image_size=8 rounds=3", nodes=1)
    assert federate.run().ledger.current().round == 3
    with pytest.raises(UserError, match=r"client b was forgotten by run test"):
        federate(f"{about} data.image_size=8 rounds=1 run=plain", nodes=1)
    others = "clients=2 partition.names=[3,'amt <1>']"
    federate(f"{about} data.image_size=9 rounds=1 run=without {others}", nodes=1)
    assert [len(own) for own in open_dataset(federate.run("without").config_here()).slices] == [10, 10]
    with pytest.raises(UserError, match=r"readmit: the files with the images of client b were deleted"):
        federate(f"{about} data.image_size=8 rounds=1 run=back readmit=[b]", nodes=1)
    (tree / "3" / "no" / "0.png").unlink()
    with pytest.raises(UserError, match=r"has 1 wrong lines:\n  line 14: 3/no/0.png is not there"):
        federate(f"{about} data.image_size=8 rounds=4", nodes=1)
