"""Requests about some of a client's images: a class, a patient, single images."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from flwr.app import Error, Message

from fedunlearn.apps.foresight import outlook
from fedunlearn.apps.reports import class_counts_of
from fedunlearn.apps.serve.ask import Asked
from fedunlearn.cli import main as cli
from fedunlearn.commands import read_names
from fedunlearn.data.selection import Portion, Selection
from fedunlearn.errors import UserError
from fedunlearn.federation import messages
from fedunlearn.federation.auditor import Auditor
from fedunlearn.federation.client import ClientRuntime
from fedunlearn.federation.portions import nothing_left
from fedunlearn.naming import class_numbers, with_portions
from fedunlearn.runs import keys
from fedunlearn.runs.ledger import Ledger, State
from fedunlearn.runs.purge import known_class_counts
from fedunlearn.runs.report import comparison
from fedunlearn.runs.signed import read
from fedunlearn.runs.verifying import verified
from local_grid import LocalGrid, equal
from naive import SETTINGS
from strategies.leave import LeaveAndContinue

LABELS = np.array([5, 0, 5, 1])
PATIENTS = ["p1", "p1", "p2", "p2"]
NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection.by(classes=[5]), [1, 0, 1, 0]),
        (Selection.by(classes=[0, 5]), [1, 1, 1, 0]),
        (Selection.by(patients=["p2"]), [0, 0, 1, 1]),
        (Selection.by(classes=[5], patients=["p2"]), [0, 0, 1, 0]),
        (Selection.by(examples=["d", "a", "z"]), [1, 0, 0, 1]),
        (Selection(), [1, 1, 1, 1]),
    ],
)
def test_a_selection_means_what_fits_in_every_respect(selection, expected):
    assert selection.of(LABELS, PATIENTS, NAMES).tolist() == [bool(one) for one in expected]
    assert Selection.read(json.loads(json.dumps(selection.content()))) == selection


def test_classes_are_called_as_commands_take_them():
    names = ["1", "10", "frog", "3"]
    assert Selection.by(classes=range(4)).in_words(names) == "classes 1, 10, frog, 3"
    assert class_numbers(["1", "10", "frog,3"], names) == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"class '2' is not one of 1, 10, frog, 3$"):
        class_numbers(["2"], names)
    assert Selection.by(classes=[7]).in_words() == "class 7"


def test_without_patients_nobody_is_meant():
    assert not Selection.by(patients=["p1"]).of(LABELS, None, NAMES).any()


def test_a_client_and_its_portions_share_its_images_out(federate, home):
    federate("rounds=1")
    runtime = ClientRuntime(federate.run().config)
    portions = {4: Portion(4, 1, Selection.by(classes=[3])), 5: Portion(5, 1, Selection.by(classes=[3, 4]))}
    rest, first, second = (runtime.indices(number, portions) for number in (1, 4, 5))
    labels = runtime.dataset.train.labels
    assert [set(labels[own]) for own in (first, second)] == [{3}, {4}]  # 3 is the first one's already
    assert not set(labels[rest]) & {3, 4}
    assert sorted([*rest, *first, *second]) == sorted(runtime.slices[1])
    assert np.array_equal(runtime.indices(0, portions), runtime.slices[0])


def counts_of(federate, name="test"):
    run = federate.run(name)
    return Auditor(run.config).class_counts(portions=run.ledger.portions())


def ask(federate, clients, selection, name="test"):
    run = federate.run(name)
    run.request(clients, selection=selection)
    run.ledger.close()


ASKED = ["subset", "ssd", "gradients"]
ASKED += [pytest.param(name, marks=pytest.mark.thorough) for name in ("leave", "retrain", "negate", "ascent", "pga")]


@pytest.mark.parametrize("strategy", ASKED)
def test_a_class_of_a_client_is_forgotten_by_every_strategy(federate, memorised, strategy):
    federate.shared("rounds=2", name="before")
    portion = int(counts_of(federate, "before")[1].argmax())
    federate(f"fork=before strategy={strategy} rounds=2")
    ask(federate, [1], Selection.by(classes=[portion]))
    federate(f"strategy={strategy} rounds=3")
    (request,) = federate.requests()
    counts = counts_of(federate)
    assert (request.state, request.clients, request.owners) == (State.COMPLETED, [4], [1])
    assert request.detail["before"]["forgotten"]["4"]["examples"] == counts[4].sum() > 0
    assert counts[1][portion] == 0
    assert not federate.state()["pruned"].any()
    rows = [row["examples"] for row in federate.run().metrics() if row["kind"] == "round"]
    assert rows[-2:] == [120, 120 - counts[4].sum()]


def test_retraining_without_a_portion_is_the_run_in_which_it_never_was(federate):
    federate(f"{SETTINGS} strategy=retrain")
    selection = Selection.by(classes=[int(counts_of(federate)[1].argmax())])
    ask(federate, [1], selection)
    federate(f"{SETTINGS} strategy=retrain")
    ledger = Ledger(federate.folder("never") / "ledger.sqlite")
    ledger.file([1], selection=selection, first_portion=4)
    ledger.close()
    federate(f"{SETTINGS} strategy=leave run=never")
    assert equal(federate.state(), federate.state("never"))


def test_a_class_of_everybody_takes_its_output_and_its_held_out_images_along(federate, memorised):
    federate("rounds=2 strategy=subset")
    ask(federate, [], Selection.by(classes=[7]))
    federate("rounds=3 strategy=subset")
    (request,) = federate.requests()
    run, counts = federate.run(), counts_of(federate)
    assert (request.state, request.owners) == (State.COMPLETED, [0, 1, 2, 3])
    assert counts[:4, 7].sum() == 0
    assert counts[4:, 7].sum() == counts[4:].sum() == 12
    assert federate.state()["pruned_classes"].tolist() == [k == 7 for k in range(10)]
    assert [row["test"]["examples"] for row in run.metrics() if row["kind"] == "round"] == [40, 40, 36]
    assert {request.detail[when]["test"]["examples"] for when in ("before", "after")} == {36}
    assert 7 not in run.model()(torch.randn(50, 1, 8, 8)).class_logits.argmax(1)
    forgotten = request.detail["after"]["forgotten"].values()
    assert {score["class"] for score in forgotten} == {score["held_out"] for score in forgotten} == {0}


def test_one_image_is_forgotten_and_then_the_whole_client(federate, memorised):
    federate("rounds=1 strategy=subset")
    one = ClientRuntime(federate.run().config).slices[2][0]
    ask(federate, [], Selection.by(examples=[str(one)]))
    federate("rounds=2 strategy=subset")
    ask(federate, [2], None)
    federate("rounds=3 strategy=subset")
    first, second = federate.requests()
    assert first.state == second.state == State.COMPLETED
    assert first.detail["before"]["forgotten"]["6"]["examples"] == 1
    assert second.detail["before"]["forgotten"]["2"]["examples"] == counts_of(federate)[2].sum()
    assert federate.state()["pruned"].tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("clients", "selection", "reason"),
    [
        ([], Selection.by(patients=["p9"]), "no client that was asked trains on an image of patient p9"),
        ([], Selection.by(examples=["1", "5000"]), "of the 2 named images 1 were not found"),
        ([], Selection.by(classes=range(10)), "no client would be left"),
    ],
)
def test_what_is_not_there_is_refused_and_changes_nothing(federate, clients, selection, reason):
    federate("rounds=1 strategy=leave")
    before = federate.state()
    ask(federate, clients, selection)
    with pytest.raises(UserError, match="REFUSED"):
        federate("rounds=1 strategy=leave")
    (request,) = federate.requests()
    assert request.state == State.REFUSED
    assert reason in request.detail["reason"]
    assert all(torch.equal(value, before[name]) for name, value in federate.state().items())


def test_a_refused_request_moves_no_class_counts_and_ends_no_later_one(federate, capsys):
    federate("rounds=1 strategy=leave")
    class_ = int(counts_of(federate)[1].argmax())
    ask(federate, [], Selection.by(patients=["p9"]))
    ask(federate, [1], Selection.by(classes=[class_]))
    with pytest.raises(UserError, match="REFUSED"):
        federate("rounds=1 strategy=leave")
    run = federate.run()
    counts = class_counts_of(run, Auditor(run.config))
    assert counts.shape == (4 + 4 + 1, 10)
    assert counts[4:8].sum() == 0
    assert counts[8].tolist() == [counts[8].sum() if k == class_ else 0 for k in range(10)]
    run.ledger.keep_purge(run.ledger.requests()[1], deleted=[], kept=[])
    assert known_class_counts(run, counts).tolist() == counts.tolist()


def test_a_class_that_clients_forget_one_after_the_other_leaves_with_the_last(federate):
    federate("rounds=1 strategy=leave")
    for clients in ([0], [1, 2], [3]):
        ask(federate, clients, Selection.by(classes=[7]))
    federate("rounds=1 strategy=leave")
    ask(federate, [0, 1, 2, 3], Selection.by(classes=[6]))
    federate("rounds=1 strategy=leave")
    assert [sorted(request.classes) for request in federate.requests()] == [[], [], [7], [6]]
    assert federate.state()["pruned_classes"].tolist() == [k in (6, 7) for k in range(10)]


def test_an_image_stays_forgotten_when_the_images_of_another_client_are_removed(federate, tmp_path):
    own = np.random.default_rng(0).integers(0, 256, (72, 8, 8), np.uint8)
    np.savez(tmp_path / "own.npz", images=own, labels=np.arange(72) % 2, clients=np.repeat(["a", "b", "c"], 24))
    words = f"clients=3 data.name=npz data.root={tmp_path / 'own.npz'} data.limit=0 data.test_limit=0"
    words += " partition.kind=column strategy=leave"
    federate(f"{words} rounds=1")
    runtime = ClientRuntime(federate.run().config)
    place = runtime.slices[2][3]
    image = np.array(runtime.dataset.train.images[place])
    ask(federate, ["c"], Selection.by(examples=runtime.dataset.names_of(runtime.slices[2][3:4])))
    ask(federate, ["a"], None)
    federate(f"{words} rounds=2")
    run = federate.run()
    assert [request.state for request in run.ledger.requests()] == [State.COMPLETED] * 2
    federate(f"{words} rounds=3")
    runtime = ClientRuntime(run.config)
    assert runtime.dataset.removed == 20
    portion, rest = (runtime.dataset.train.images[runtime.indices(c, run.ledger.portions())] for c in (3, 2))
    assert np.array_equal(portion, image[None])
    assert not (rest == image).all((1, 2, 3)).any()


def test_the_last_images_of_the_last_client_stay(federate):
    federate("rounds=1 strategy=leave forget.schedule={1:[0,1,2]}")
    ask(federate, [3], Selection.by(classes=range(10)))
    with pytest.raises(UserError, match="REFUSED"):
        federate("rounds=1 strategy=leave forget.schedule={1:[0,1,2]}")
    assert federate.requests()[-1].detail["reason"] == "no client would be left"


def test_of_images_that_are_named_again_the_others_are_forgotten(federate):
    federate("rounds=1 strategy=leave")
    first, second, third = map(str, ClientRuntime(federate.run().config).slices[2][:3])
    for names in ([first, second], [second, third], [second, "99999"]):
        ask(federate, [], Selection.by(examples=names))
    with pytest.raises(UserError, match="REFUSED"):
        federate("rounds=1 strategy=leave")
    requests = federate.requests()
    assert [request.state for request in requests] == [State.COMPLETED, State.COMPLETED, State.REFUSED]
    left = [{s["examples"] for s in r.detail["before"]["forgotten"].values()} for r in requests[:2]]
    assert left == [{2}, {1}]


@pytest.mark.parametrize("patient", ["", " "])
def test_nobody_is_no_patient(federate, patient):
    federate.shared("rounds=1 strategy=leave", name="test")
    with pytest.raises(UserError, match="a patient has no name"):
        federate.run().request([], selection=Selection.by(patients=[patient]))


def test_files_of_ids_are_read_as_windows_writes_them(tmp_path):
    (tmp_path / "ids.txt").write_bytes("\ufeff.\\a\\1.png\r\n\r\ncafe\u0301/2.png \r\na/1.png\r\n".encode())
    selection = Selection.by(examples=read_names(tmp_path / "ids.txt"), patients=["Ame\u0301lie ", "Am\xe9lie"])
    assert selection.examples == ("a/1.png", "caf\xe9/2.png")
    assert selection.patients == ("Am\xe9lie",)


def test_a_class_that_was_chosen_by_its_number_is_named_by_its_name():
    names = ["1", "10", "2"]
    (option,) = Asked(class_="1").options(names)
    assert class_numbers([option.removeprefix("--class=")], names) == [1]
    assert class_numbers(["e\u0301"], ["a", "\xe9"]) == [1]


def test_the_same_portion_again_is_the_same_request(federate):
    federate("rounds=1 strategy=leave")
    run = federate.run()
    (first,), (again,) = (run.request([1], selection=Selection.by(classes=[k])).requests() for k in (3, 3))
    (other,) = run.request([1], selection=Selection.by(classes=[4])).requests()
    assert first.id == again.id != other.id
    (whole,) = run.request([1]).requests()
    (covered,) = run.request([1], selection=Selection.by(classes=[5])).requests()
    assert covered.id == whole.id != other.id


def test_everything_that_a_person_reads_names_the_portion(federate, memorised):
    federate("rounds=1 strategy=leave")
    run = federate.run()
    run.request([1], selection=Selection.by(classes=[3]))
    assert run.named([4]) == "class 3 of client 1"
    assert run.named([0, 2, 4], capital=True) == "Clients 0 and 2 and class 3 of client 1"
    run.ledger.close()
    federate("rounds=2 strategy=leave")
    run = federate.run()
    page = (run.folder / "report" / "index.html").read_text()
    assert "Class 3 of client 1 was forgotten" in page or "request to forget class 3 of client 1" in page
    receipt = run.folder / "receipts" / "r1.json"
    said = verified(receipt.read_bytes())
    assert said.portions == {"4": {"client": 1, "classes": [3]}}
    assert said.who == "class 3 of client 1 (number 4)"
    assert said.examples == {"4": counts_of(federate)[4].sum()}
    assert "asked to forget class 3 of client 1" in receipt.with_suffix(".html").read_text()


def test_a_new_portion_is_covered_by_no_request_about_something_else(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.file([1], first_portion=4)
    old, new = Selection.by(classes=[4]), Selection.by(classes=[9])
    for client in (0, 2):
        ledger.file([client], selection=old, first_portion=4)
    for client in range(4):
        found = ledger.covering([client], new)
        assert [request.id for request in found] == (["r1"] if client == 1 else [])  # which leaves whole
        with nullcontext() if client != 1 else pytest.raises(UserError, match="its settings stay as they are"):
            ledger.check_how([client], {"strategy": "leave"}, new)
    assert [request.id for request in ledger.covering([0], old)] == ["r2"]
    assert [request.id for request in ledger.covering([0, 1, 2], old)] == ["r1", "r2", "r3"]
    assert ledger.covering([0, 3], old) == []
    with pytest.raises(UserError, match="request r2 is RECEIVED: its settings stay as they are"):
        ledger.check_how([0], {"strategy": "leave"}, old)
    (asked,) = ledger.file([3], selection=new, first_portion=4)
    assert (asked.clients, asked.owners) == ([6], [3])
    ledger.close()


def test_who_is_left_with_nothing_by_earlier_requests_was_trained_on(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert nothing_left(ledger, 1, "client 1", 0) == "client 1 has 0 examples and was never trained on"
    (asked,) = ledger.file([1], selection=Selection.by(classes=[4]), first_portion=4)
    ledger.advance(ledger.advance(asked, State.COLLECTING), State.QUARANTINED, reason="why")
    expected = "client 1 has 0 examples beside those of earlier requests: r1 (QUARANTINED)"
    assert nothing_left(ledger, 1, "client 1", 0) == expected
    assert nothing_left(ledger, 2, "client 2", 1) == "client 2 has 1 examples and was never trained on"
    ledger.close()


def test_names_of_portions_do_not_move_up_where_a_request_was_refused():
    portions = {5: Portion(5, 1, Selection.by(patients=["p9"])), 7: Portion(7, 0, Selection.by(classes=[2]))}
    for names in ([], ["ann", "ben", "cy", "dee"]):
        found = with_portions(names, portions, ["a", "b", "c"], {})
        assert list(found[:5]) == [*(names or ["0", "1", "2", "3"]), "4"]
        assert [found[5], found[7]] == [
            f"patient p9 of client {found[1]}",
            f"class 2 (c) of client {found[0]}",
        ]


def test_a_retrained_run_may_number_portions_otherwise(federate):
    federate("rounds=1 strategy=leave")
    for selection in (Selection.by(classes=[2]), Selection.by(classes=[3])):
        ask(federate, [1], selection)
    federate("rounds=2 strategy=leave")
    ledger = Ledger(federate.folder("never") / "ledger.sqlite")
    for selection in (Selection.by(classes=[3]), Selection.by(classes=[2])):
        ledger.file([1], selection=selection, first_portion=4)
    ledger.close()
    for rounds in (1, 2):
        federate(f"rounds={rounds} strategy=leave run=never")
    found = comparison(federate.run(), [federate.run("never")])
    assert len(found) == 2
    ours, theirs = (federate.run(name).metrics()[-1]["forgotten"] for name in ("test", "never"))
    assert f"{theirs['5']['class']:.2f}" in found[0].text
    assert f"{ours['4']['class']:.2f}" in found[0].text


@pytest.mark.parametrize("words", [["--class", "3"], []])
def test_a_key_signs_what_is_selected(federate, tmp_path, words):
    key = keys.new_key(tmp_path / "client.pem")
    settings = f"strategy=leave forget.signed=true forget.keys={{1:{key}}}"
    federate(f"rounds=1 {settings}")
    run, file = federate.run(), tmp_path / "asked.json"
    about = ["--client", "1", "--key", str(tmp_path / "client.pem"), "--run-key", run.ledger.key]
    with pytest.raises(SystemExit) as ended:
        cli(["keys", "ask", str(file), *about, *words])
    assert ended.value.code == 0
    asked = {"signed": read(file.read_bytes()), "selection": Selection.by(classes=[3])}
    if words:
        (request,) = run.request([1], **asked).requests()
        federate(f"rounds=2 {settings}")
        assert run.ledger.request(request.id).state == State.COMPLETED
    else:
        with pytest.raises(UserError, match="turned away"):
            run.request([1], **asked)


def silent_about_images(federate, words, *, times, client=1):
    """Go on with a run in which a client does not say at first how many images are meant."""
    grid, left = LocalGrid(4), [times]

    def deliver(message):
        task = messages.task_of(message)
        if (task.name, task.clients) == ("selected_counts", [client]) and left[0]:
            left[0] -= 1
            return Message(Error(0, "out of memory"), reply_to=message)
        return grid.call(message)

    grid.deliver = deliver
    federate(f"strategy=leave {words}", grid=grid)
    return grid


def trained_in_rounds(federate):
    return [(row["clients"], row["examples"]) for row in federate.run().metrics() if row["kind"] == "round"]


def test_who_cannot_say_what_is_meant_stays_out_alone_and_comes_back_without_it(federate, capsys):
    federate("rounds=1 strategy=leave forget.attempts=2", nodes=4)
    ask(federate, [], Selection.by(classes=[7]))
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        silent_about_images(federate, "rounds=5 forget.attempts=2", times=3)
    assert (
        "client 1 did not say which of its images are meant; set aside, its images stay out" in capsys.readouterr().err
    )
    own, of_class = (counts_of(federate)[rows].sum(1) for rows in (slice(0, 4), slice(4, 8)))
    out = ([0, 2, 3], own.sum() - own[1])
    assert of_class[1] > 0
    assert trained_in_rounds(federate) == [([0, 1, 2, 3], 120), out, out, out, ([0, 1, 2, 3], 120 - of_class.sum())]


def test_who_leaves_whole_is_forgotten_with_what_was_set_aside_of_it(federate, monkeypatch):
    """Client 1 does not say what is meant. Of the others images are counted, set aside, and stay in the model."""
    federate("rounds=1 strategy=leave forget.attempts=1", nodes=4)
    ask(federate, [], Selection.by(classes=[7]))
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        silent_about_images(federate, "rounds=2 forget.attempts=1", times=1)
    asked = []
    monkeypatch.setattr(LeaveAndContinue, "forget", lambda self, federation, forget: asked.append(forget.clients) or {})
    for number, client in enumerate((0, 1, 2), 2):
        run = federate.run()
        assert [request.id for request in run.ledger.unmet()] == ["r1"]
        run.request([client])
        run.ledger.close()
        with pytest.raises(UserError, match="r1 is QUARANTINED"):  # client 3 has not left
            federate("rounds=2 strategy=leave forget.attempts=1", nodes=4)
        assert federate.run().ledger.request(f"r{number}").state == State.COMPLETED
    assert asked == [(0, 4), (1,), (2, 6)]


def test_what_was_set_aside_and_is_asked_again_is_forgotten_whole(federate):
    federate("rounds=1 strategy=leave forget.attempts=1", nodes=4)
    for rounds, times, state in ((2, 1, State.QUARANTINED), (3, 0, State.COMPLETED)):
        foreseen = outlook(federate.run(), range(4), Selection.by(classes=[7]))
        assert (sum(foreseen.images.values()), foreseen.refusal) == (12, "")
        ask(federate, [], Selection.by(classes=[7]))
        with nullcontext() if state == State.COMPLETED else pytest.raises(UserError, match="QUARANTINED"):
            silent_about_images(federate, f"rounds={rounds} forget.attempts=1", times=times)
        request = federate.requests()[-1]
        assert (request.state, request.clients) == (state, [4, 5, 6, 7])
    assert {n: s["examples"] for n, s in request.detail["before"]["forgotten"].items()} == {
        str(n): count for n, count in enumerate(counts_of(federate)[4:, 7], 4)
    }
    assert federate.run().ledger.unmet() == []
    assert verified((federate.folder() / "receipts" / "r2.json").read_bytes()).portions.keys() == {"4", "5", "6", "7"}


def test_images_that_an_earlier_request_set_aside_are_forgotten_by_a_later_one_that_means_them(federate, monkeypatch):
    """Portion 4 has what client 0 has of class 7. An image of it is named again, and one of class 3 is not in it."""
    federate("rounds=1 strategy=leave forget.attempts=1", nodes=4)
    ask(federate, [], Selection.by(classes=[7]))
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        silent_about_images(federate, "rounds=2 forget.attempts=1", times=1)
    runtime, asked = ClientRuntime(federate.run().config), []
    monkeypatch.setattr(LeaveAndContinue, "forget", lambda self, federation, forget: asked.append(forget.clients) or {})
    image = next(i for i in runtime.slices[0] if runtime.dataset.train.labels[i] == 7)
    of_class_3 = next(i for i in runtime.slices[0] if runtime.dataset.train.labels[i] == 3)
    for names, is_refused in (([image], False), ([of_class_3], False), ([image, 99999], True)):
        selection = Selection.by(examples=map(str, names))
        assert bool(outlook(federate.run(), [0], selection).refusal) == is_refused
        ask(federate, [0], selection)
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        federate("rounds=2 strategy=leave forget.attempts=1", nodes=4)
    assert [request.state for request in federate.requests()[1:]] == [State.COMPLETED] * 2 + [State.REFUSED]
    assert asked == [(4,), (9,)]


def test_the_last_image_of_a_client_is_forgotten_with_it(federate, monkeypatch):
    federate("rounds=1 strategy=leave")
    own, asked = ClientRuntime(federate.run().config).slices[1], []
    monkeypatch.setattr(LeaveAndContinue, "forget", lambda self, federation, forget: asked.append(forget.clients) or {})
    ask(federate, [1], Selection.by(examples=map(str, own[1:])))
    federate("rounds=1 strategy=leave")
    assert outlook(federate.run(), [1], None) == ({1: 1}, "")
    ask(federate, [1], None)
    federate("rounds=2 strategy=leave")
    assert [request.state for request in federate.requests()] == [State.COMPLETED] * 2
    assert asked == [(4,), (1,)]
    assert federate.state()["pruned"].tolist() == [False, True, False, False]


def test_in_a_finished_run_a_client_says_first_what_an_earlier_request_means(federate):
    federate("rounds=1 strategy=leave forget.attempts=1", nodes=4)
    ask(federate, [], Selection.by(classes=[7]))
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        silent_about_images(federate, "rounds=1 forget.attempts=1", times=1)
    ask(federate, [1], Selection.by(classes=[3]))
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        federate("rounds=1 strategy=leave forget.attempts=1", nodes=4)
    assert federate.requests()[1].state == State.COMPLETED
    assert {5, 8} <= federate.run().ledger.examples().keys()


def test_who_has_left_whole_is_asked_nothing_for_its_portion_of_an_earlier_request(federate):
    """Client 1 is silent, so that r1 waits. Client 0 leaves meanwhile, and never replies again."""
    federate("rounds=1 strategy=leave", nodes=4)
    ask(federate, [], Selection.by(classes=[7]))
    ask(federate, [0], None)
    grid = LocalGrid(4)

    def deliver(message):
        task, first = messages.task_of(message), federate.requests()[0]
        is_silent = task.name == "selected_counts" and task.clients == [1] and not first.detail.get("attempts")
        has_left = {0, 4} & {*task.clients} and federate.requests()[1].state == State.COMPLETED
        return Message(Error(0, "gone"), reply_to=message) if is_silent or has_left else grid.call(message)

    grid.deliver = deliver
    federate("strategy=leave rounds=3", grid=grid)
    assert [request.state for request in federate.requests()] == [State.COMPLETED] * 2
    assert [request.detail["round"] for request in federate.requests()] == [2, 1]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_client_that_leaves_whole_takes_what_was_not_counted_of_it_along(federate, capsys, silent):
    """Client 0 or 1 is silent about request r1, and client 0 leaves at the same boundary."""
    federate("rounds=1 strategy=leave forget.gate=true forget.budget=1", nodes=4)
    ask(federate, [], Selection.by(classes=[7]))
    ask(federate, [0], None)
    silent_about_images(federate, "rounds=3 forget.gate=true forget.budget=1", times=1, client=silent)
    assert [request.state for request in federate.requests()] == [State.COMPLETED] * 2
    assert federate.run().metrics()[-1]["clients"] == [1, 2, 3]
    federate("rounds=4 strategy=leave forget.gate=true forget.budget=1", nodes=4)


def test_what_nobody_has_is_refused_also_where_its_client_has_left_meanwhile(federate):
    federate("rounds=1 strategy=leave", nodes=4)
    ask(federate, [0], Selection.by(patients=["p9"]))
    ask(federate, [0], None)
    silent_about_images(federate, "rounds=2", times=1, client=0)
    first, second = federate.requests()
    assert (first.state, second.state) == (State.REFUSED, State.COMPLETED)
    assert "was forgotten with other requests meanwhile" in first.detail["reason"]
    assert federate.run().ledger.unmet() == []


def test_a_request_that_would_leave_nobody_is_refused_when_the_last_client_replies(federate):
    federate("rounds=1 strategy=leave forget.attempts=1", nodes=4)
    ask(federate, [], Selection.by(classes=range(10)))
    with pytest.raises(UserError, match="nobody can train"):
        silent_about_images(federate, "rounds=3 forget.attempts=1", times=1)
    with pytest.raises(UserError, match="r1 is REFUSED"):
        federate("rounds=3 strategy=leave forget.attempts=1", nodes=4)
    assert federate.requests()[0].detail["reason"] == "no client would be left"
    assert trained_in_rounds(federate)[-1] == ([0, 1, 2, 3], 120)


def test_what_goes_along_brings_what_it_lacks(federate, monkeypatch):
    """Portion 8 has the other of two named images, and portion 4, of class 9, the first one."""
    federate("rounds=1 strategy=leave forget.attempts=1", nodes=4)
    runtime, asked = ClientRuntime(federate.run().config), []
    own = runtime.slices[0]
    first, other = (next(i for i in own if runtime.dataset.train.labels[i] == k) for k in (9, 7))
    ask(federate, [], Selection.by(classes=[9]))
    ask(federate, [], Selection.by(examples=[str(first), str(other)]))
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        silent_about_images(federate, "rounds=2 forget.attempts=1", times=1)
    monkeypatch.setattr(LeaveAndContinue, "forget", lambda self, federation, forget: asked.append(forget.clients) or {})
    ask(federate, [0], Selection.by(classes=[7]))
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        federate("rounds=3 strategy=leave forget.attempts=1", nodes=4)
    assert (asked, federate.requests()[2].along) == ([(4, 8)], [4, 8])


def test_what_went_along_is_covered_and_on_the_receipt(federate):
    federate("rounds=1 strategy=leave forget.attempts=1", nodes=4)
    ask(federate, [], Selection.by(classes=[7]))
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        silent_about_images(federate, "rounds=2 forget.attempts=1", times=1)
    runtime = ClientRuntime(federate.run().config)
    image = next(i for i in runtime.slices[0] if runtime.dataset.train.labels[i] == 7)
    ask(federate, [0], Selection.by(examples=[str(image)]))
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        federate("rounds=3 strategy=leave forget.attempts=1", nodes=4)
    run = federate.run()
    assert [request.id for request in run.ledger.covering([0], Selection.by(classes=[7]))] == ["r2"]
    assert run.request([0], selection=Selection.by(classes=[7])).requests()[-1].id == "r2"
    receipt = verified((federate.folder() / "receipts" / "r2.json").read_bytes())
    assert (receipt.clients, receipt.along, receipt.examples) == ([8], [4], {"4": 1, "8": 0})
    page = (federate.folder() / "receipts" / "r2.html").read_text()
    assert "class 7 of client 0 (number 4): set aside before, and forgotten along with it" in page


def test_a_moment_of_silence_refuses_no_other_request(federate):
    federate("rounds=1 strategy=leave", nodes=1)
    ask(federate, [], Selection.by(classes=[7]))
    ask(federate, [0], None)
    grid, left = LocalGrid(1), [1]

    def deliver(message):
        if messages.task_of(message).name == "selected_counts" and left[0]:
            left[0] -= 1
            return Message(Error(0, "out of memory"), reply_to=message)
        return grid.call(message)

    grid.deliver = deliver
    federate("strategy=leave rounds=1", grid=grid)
    assert [request.state for request in federate.requests()] == [State.COMPLETED] * 2


def test_a_class_of_everybody_is_asked_of_clients_too_that_were_set_aside(federate):
    federate("rounds=1 strategy=leave")
    run = federate.run()
    (request,) = run.request([2]).requests()
    run.ledger.advance(run.ledger.advance(request, State.COLLECTING), State.QUARANTINED, reason="why")
    run.ledger.close()
    ask(federate, [], Selection.by(classes=[7]))
    with pytest.raises(UserError, match="r1 is QUARANTINED"):
        federate("rounds=2 strategy=leave")
    asked = federate.requests()[1]
    assert (asked.state, asked.owners, asked.classes) == (State.COMPLETED, [0, 1, 2, 3], {7})


def test_a_class_does_not_leave_while_a_client_has_images_of_it(federate):
    """Request r1 for client 3 is refused, r2 for everybody counts on it, and r3 is for client 3 once more."""
    federate("rounds=1 strategy=leave")
    federate.run().request([3], selection=Selection.by(classes=[7]), how={"strategy": "none:Such"}).requests()
    ask(federate, [], Selection.by(classes=[7]))
    with pytest.raises(UserError, match="r1 is REFUSED"):
        federate("rounds=2 strategy=leave")
    assert [request.state for request in federate.requests()] == [State.REFUSED, State.COMPLETED]
    assert not federate.state()["pruned_classes"].any()
    ask(federate, [3], Selection.by(classes=[7]))
    federate("rounds=2 strategy=leave")
    assert [request.classes for request in federate.requests()] == [set(), set(), {7}]
    assert federate.state()["pruned_classes"].tolist() == [k == 7 for k in range(10)]


def test_what_was_counted_for_a_request_that_cannot_be_applied_stays_out(federate):
    """Else it would be among the images of portions that were counted beside it, which nodes then contradict."""
    federate("rounds=1 strategy=leave", nodes=4)
    runtime = ClientRuntime(federate.run().config)
    image = str(runtime.slices[2][0])
    class_ = int(runtime.dataset.train.labels[runtime.slices[2][0]])
    ask(federate, [], Selection.by(examples=[image, "99999"]))
    ask(federate, [2], Selection.by(classes=[class_]))
    silent_about_images(federate, "rounds=3", times=1)
    first, second = federate.requests()
    assert "of the 2 named images 1 were not found" in first.detail["reason"]
    assert (first.state, second.state, second.along) == (State.QUARANTINED, State.COMPLETED, [6])
    examples = federate.run().ledger.examples()
    left = 120 - examples[6] - examples[8]
    assert trained_in_rounds(federate)[-1] == ([0, 1, 2, 3], left)
    federate("rounds=4 strategy=leave", nodes=4)
    assert trained_in_rounds(federate)[-1] == ([0, 1, 2, 3], left)
