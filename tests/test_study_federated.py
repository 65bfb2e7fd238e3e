"""The federated study on a few digits: its command, its steps, its report."""

import csv
import itertools
import json
import math
import os
import statistics
from dataclasses import replace

import pytest

from fedunlearn.federation.client import Worker
from fedunlearn.runs import checkpoint
from fedunlearn.runs.run import BESIDE
from fedunlearn.study.command import main, study_folder
from fedunlearn.study.federated.figures import frontier
from fedunlearn.study.federated.plan import Plan
from fedunlearn.study.federated.settings import load
from fedunlearn.study.federated.tables import Results
from fedunlearn.study.pooled.laboratory import Laboratory
from fedunlearn.study.pooled.scores import score
from strategies import fed_eraser

SMALL = [
    "federated=true", "dataset=digits", "scale=laptop", "clients=4", "data.limit=160", "data.test_limit=60", "rounds=4",
    "train.head_steps=10", "unlearn.rounds=1", "unlearn.tune=fixed", "unlearn.recover=1", "study.after=[0,1]",
    "study.apart=1", "study.order=[0,1]", "study.seeds=[0]", "study.workers=1",
]  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path))
    return tmp_path


def results(home, study="*"):
    found = [json.loads(file.read_text()) for file in home.glob(f"studies/{study}/steps/*/result.json")]
    return {result["step"]: result for result in found}


def test_digits_have_one_size_that_of_a_machine_with_a_gpu_too():
    laptop, full = (load(["federated=true", "dataset=digits", f"scale={scale}"]) for scale in ("laptop", "full"))
    assert replace(full, scale="laptop") == laptop


def test_updates_are_linked_also_where_that_was_stopped_before(home, monkeypatch):
    words = [*SMALL, "study.strategies=[federaser]"]
    assert main([*words, "study.stages=[train,gold]"]) == 0
    link = os.link

    def stops(source, target):
        link(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.link", stops)
        assert main([*words, "study.stages=[forget]"]) == 130
    assert main([*words, "study.stages=[forget]"]) == 0
    assert "forget/federaser/ce_dl/at4/0/seed0" in results(home)


def test_a_client_that_is_left_out_is_named(home, capsys, monkeypatch):
    def breaks(worker, client, round_, **share):
        raise RuntimeError("first line\nadvice")

    monkeypatch.setattr(Worker, "fit", breaks)
    assert main([*SMALL, "study.stages=[train]"]) == 2
    said = capsys.readouterr()
    for node in range(4):
        assert f"base/ce_dl/seed0: round 1: node {node} (clients {node}) is left out: first line" in said.out
    assert "no client answered" in said.err
    assert "overrides" not in said.err


def test_every_strategy_from_one_base_beside_gold(home, capsys):
    assert main(SMALL) == 0
    found = results(home)
    strategies = ("subset", "ssd", "leave", "ascent", "pga", "federaser", "negate")
    names = ["base/ce_dl/seed0", "gold/ce_dl/0/seed0", *(f"forget/{name}/ce_dl/at4/0/seed0" for name in strategies)]
    assert sorted(found) == sorted(names)
    for name in strategies:
        result = found[f"forget/{name}/ce_dl/at4/0/seed0"]
        assert [row["round"] for row in result["scores"] if "mia" in row] == [4, 5]
        assert result["forgets"][0]["clients"] == [0]
    before = [
        next(row for row in found[f"forget/{name}/ce_dl/at4/0/seed0"]["scores"] if row["request"] == "before")
        for name in strategies
    ]
    assert all(row == before[0] for row in before)
    left = [row for row in found["gold/ce_dl/0/seed0"]["scores"] if row["round"] in (4, 5)]
    assert all(row["forgotten"] == [0] and row["id_client_0"] == 0 for row in left)

    said = capsys.readouterr().out
    assert "forget/ssd/ce_dl/at4/0/seed0: ── request r1, forgotten after round 4" in said
    assert "round   5/4" not in said

    report = next(home.glob("studies/*/report/REPORT.md")).read_text()
    assert "| 0 | 1 | gold (retraining) |" in report
    with open(next(home.glob("studies/*/report/results.csv"))) as file:
        rows = {(row["strategy"], row["after"], row["measure"]): row for row in csv.DictReader(file)}
    scored = {row["round"]: row for row in found["forget/subset/ce_dl/at4/0/seed0"]["scores"] if "mia" in row}
    gold = {row["round"]: row for row in left}
    for after in (0, 1):
        cell = rows["subset", str(after), "forgotten"]
        assert float(cell["mean"]) == pytest.approx(scored[4 + after]["client_0"], abs=1e-5)
        distance = abs(scored[4 + after]["client_0"] - gold[4 + after]["client_0"])
        assert float(cell["distance"]) == pytest.approx(distance, abs=1e-5)
        gap = scored[4 + after]["client_0"] - scored[4 + after]["unseen_0"]
        assert float(rows["subset", str(after), "gap"]["mean"]) == pytest.approx(gap, abs=1e-5)
    assert next(home.glob("studies/*/report/story.svg")).stat().st_size > 1000


def test_a_strategy_of_ones_own_beside_the_others_and_anew_when_its_file_changes(home, renewed):
    words = [*SMALL, "study.strategies=[leave,renewed:Renewed]"]
    assert main(words) == 0
    assert results(home)["forget/renewed:Renewed/ce_dl/at4/0/seed0"]["forgets"][0]["renewed"] > 0
    assert "| 0 | 1 | Renewed |" in next(home.glob("studies/*/report/REPORT.md")).read_text()
    renewed.write_text(renewed.read_text() + "# changed")
    assert main([*words, "study.stages=[forget]"]) == 0
    assert len(list(home.glob("studies/*/steps/forget.renewed*/result.json"))) == 2
    assert len(list(home.glob("studies/*/steps/forget.leave*/result.json"))) == 1


def test_the_base_is_the_run_of_the_app_and_stores_every_second_update(home):
    assert main([*SMALL, "study.stages=[train]"]) == 0
    (folder,) = home.glob("studies/*/steps/base*")
    config = load(SMALL).config("ce_dl", "leave", 0)
    stored = sorted((folder / "run" / fed_eraser.FOLDER).iterdir())
    assert len(stored) == 2 * 4
    model, again = Worker(config).model, Worker(config).model
    for round_ in (1, 2, 3, 4):
        kept = checkpoint.load(folder / f"round-0000{round_}.safetensors", model, beside=BESIDE)
    assert "answers.4" in kept
    assert any((a != b).any() for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_requests_in_turn_and_at_once_and_in_pieces_of_time(home):
    words = [*SMALL, "study.strategies=[leave,subset]", "study.scenarios=[sequential,together,moments]"]
    pieces = 0
    while (status := main([*words, "study.minutes=0.02"])) == 3:
        pieces += 1
        assert pieces < 100
    assert status == 0
    assert pieces > 1
    inch = results(home)
    rows = inch["forget/subset/ce_dl/at4/0,1/seed0"]["scores"]
    assert {tuple(row["forgotten"]) for row in rows if "mia" in row} == {(0,), (0, 1)}
    assert [request["clients"] for request in inch["forget/leave/ce_dl/at4/0+1/seed0"]["forgets"]] == [[0, 1]]
    assert "forget/leave/ce_dl/at1/0/seed0" in inch
    assert main([*words, "study.name=whole"]) == 0
    whole = {file.parent.name: json.loads(file.read_text()) for file in home.glob("studies/whole/steps/*/result.json")}
    for folder in (file.parent for file in home.glob("studies/digits*/steps/*/result.json")):
        in_pieces, at_once = json.loads((folder / "result.json").read_text()), whole[folder.name]
        assert in_pieces["scores"] == at_once["scores"], folder.name
        assert in_pieces["files"] == at_once["files"]


def test_a_round_that_was_committed_and_not_measured_is_measured_by_the_next_start(home, monkeypatch):
    words = [*SMALL, "study.strategies=[leave]"]
    answers, calls = Laboratory.answers, itertools.count(1)

    def killed(lab, model):
        if next(calls) % 2 == 0:
            raise KeyboardInterrupt
        return answers(lab, model)

    monkeypatch.setattr(Laboratory, "answers", killed)
    starts = 1
    while main(words) == 130:
        starts += 1
        assert starts < 20
    assert starts > 3
    in_pieces = results(home, "digits*")
    monkeypatch.setattr(Laboratory, "answers", answers)
    assert main([*words, "study.name=whole"]) == 0
    for name, result in results(home, "whole").items():
        assert in_pieces[name]["scores"] == result["scores"], name
        assert in_pieces[name]["files"] == result["files"], name


def test_every_client_in_turn_the_worst_is_named(home):
    words = [
        *SMALL,
        "clients=3",
        "study.order=[0]",
        "study.scenarios=[single,everyone]",
        "study.strategies=[leave,subset]",
    ]
    assert main([*words, "study.seeds=[0,1]"]) == 0
    found = results(home)

    def scores(name, seed, round_):
        return next(row for row in found[f"{name}/seed{seed}"]["scores"] if row["round"] == round_ and "mia" in row)

    distances = {}
    for client in range(3):
        key, names = f"client_{client}", (f"forget/subset/ce_dl/at4/{client}", f"gold/ce_dl/{client}")
        pairs = [[scores(name, seed, 5)[key] for name in names] for seed in (0, 1)]
        distances[client] = statistics.mean(abs(ours - gold) for ours, gold in pairs)
    lines = next(home.glob("studies/*/report/results.csv")).read_text().splitlines()
    assert len(set(lines)) == len(lines)
    worst = max(distances, key=distances.get)
    mean, sd = statistics.mean(distances.values()), statistics.stdev(distances.values())
    report = next(home.glob("studies/*/report/REPORT.md")).read_text()
    cell = f"{mean:.3f} ± {sd:.3f}; client {worst}: {distances[worst]:.3f}"
    assert f"| unseen answers (ours) | 1 | 3 | {cell} |" in report
    golds = [scores("gold/ce_dl/2", seed, 5)["client_2"] for seed in (0, 1)]
    cell = f"{statistics.mean(golds):.3f} ± {statistics.stdev(golds):.3f} ({abs(golds[0] - golds[1]):.3f})"
    assert f"| 2 | 1 | gold (retraining) | {cell} |" in report
    before = [
        next(row for row in found[f"forget/leave/ce_dl/at4/2/seed{seed}"]["scores"] if row["request"] == "before")
        for seed in (0, 1)
    ]
    unseen = [row["unseen_2"] for row in before]
    foretold = [found[f"forget/subset/ce_dl/at4/2/seed{seed}"]["forgets"][0]["predicted"] for seed in (0, 1)]
    cells = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in (unseen, foretold)]
    assert f"| {cells[0]} | {cells[1]} |" in report


def test_of_requests_in_turn_the_last_is_attacked_and_the_first_is_drawn(home, monkeypatch):
    attacked = []

    def watched(answers, forgotten, *, seed):
        attacked.append(list(forgotten))
        return score(answers, forgotten, seed=seed)

    monkeypatch.setattr("fedunlearn.study.federated.runs.score", watched)
    words = [*SMALL, "study.order=[1,0]", "study.scenarios=[sequential]", "study.strategies=[leave]"]
    assert main(words) == 0
    assert [1, 0] in attacked
    assert [0, 1] not in attacked
    assert results(home)["forget/leave/ce_dl/at4/1,0/seed0"]["scores"][-1]["forgotten"] == [0, 1]

    settings = load(words)
    plan = Plan(settings, Laboratory(settings))
    (case,) = plan.cases()
    drawn = frontier(Results(plan, study_folder(settings)), case, "ce_dl")
    assert [len(axes.lines) for axes in drawn.axes] == [1, 1]  # of the first request alone


def test_a_picture_is_drawn_in_the_same_bytes(home):
    assert main([*SMALL, "study.strategies=[leave]"]) == 0
    drawn = {file: file.read_bytes() for file in home.glob("studies/*/report/*.svg")}
    assert main([*SMALL, "study.strategies=[leave]"]) == 0
    assert drawn
    assert drawn == {file: file.read_bytes() for file in drawn}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("unlearn.recovery_rounds=1", "unlearn.recovery_rounds: a federated study measures"),
        ("study.strategies=[sdd]", "study.strategies: sdd is not one of subset, ssd"),
        ("study.after=[1]", "study.after=[1] are not rounds after a request, 0 among them"),
        ("study.order=[0,0]", "names a client twice"),
        ("study.moments=[2]", "study.moments=[2.0] are not shares in 0..1"),
        ("rounds=0", "rounds=0 is not in 1"),
        ("study.only=[bg]*", "study.only=[bg]*: a value cannot be read"),
        ("search.trials=3", "search"),
    ],
)
def test_bad_input_gets_one_line(home, capsys, word, message):
    assert main([*SMALL, word]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_client_with_too_few_images_for_the_attack_is_named_where_everybody_is_forgotten(home, capsys):
    words = [*SMALL, "partition.dirichlet_alpha=0.2", "partition.seed=9", "study.order=[3]"]
    assert main(["--plan", *words]) == 0
    assert main(["--plan", *words, "study.scenarios=[everyone]"]) == 2
    assert "too few for the attack" in capsys.readouterr().err


def test_without_a_client_head_no_client_id_is_measured_and_the_picture_is_of_the_pipeline_with_one(home):
    assert main([*SMALL, "study.pipelines=[no_mtl,ce_dl]", "study.strategies=[subset]"]) == 0
    with open(next(home.glob("studies/*/report/results.csv"))) as file:
        measures = {(row["pipeline"], row["measure"]) for row in csv.DictReader(file)}
    assert {("no_mtl", "forgotten"), ("ce_dl", "id")} <= measures
    assert ("no_mtl", "id") not in measures
    report = next(home.glob("studies/*/report/REPORT.md")).read_text()
    assert "mean over seeds (MTL with CE + DL" in report
    assert math.isfinite(results(home)["forget/subset/no_mtl/at4/0/seed0"]["scores"][-1]["mia"])
