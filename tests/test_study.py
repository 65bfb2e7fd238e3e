"""The whole study on digits, as a command; in pieces, and killed."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from safetensors import safe_open

import study_data
from fedunlearn.study.dag.command import UNFINISHED
from study_data import SHORT, TRAIN, results, study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def blocked(tmp_path):
    """An environment in which neither Flower nor Ray can be imported."""
    for name in ("flwr", "ray"):
        (tmp_path / "blocked" / name).mkdir(parents=True)
        (tmp_path / "blocked" / name / "__init__.py").write_text(f'raise ImportError("{name} is blocked")')
    home = tmp_path / "home"
    return os.environ | {"PYTHONPATH": str(tmp_path / "blocked"), "FEDUNLEARN_HOME": str(home)}


def command(*words):
    return [sys.executable, study_data.__file__, "paper", *words]


def without_times(result):
    history = [row[:-1] for row in result.get("history", [])]
    return {name: value for name, value in result.items() if name != "seconds"} | {"history": history}


def test_the_whole_study_on_digits_without_flower_and_ray(tmp_path, blocked):
    words = ["dataset=digits", "scale=laptop", "study.seeds=[0,1]", "study.workers=2"]
    words += ["data.limit=240", "data.test_limit=100"]
    words += ["learning.epochs=2", "search.trials=2", "finetuning.epochs=1", "finetuning.class_weights=[0.5]"]
    words += ["ablation.fractions=[0.1,0.2]", "ablation.retain_fractions=[0.1,0.2]"]
    blocked_import = subprocess.run([sys.executable, "-c", "import flwr"], env=blocked, capture_output=True, text=True)
    assert "flwr is blocked" in blocked_import.stderr
    done = subprocess.run(command(*words), env=blocked, capture_output=True, text=True, timeout=700)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.index("with 2 processes at work") < done.stderr.index("train/no_mtl/seed0: done in")
    assert "train/no_mtl" in done.stdout
    report = tmp_path / "home" / "studies" / "digits-laptop" / "report"
    assert str(report / "index.html") in done.stderr

    for number in (*range(1, 4), *range(5, 11), 17, 18):
        with open(report / "tables" / f"table-{number:02d}.csv") as file:
            rows = list(csv.DictReader(file))
        ours = {row["column"] for row in rows if row["ours"]}
        assert ours == {row["column"] for row in rows}, number
        if 5 <= number <= 10 or number == 18:
            compared = [row for row in rows if row["ours"]]
            assert all(row["retrained"] and row["deviation"] and row["sd"] and row["paper"] for row in compared)
        assert "tabular" in (report / "tables" / f"table-{number:02d}.tex").read_text()
    page, text = (report / "index.html").read_text(), (report / "REPORT.md").read_text()
    assert page.count("<img") == page.count("data:image/svg+xml;base64,") >= 7
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert all(f"Table {number}" in page and f"## Table {number}\n" in text for number in range(1, 19))
    for picture in re.findall(r"\]\((figures/\w+\.svg)\)", text):
        assert "<svg" in (report / picture).read_text()

    tasks = results(tmp_path / "home")
    assert len([name for name in tasks if name.startswith(("train/", "retrained/"))]) == 2 * 12
    for name, result in tasks.items():
        if name.startswith(("ssd/ce", "finetune/ce")):
            assert all(value == 0 for key, value in result["scores"][0].items() if key.startswith("id_client_"))
    check_cells(report, tasks)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("result.json")}
    stages = "study.stages=[train,retrain,unlearn]"
    again = subprocess.run(command(*words, stages), env=blocked, capture_output=True, text=True, timeout=700)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "done in" not in again.stdout + again.stderr
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("result.json")}


def check_cells(report, tasks):
    """Every measured cell of the stage tables, the learning phase, Table 2 and Table 18 against the results' files."""

    def cells(number):
        with open(report / "tables" / f"table-{number:02d}.csv") as file:
            return {(row["row"], row["column"]): row for row in csv.DictReader(file) if row["ours"]}

    labels = {"no_mtl": "Without MTL (SSD)", "ce": "MTL with CE", "ce_dl": "MTL with CE + DL"}
    for number, made, retrained in (
        (5, "finetune/{p}/stage1/seed{s}", "retrained/{p}/0/seed{s}"),
        (7, "finetune/{p}/stage3/seed{s}", "retrained/{p}/0-1-2/seed{s}"),
        (9, "ssd/{p}/plain/class-forgotten-threshold/stage2/seed{s}", "retrained/{p}/0-1/seed{s}"),
    ):
        found, expected = cells(number), 0
        for pipeline, label in labels.items():
            ours, targets = (
                [tasks[name.format(p=pipeline, s=seed)]["scores"][0] for seed in (0, 1)] for name in (made, retrained)
            )
            for column in ours[0]:
                values = np.array([[scores[column] for scores in side] for side in (ours, targets)])
                row, expected = found[label, column], expected + 1
                assert float(row["ours"]) == pytest.approx(values[0].mean(), rel=1e-5)
                assert float(row["sd"]) == pytest.approx(values[0].std(ddof=1), rel=1e-4, abs=1e-9)
                assert float(row["retrained"]) == pytest.approx(values[1].mean(), rel=1e-5)
                assert float(row["deviation"]) == pytest.approx(
                    np.abs(values[0] - values[1]).mean(), rel=1e-4, abs=1e-9
                )
        assert expected == len(found)
    learned = [tasks[f"train/ce/seed{seed}"]["learning"] for seed in (0, 1)]
    for column, name in (("train", "retain"), ("id_train", "id_retain"), ("test", "test")):
        assert float(cells(3)["MTL with CE", column]["ours"]) == pytest.approx(
            np.mean([one[name] for one in learned]), rel=1e-5
        )
    rebound = [tasks[f"rebound/ce_dl/seed{seed}"] for seed in (0, 1)]
    for column, when in (("id_client_0", "after_ssd"), ("id_client_0_after_epoch", "after_epoch")):
        mean = np.mean([one[when]["id_client_0"] for one in rebound])
        assert float(cells(2)["MTL with CE + DL", column]["ours"]) == pytest.approx(mean, rel=1e-5, abs=1e-9)
    pruned = [tasks[f"prune/DeepClean/0.2-0/backbone/seed{seed}"]["curve"][1]["test"] for seed in (0, 1)]
    assert float(cells(18)["DeepClean, 0.2, heads fixed", "test"]["ours"]) == pytest.approx(np.mean(pruned), rel=1e-5)


@pytest.mark.thorough
def test_pieces_give_the_same_as_one_go(tmp_path, monkeypatch, capsys):
    words = [*SHORT, "study.stages=[train,retrain,unlearn]", "study.pipelines=[ce_dl]", "learning.epochs=2"]
    words += ["search.trials=2", "finetuning.epochs=2", "data.limit=240", "data.test_limit=100"]
    found = {}
    for kind, pieces in (("whole", []), ("pieces", ["study.minutes=0"])):
        monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path / kind))
        statuses = []
        while not statuses or statuses[-1] == UNFINISHED:
            statuses.append(study("paper", [*words, *pieces]))
            assert len(statuses) < 60
        assert statuses[-1] == 0
        assert (len(statuses) > 10) == (kind == "pieces")
        found[kind] = {name: without_times(result) for name, result in results(tmp_path / kind).items()}
    assert "time is up: the same command continues" in capsys.readouterr().err
    assert {name.split("/")[0] for name in found["whole"]} >= {
        "train",
        "retrained",
        "fisher",
        "ssd",
        "finetune",
        "tsne",
    }
    assert found["whole"] == found["pieces"]


def processes_of(session):
    """Ids of all processes that were started in a session."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(ProcessLookupError):
            found += [int(pid)] if os.getsid(int(pid)) == session else []
    return found


def wait_until(condition, process=None):
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_killed_in_the_midst_of_training_it_continues(tmp_path, blocked, workers):
    """One worker is the command itself; of two, the command alone is killed, and they must not outlive it.

    They need not keep pace with each other: it is killed when the first of them has an epoch behind it.
    """
    words = [*TRAIN, "learning.epochs=5", f"study.seeds={[*range(workers)]}", f"study.workers={workers}"]
    process = subprocess.Popen(command(*words), env=blocked, stdout=subprocess.DEVNULL, start_new_session=True)
    tasks = tmp_path / "home" / "studies" / "digits-laptop" / "tasks"
    wait_until(lambda: any(tasks.glob("*/partial.safetensors")), process)
    process.kill()
    process.wait()
    wait_until(lambda: not processes_of(process.pid))
    assert not results(tmp_path / "home")
    partials = list(tasks.glob("*/partial.safetensors"))
    with safe_open(partials[0], "pt") as file:
        kept = json.loads(file.metadata()["rows"])
    again = subprocess.run(command(*words), env=blocked, capture_output=True, text=True, timeout=700)
    assert again.returncode == 0, again.stderr
    result = json.loads((partials[0].parent / "result.json").read_text())
    assert len(result["history"]) == 5
    assert result["history"][: len(kept)] == kept  # with the seconds that those epochs took the first time
