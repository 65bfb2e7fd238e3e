"""The federated study on a few digits: its command, its tasks, its report."""

import csv
import itertools
import json
import math
import os
import re
import statistics
from types import SimpleNamespace

import pytest

from fedunlearn.errors import UserError
from fedunlearn.federation.client import Client
from fedunlearn.federation.server_data import ServerData
from fedunlearn.federation.server_state import ServerState
from fedunlearn.runs import checkpoint
from fedunlearn.runs.page import embedded
from fedunlearn.runs.verdicts import Level
from fedunlearn.schema import fields_of
from fedunlearn.study.dag.command import UNFINISHED, study_folder, wanted
from fedunlearn.study.federated.figures import curve, frontier
from fedunlearn.study.federated.plan import Case
from fedunlearn.study.federated.report import inside, over_clients
from fedunlearn.study.federated.settings import STRATEGIES, FederatedSettings, load
from fedunlearn.study.federated.study import FederatedStudy
from fedunlearn.study.federated.tables import Results, Row, reach
from fedunlearn.study.federated.verdicts import compared, verdicts
from fedunlearn.study.pooled.scores import score
from fedunlearn.study.pooled.workspace import Workspace
from strategies import federaser
from study_data import study

SMALL = [
    "dataset=digits", "scale=laptop", "clients=4", "data.limit=160", "data.test_limit=60", "rounds=2",
    "train.client_head_steps=10", "unlearn.subset.rounds=1", "unlearn.ssd.tune=fixed", "unlearn.ascent.repair_rounds=1",
    "unlearn.pga.repair_rounds=1", "unlearn.negate.repair_rounds=1", "study.after=[0,1]", "study.apart=1",
    "study.order=[0,1]", "study.seeds=[0]", "study.workers=1",
]  # fmt: skip
NO_REPORT = "study.stages=[train,retrain,forget]"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path))
    return tmp_path


def main(words, **options):
    return study("federated", words, **options)


def results(home, name="*"):
    found = [json.loads(file.read_text()) for file in home.glob(f"studies/{name}/tasks/*/result.json")]
    return {result["task"]: result for result in found}


def test_digits_have_one_size_that_of_a_machine_with_a_gpu_too():
    laptop, full = (load(["dataset=digits", f"scale={scale}"]) for scale in ("laptop", "full"))
    assert full.model_copy(update={"scale": "laptop"}) == laptop


@pytest.mark.slow
def test_updates_are_linked_also_where_that_was_stopped_before(home, monkeypatch):
    words = [*SMALL, "study.strategies=[federaser]"]
    assert main([*words, "study.stages=[train]"]) == 0
    link = os.link

    def stops(source, target):
        link(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.link", stops)
        assert main([*words, "study.stages=[forget]"]) == 130
    assert main([*words, "study.stages=[forget]"]) == 0
    assert "forget/federaser/ce_dl/at2/0/seed0" in results(home)


def test_a_client_that_is_left_out_is_named(home, capsys, monkeypatch):
    def breaks(client, model, **options):
        raise RuntimeError("first line\nadvice")

    monkeypatch.setattr(Client, "fit", breaks)
    assert main([*SMALL, "study.stages=[train]"]) == 2
    logged = capsys.readouterr().err
    for node in range(4):
        assert f"base/ce_dl/seed0: round 1: node {node} (clients {node}) is left out: first line" in logged
    assert "no client answered" in logged
    assert "overrides" not in logged


@pytest.mark.slow
def test_every_strategy_from_one_base_beside_the_retrained_model(home, capsys):
    assert main([*SMALL, "rounds=4"]) == 0
    found = results(home)
    strategies = STRATEGIES
    names = [
        "base/ce_dl/seed0",
        "retrained/ce_dl/0/seed0",
        *(f"forget/{name}/ce_dl/at4/0/seed0" for name in strategies),
    ]
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
    retrained = [row for row in found["retrained/ce_dl/0/seed0"]["scores"] if row["round"] in (4, 5)]
    assert all(row["forgotten"] == [0] and row["id_client_0"] == 0 for row in retrained)

    logged = capsys.readouterr().err
    assert "forget/ssd/ce_dl/at4/0/seed0: ── request r1, forgotten after round 4" in logged
    assert "round   5/4" not in logged

    report = next(home.glob("studies/*/report/REPORT.md")).read_text()
    assert "| 0 | 1 | retrained |" in report
    with open(next(home.glob("studies/*/report/results.csv"))) as file:
        rows = {(row["strategy"], row["after"], row["measure"]): row for row in csv.DictReader(file)}
    scored = {row["round"]: row for row in found["forget/subset/ce_dl/at4/0/seed0"]["scores"] if "mia" in row}
    target = {row["round"]: row for row in retrained}
    for after in (0, 1):
        cell = rows["subset", str(after), "forget"]
        assert float(cell["mean"]) == pytest.approx(scored[4 + after]["client_0"], abs=1e-5)
        distance = abs(scored[4 + after]["client_0"] - target[4 + after]["client_0"])
        assert float(cell["distance"]) == pytest.approx(distance, abs=1e-5)
        gap = scored[4 + after]["client_0"] - scored[4 + after]["held_out_0"]
        assert float(rows["subset", str(after), "gap"]["mean"]) == pytest.approx(gap, abs=1e-5)
    costs = {name: float(rows[name, "0", "rounds"]["mean"]) for name in ("leave", "negate", "ascent", "federaser")}
    assert costs == {"leave": 0, "negate": 1, "ascent": 2, "federaser": 2}
    assert next(home.glob("studies/*/report/story.svg")).stat().st_size > 1000
    assert "| `unlearn.negate.repair_rounds` | 1 |" in report


@pytest.mark.slow
def test_a_strategy_of_ones_own_beside_the_others_and_anew_when_its_file_changes(home, renewed):
    words = [*SMALL, "study.strategies=[leave,renewed:Renewed]"]
    assert main(words) == 0
    assert results(home)["forget/renewed:Renewed/ce_dl/at2/0/seed0"]["forgets"][0]["renewed"] > 0
    assert "| 0 | 1 | Renewed |" in next(home.glob("studies/*/report/REPORT.md")).read_text()
    renewed.write_text(renewed.read_text() + "# changed")
    assert main([*words, "study.stages=[forget]"]) == 0
    assert len(list(home.glob("studies/*/tasks/forget.renewed*/result.json"))) == 2
    assert len(list(home.glob("studies/*/tasks/forget.leave*/result.json"))) == 1


def test_the_base_is_the_run_of_the_app_and_stores_every_second_update(home):
    words = [*SMALL, "rounds=4"]
    assert main([*words, "study.stages=[train]"]) == 0
    (folder,) = home.glob("studies/*/tasks/base*")
    config = load(words).config("ce_dl", "leave", 0)
    stored = sorted(federaser.place(folder / "run", 0).iterdir())
    assert len(stored) == 2 * 4
    initial = ServerData(config).model.state_dict()
    for round_ in (1, 2, 3, 4):
        tensors, _ = checkpoint.read_tensors(folder / f"round-0000{round_}.safetensors")
        state = ServerState.from_tensors(round_, tensors)
        assert state.params.keys() == initial.keys()
    assert "4" in state.predictions
    assert any((value != initial[name]).any() for name, value in state.params.items())


@pytest.mark.thorough
@pytest.mark.slow
def test_requests_in_turn_and_at_once_and_in_pieces_of_time(home):
    words = [*SMALL, "study.strategies=[leave]", "study.scenarios=[sequential,together,request_times]"]
    pieces = 0
    while (status := main([*words, NO_REPORT, "study.minutes=0"])) == UNFINISHED:
        pieces += 1
        assert pieces < 100
        if pieces == 5:
            assert main([*words, "study.stages=[report]"]) == 0
    assert status == 0
    assert pieces > 10
    by_inches = results(home)
    rows = by_inches["forget/leave/ce_dl/at2/0,1/seed0"]["scores"]
    assert {tuple(row["forgotten"]) for row in rows if "mia" in row} == {(0,), (0, 1)}
    assert [request["clients"] for request in by_inches["forget/leave/ce_dl/at2/0+1/seed0"]["forgets"]] == [[0, 1]]
    assert "forget/leave/ce_dl/at1/0/seed0" in by_inches
    assert main([*words, NO_REPORT, "study.name=whole"]) == 0
    whole = {file.parent.name: json.loads(file.read_text()) for file in home.glob("studies/whole/tasks/*/result.json")}
    for folder in (file.parent for file in home.glob("studies/digits*/tasks/*/result.json")):
        in_pieces, at_once = json.loads((folder / "result.json").read_text()), whole[folder.name]
        assert in_pieces["scores"] == at_once["scores"], folder.name
        assert in_pieces["files"] == at_once["files"]


@pytest.mark.slow
def test_a_round_that_was_committed_and_not_measured_is_measured_by_the_next_start(home, monkeypatch):
    words = [*SMALL, NO_REPORT, "study.strategies=[leave]"]
    predictions, calls = Workspace.predictions, itertools.count(1)

    def killed(workspace, model):
        if next(calls) % 2 == 0:
            raise KeyboardInterrupt
        return predictions(workspace, model)

    monkeypatch.setattr(Workspace, "predictions", killed)
    starts = 1
    while main(words) == 130:
        starts += 1
        assert starts < 20
    assert starts > 3
    in_pieces = results(home, "digits*")
    monkeypatch.setattr(Workspace, "predictions", predictions)
    assert main([*words, "study.name=whole"]) == 0
    for name, result in results(home, "whole").items():
        assert in_pieces[name]["scores"] == result["scores"], name
        assert in_pieces[name]["files"] == result["files"], name


@pytest.mark.slow
@pytest.mark.thorough
def test_every_client_in_turn_the_worst_is_named(home):
    words = [
        *SMALL,
        "clients=3",
        "study.order=[0]",
        "study.scenarios=[single,everyone]",
        "study.strategies=[subset]",
    ]
    assert main([*words, "study.seeds=[0,1]"]) == 0
    found = results(home)

    def scores(name, seed, round_):
        return next(row for row in found[f"{name}/seed{seed}"]["scores"] if row["round"] == round_ and "mia" in row)

    distances, differences = {}, []
    for client in range(3):
        key, names = f"client_{client}", (f"forget/subset/ce_dl/at2/{client}", f"retrained/ce_dl/{client}")
        pairs = [[scores(name, seed, 3)[key] for name in names] for seed in (0, 1)]
        distances[client] = statistics.mean(abs(ours - retrained) for ours, retrained in pairs)
        differences.append(statistics.mean(ours - retrained for ours, retrained in pairs))
    lines = next(home.glob("studies/*/report/results.csv")).read_text().splitlines()
    assert len(set(lines)) == len(lines)
    worst = max(distances, key=distances.get)
    mean, sd, apart = statistics.mean(differences), statistics.stdev(differences), statistics.mean(distances.values())
    report = next(home.glob("studies/*/report/REPORT.md")).read_text()
    cell = f"{mean:+.3f} ± {sd:.3f} ({apart:.3f}; client {worst}: {distances[worst]:.3f})"
    assert f"| dampen + relabel (ours) | 1 | 3 | {cell} |" in report
    assert len(re.findall(r"\| dampen \+ relabel \(ours\) \| 3 \|( [\d.]+ ± [\d.]+ \|){5}", report)) == 1
    targets = [scores("retrained/ce_dl/2", seed, 3)["client_2"] for seed in (0, 1)]
    cell = f"{statistics.mean(targets):.3f} ± {statistics.stdev(targets):.3f} ({abs(targets[0] - targets[1]):.3f})"
    assert f"| 2 | 1 | retrained | {cell} |" in report
    before = [
        next(row for row in found[f"forget/subset/ce_dl/at2/2/seed{seed}"]["scores"] if row["request"] == "before")
        for seed in (0, 1)
    ]
    held_out = [row["held_out_2"] for row in before]
    estimated = [found[f"forget/subset/ce_dl/at2/2/seed{seed}"]["forgets"][0]["predicted"] for seed in (0, 1)]
    cells = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in (held_out, estimated)]
    assert f"| {cells[0]} | {cells[1]} |" in report


@pytest.mark.slow
def test_of_requests_in_turn_the_last_is_attacked_and_the_first_is_drawn(home, monkeypatch):
    attacked = []

    def watched(predictions, forgotten, *, seed):
        attacked.append(list(forgotten))
        return score(predictions, forgotten, seed=seed)

    monkeypatch.setattr("fedunlearn.study.federated.runs.score", watched)
    words = [*SMALL, NO_REPORT, "study.order=[1,0]", "study.scenarios=[sequential]", "study.strategies=[leave]"]
    assert main(words) == 0
    assert [1, 0] in attacked
    assert [0, 1] not in attacked
    assert results(home)["forget/leave/ce_dl/at2/1,0/seed0"]["scores"][-1]["forgotten"] == [0, 1]

    small = FederatedStudy(words)
    (case,) = small.plan.cases()
    drawn = frontier(Results(small.plan, study_folder(small)), case, "ce_dl")
    assert [len(axes.lines) for axes in drawn.axes] == [1, 1]  # of the first request alone


CASE = Case("single", 4, ((0, (0,)),))
RIGHT = {"retrained": [0.5, 0.54], "leave": [0.9, 0.94], "subset": [0.51, 0.53], "ssd": [0.2, 0.2]}


def row(strategy, after, values=None, *, test=(0.8, 0.8), forgotten=(0,)):
    """A row of two seeds, in which the retrained model gets what is above."""
    values = {"forget": list(values or RIGHT[strategy]), "retain": [0.9, 0.9], "test": list(test)}
    retrained = {"forget": RIGHT["retrained"], "retain": [0.9, 0.9], "test": [0.8, 0.8]}
    return Row(CASE, "ce_dl", strategy, forgotten, after, values, retrained, dict(retrained))


def measured(rows, *, work=5.0):
    """Results of which nothing is read but these rows."""
    plan = SimpleNamespace(settings=SimpleNamespace(study=SimpleNamespace(after=[0, 10])))
    return SimpleNamespace(plan=plan, rows=lambda *of: rows, costs=lambda *of: {"work": [work]})


def test_by_hand_95_of_100_pairs_of_retrained_models_are_within_reach():
    """Variances 0.0008 and 0.0002 of two requests, one degree of freedom each: t_2 = 4.303.

    Of a second request or of another time is the same; two strategies at one time have the same retrained models.
    """
    for other in (row("leave", 10, forgotten=(1,)), row("leave", 3)):
        other.models["forget"] = [0.40, 0.42]
        rows = [row("leave", 10), row("ssd", 10), other]
        assert reach(rows, "forget") == pytest.approx(4.3027 * math.sqrt(2 * (0.0008 + 0.0002) / 2), rel=1e-4)
    assert math.isnan(reach([], "forget"))


def test_by_hand_over_clients_differences_of_two_signs_cancel_out_and_distances_do_not():
    """Client 0 is 0.01 below at both seeds in the mean, client 1 0.04 above; a retrained model is its own measure."""
    rows = [row("leave", 10, (0.46, 0.56)), row("leave", 10, (0.55, 0.57), forgotten=(1,))]
    assert over_clients(rows, "forget") == "+0.015 ± 0.035 (0.035; client 1: 0.040)"
    assert over_clients([row("retrained", 10)], "forget") == "(0.040; client 0: 0.040)"
    assert over_clients(rows, "mia") == "–"


def test_further_retrained_models_say_how_far_two_are_apart():
    one = row("retrained", 10)
    one.models["forget"] = [0.5, 0.6]
    assert one.distance("forget") == pytest.approx(0.1)
    assert reach([one], "forget") == pytest.approx(12.7062 * 0.1, rel=1e-4)  # t_1, sqrt(2 s^2) = 0.1


def test_a_model_is_inside_where_it_is_as_near_as_retrained_models_are_to_each_other():
    assert inside([row("leave", 10, [0.5 + 0.11, 0.54])], 0.1) == "1 of 2 (± 0.100)"
    assert inside([row("retrained", 10)], 0.1) == "(± 0.100)"
    alone = row("leave", 10, [0.5])
    alone.models["forget"] = [0.5]
    assert inside([alone], reach([alone], "forget")) == "–"


def test_a_curve_has_the_model_before_and_after_each_request_of_several_in_turn():
    """Clients 0 and 1 have 3 and 1 of the images; requests come after rounds 4 and 6."""
    right = [(4, [], 1.0, 1.0), (4, [0], 0.6, 0.9), (6, [0], 0.4, 0.8), (6, [0, 1], 0.3, 0.4)]
    rows = [{"round": at, "forgotten": who, "client_0": a, "client_1": b} for at, who, a, b in right]
    plan = SimpleNamespace(settings=SimpleNamespace(study=SimpleNamespace(seeds=[0])), forget=lambda *of: None)
    results = SimpleNamespace(plan=plan, scores=lambda task: rows)
    one, both = ({"client_0": 3}, {"client_0": 3, "client_1": 1})
    for columns, values in ((one, [1.0, 0.6, 0.4, 0.3]), (both, [1.0, 0.675, 0.5, 0.325])):
        rounds, found = zip(*curve(results, CASE, "ce_dl", "subset", columns), strict=True)
        assert rounds == (4, 4, 6, 6)
        assert found == pytest.approx(values)


def test_by_hand_what_resurfaces_is_the_part_of_the_gap_that_has_come_back():
    """Of two seeds of three; of the third the run is not done yet, and a fourth had nothing to forget."""
    gaps = {0: (1.0, 0.0, 0.1), 1: (0.9, 0.1, 0.1), 3: (0.52, 0.0, 0.3)}  # accuracy before, gap when applied, gap now
    tasks = {
        seed: {"scores": [{"request": "before", "client_0": a, "held_out_0": 0.5}]} for seed, (a, _, _) in gaps.items()
    }
    found = SimpleNamespace(
        sizes=[100],
        plan=SimpleNamespace(
            settings=SimpleNamespace(study=SimpleNamespace(seeds=[0, 1, 2, 3])), forget=lambda *of: of[-1]
        ),
        scores=lambda task: tasks[task]["scores"],
        scored=lambda task, round_, _: task in gaps and {"gap": gaps[task][1 if round_ == CASE.round else 2]},
    )
    assert Results.resurfaced(found, row("subset", 10)) == pytest.approx([0.2, 0.0])
    assert Results.resurfaced(found, row("subset", 0)) == []


def test_by_hand_work_is_beside_as_many_rounds_as_before_each_with_that_of_the_median_round_after(monkeypatch):
    """Work 3 and 1 for the request after four rounds, of 2 each: a half. The first round after may be a slow one."""
    cost = {"relabel": {"work": 3.0, "queries": 2, "bytes": 4e6}, "evaluate": {"work": 1.0, "queries": 5, "bytes": 1e6}}
    result = {"forgets": [{"costs": cost, "seconds": 7.0, "stored_bytes": 0}]}
    result["rounds"] = {"5": {"work": 9.0}, "6": {"work": 2.0}, "7": {"work": 2.0}}
    study = SimpleNamespace(seeds=[0])
    plan = SimpleNamespace(
        settings=SimpleNamespace(study=study), forget=lambda *of: None, workspace=SimpleNamespace(slices=[])
    )
    results = Results(plan, None)
    monkeypatch.setattr(results, "of", lambda task: result)
    found = results.costs(CASE, "ce_dl", "subset")
    assert found == {"work": [50.0], "rounds": [2], "bytes": [5.0], "seconds": [7.0], "stored": [0.0]}
    result["rounds"] = {}
    assert math.isnan(results.costs(CASE, "ce_dl", "subset")["work"][0])


def test_of_several_patterns_the_first_ones_tasks_come_first_and_none_twice(home):
    chosen = FederatedStudy([*SMALL, "study.strategies=[subset,leave]", "study.only=forget/leave/* base/* */seed0"])
    names = [task.name for task in wanted(chosen)]
    assert names[:2] == ["forget/leave/ce_dl/at2/0/seed0", "base/ce_dl/seed0"]
    assert sorted(names[2:]) == ["forget/subset/ce_dl/at2/0/seed0", "retrained/ce_dl/0/seed0"]


def test_retrained_models_of_further_seeds_are_tasks_of_their_own(home):
    names = [task.name for task in FederatedStudy([*SMALL, "study.retrained_seeds=[5]"]).plan.tasks()]
    assert names.count("retrained/ce_dl/0/seed5") == names.count("retrained/ce_dl/0/seed0") == 1
    assert not [name for name in names if "seed5" in name and not name.startswith("retrained")]


def test_a_strategy_that_gets_worse_with_time_lies_within_the_axes():
    near, far = [0.55, 0.59], [0.9, 0.94]
    rows = [row("leave", 0, near), row("leave", 10, far), row("retrained", 0), row("retrained", 10)]
    drawn = frontier(measured(rows, work=130.0), CASE, "ce_dl")
    embedded(drawn)
    for axes, distance in zip(drawn.axes, (0.05, 0.4), strict=True):
        (bottom, top), (left, right) = axes.get_ylim(), axes.get_xlim()
        point = next(line for line in axes.lines if line.get_linestyle() == "None")
        assert point.get_ydata() == pytest.approx([distance])
        assert bottom == 0 < distance < top
        assert left < 130 < right
        assert axes.get_xscale() == "symlog"


def test_a_label_is_taken_literally_in_pictures(monkeypatch):
    monkeypatch.setattr("fedunlearn.study.federated.figures.label", lambda strategy: r"$\frac$")
    drawn = frontier(measured([row("leave", 0), row("leave", 10)]), CASE, "ce_dl")
    embedded(drawn)
    assert drawn.axes[0].get_legend().get_texts()[0].get_text().startswith(r"$\frac$: retain")


SIZES = {"forget": 500, "test": 1000}


def test_verdicts_name_the_nearest_strategy_first_and_how_far_it_is_from_the_retrained_model():
    rows = [row(s, after) for s in ("leave", "ssd", "subset", "retrained") for after in (0, 10)]
    said = verdicts(compared(rows, (0,), SIZES))
    assert [(one.title, one.level) for one in said] == [
        ("dampen + relabel (ours): like the retrained model", Level.GOOD),
        ("SSD: forgets too much", Level.WARNING),
        ("leave and continue: knows more", Level.WARNING),
    ]
    # of 500 images at 0.52, twice: sqrt(2 * 0.2496 / 500) = 0.03, more than over the seeds
    text = "10 rounds after the request the model gets 0.52 of the images of client 0 right, the retrained model 0.52"
    assert f"{text} (difference +0.00 ± 0.03). The two cannot be told apart." in said[0].text


def test_seeds_that_differ_more_than_images_explain_widen_the_error():
    rows = [row("leave", 10, [0.5, 0.94])]
    (one,) = compared(rows, (0,), SIZES)
    assert one.forget.value == pytest.approx(0.2)
    assert one.forget.error == pytest.approx(0.2)  # of 0 and 0.4
    assert verdicts([one])[0].level == Level.GOOD


def test_strategies_are_compared_at_a_time_that_was_measured_of_all():
    rows = [row("leave", 0), row("leave", 10), row("ssd", 0), row("ssd", 10, forgotten=(0, 1))]
    assert {(one.row.strategy, one.row.after) for one in compared(rows, (0,), SIZES)} == {("leave", 0), ("ssd", 0)}


def test_a_case_in_which_leaving_is_like_retraining_is_called_too_easy():
    rows = [row("leave", 10, RIGHT["retrained"]), row("subset", 10)]
    said = verdicts(compared(rows, (0,), SIZES))
    assert said[0].title == "Too easy"
    assert all(one.level == Level.PLAIN for one in said)


def test_forgetting_that_harms_the_model_has_its_price_told():
    (said,) = verdicts(compared([row("subset", 10, test=(0.7, 0.7))], (0,), SIZES))
    assert (said.title, said.level) == ("dampen + relabel (ours): forgotten at a price", Level.WARNING)
    assert "fewer of the test images right: −0.10 ± 0.02" in said.text


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A state folder with a study of one strategy, and its report."""
    folder = tmp_path_factory.mktemp("reported")
    assert main([*SMALL, "study.strategies=[leave]", f"study.home={folder}"]) == 0
    return folder


def test_the_page_holds_all_that_the_report_says(reported):
    (page,) = reported.glob("studies/*/report/index.html")
    text = page.read_text()
    assert not re.findall(r'(?:src|srcset|href)="(?!data:|#)', text)
    assert text.count("data:image/svg+xml;base64,") == 4  # two figures, each for a light and for a dark page
    report = (page.parent / "REPORT.md").read_text()
    (line,) = re.findall(r"^\| 0 \| 1 \| leave and continue \| (.*) \|$", report, re.MULTILINE)
    cells = line.split(" | ")
    assert all(f">{cell}<".replace("± ", "±\u00a0") in text for cell in cells)
    accuracies = cells[:5]
    assert all(re.match(r"-?\d\.\d{3} ± 0\.\d{3} \(", cell) for cell in accuracies), accuracies
    assert "leave and continue: " in text
    assert "<code>study.order</code>" in text


def test_a_picture_is_drawn_in_the_same_bytes(reported):
    drawn = {file: file.read_bytes() for file in reported.glob("studies/*/report/*.svg")}
    for file in drawn:
        file.unlink()
    assert main([*SMALL, "study.strategies=[leave]", f"study.home={reported}"]) == 0
    assert drawn
    assert drawn == {file: file.read_bytes() for file in drawn}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("forget.rounds_until_completed=1", "forget.rounds_until_completed is no setting"),
        ("unlearn.rounds=1", "unlearn is not of this form: settings of the strategies, by strategy"),
        ("unlearn.ssd.alfa=1", "unlearn.ssd.alfa is no setting of strategy=ssd: did you mean unlearn.ssd.alpha?"),
        ("unlearn.ssd.alpha=-1", "unlearn.ssd.alpha=-1 is not in 0"),
        ("unlearn.sdd.alpha=1", "unlearn.sdd names no strategy: did you mean unlearn.ssd?"),
        ("study.strategies=[sdd]", "study.strategies: sdd is not one of subset, relabel"),
        ("study.after=[1]", "study.after=[1] are not rounds after a request, 0 among them"),
        ("study.order=[0,0]", "names a client twice"),
        ("study.request_times=[2]", "study.request_times=[2.0] are not fractions in 0..1"),
        ("rounds=0", "rounds=0 is not in 1"),
        ("search.trials=3", "search.trials is no setting"),
    ],
)
def test_bad_input_gets_one_line(home, capsys, word, message):
    assert main([*SMALL, word]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_client_with_too_few_images_for_the_attack_is_named_where_everybody_is_forgotten(home, capsys):
    words = [*SMALL, "partition.dirichlet_alpha=0.2", "partition.seed=9", "study.order=[3]"]
    assert main(words, only_plan=True) == 0
    assert main([*words, "study.scenarios=[everyone]"], only_plan=True) == 2
    assert "too few for the attack" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.thorough
def test_without_a_client_head_no_client_id_is_measured_and_the_picture_is_of_the_pipeline_with_one(home):
    assert main([*SMALL, "study.pipelines=[no_mtl,ce_dl]", "study.strategies=[subset]"]) == 0
    with open(next(home.glob("studies/*/report/results.csv"))) as file:
        measures = {(row["pipeline"], row["measure"]) for row in csv.DictReader(file)}
    assert {("no_mtl", "forget"), ("ce_dl", "id")} <= measures
    assert ("no_mtl", "id") not in measures
    report = next(home.glob("studies/*/report/REPORT.md")).read_text()
    assert "mean over seeds (MTL with CE + DL" in report
    assert math.isfinite(results(home)["forget/subset/no_mtl/at2/0/seed0"]["scores"][-1]["mia"])


def test_every_setting_has_a_description():
    assert not [name for name, declared in fields_of(FederatedSettings) if not declared.description]


def test_settings_of_a_strategy_do_its_tasks_again_and_no_others():
    words = [*SMALL, "study.strategies=[ssd,negate]"]
    keys = [
        {task.name: task.key for task in FederatedStudy([*words, *more]).plan.tasks(("train", "retrain", "forget"))}
        for more in ([], ["unlearn.ssd.alpha=3"])
    ]
    assert keys[0].keys() == keys[1].keys()
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["forget/ssd/ce_dl/at2/0/seed0"]


def test_two_strategies_that_keep_something_of_the_base_cannot_share_it(renewed):
    renewed.write_text(f"{renewed.read_text()}\n    def carry_over(self, base, run, round_):\n        pass\n")
    with pytest.raises(UserError, match="federaser and renewed:Renewed both keep something of the base run"):
        load([*SMALL, "study.strategies=[federaser,renewed:Renewed]"])
