"""The whole study on digits, as a command; in pieces, killed, and on bad input."""

import csv
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from hashlib import md5

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open

from fedunlearn.study.command import UNFINISHED, main

SHORT = ["dataset=digits", "scale=laptop", "study.workers=1", "study.seeds=[0]", "study.order=[0]"]
TRAIN = [*SHORT, "study.stages=[train]", "study.pipelines=[ce_dl]", "learning.epochs=3"]


@pytest.fixture
def blocked(tmp_path):
    """An environment in which neither Flower nor Ray can be imported."""
    for name in ("flwr", "ray"):
        (tmp_path / "blocked" / name).mkdir(parents=True)
        (tmp_path / "blocked" / name / "__init__.py").write_text(f'raise ImportError("{name} is blocked")')
    home = tmp_path / "home"
    return os.environ | {"PYTHONPATH": str(tmp_path / "blocked"), "FEDUNLEARN_HOME": str(home)}


def command(*words):
    return [sys.executable, "-m", "fedunlearn.study", *words]


def results(home, study="digits-laptop"):
    found = [json.loads(file.read_text()) for file in (home / "studies" / study / "steps").glob("*/result.json")]
    return {result["step"]: result for result in found}


def without_times(result):
    history = [row[:-1] for row in result.get("history", [])]
    return {name: value for name, value in result.items() if name != "seconds"} | {"history": history}


def test_the_whole_study_on_digits_without_flower_and_ray(tmp_path, blocked):
    words = ["dataset=digits", "scale=laptop", "study.seeds=[0,1]", "study.workers=2"]
    blocked_import = subprocess.run([sys.executable, "-c", "import flwr"], env=blocked, capture_output=True, text=True)
    assert "flwr is blocked" in blocked_import.stderr
    done = subprocess.run(command(*words), env=blocked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.index("with 2 processes at work") < done.stdout.index("train/no_mtl/seed0: done in")
    report = tmp_path / "home" / "studies" / "digits-laptop" / "report"
    assert str(report / "index.html") in done.stdout

    for number in (*range(1, 4), *range(5, 11), 17, 18):
        with open(report / "tables" / f"table-{number:02d}.csv") as file:
            rows = list(csv.DictReader(file))
        ours = {row["column"] for row in rows if row["ours"]}
        assert ours == {row["column"] for row in rows}, number
        if 5 <= number <= 10 or number == 18:
            compared = [row for row in rows if row["ours"]]
            assert all(row["gold"] and row["deviation"] and row["sd"] and row["paper"] for row in compared)
        assert "tabular" in (report / "tables" / f"table-{number:02d}.tex").read_text()
    page, text = (report / "index.html").read_text(), (report / "REPORT.md").read_text()
    assert page.count("<img") == page.count("data:image/svg+xml;base64,") >= 7
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert all(f"Table {number}" in page and f"## Table {number}\n" in text for number in range(1, 19))
    for picture in re.findall(r"\]\((figures/\w+\.svg)\)", text):
        assert "<svg" in (report / picture).read_text()

    steps = results(tmp_path / "home")
    assert len([name for name in steps if name.startswith(("train/", "gold/"))]) == 2 * 12
    for name, result in steps.items():
        if name.startswith(("ssd/ce", "finetune/ce")):
            assert all(value == 0 for key, value in result["scores"][0].items() if key.startswith("id_client_"))
    check_cells(report, steps)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("result.json")}
    again = subprocess.run(command(*words), env=blocked, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "done in" not in again.stdout
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("result.json")}


def check_cells(report, steps):
    """Every measured cell of the stage tables, the learning phase, Table 2 and Table 18 against the results' files."""

    def cells(number):
        with open(report / "tables" / f"table-{number:02d}.csv") as file:
            return {(row["row"], row["column"]): row for row in csv.DictReader(file) if row["ours"]}

    labels = {"no_mtl": "Without MTL (SSD)", "ce": "MTL with CE", "ce_dl": "MTL with CE + DL"}
    for number, made, gold in (
        (5, "finetune/{p}/stage1/seed{s}", "gold/{p}/0/seed{s}"),
        (7, "finetune/{p}/stage3/seed{s}", "gold/{p}/0-1-2/seed{s}"),
        (9, "ssd/{p}/plain/class-forgotten-threshold/stage2/seed{s}", "gold/{p}/0-1/seed{s}"),
    ):
        found, expected = cells(number), 0
        for pipeline, label in labels.items():
            ours, golds = (
                [steps[name.format(p=pipeline, s=seed)]["scores"][0] for seed in (0, 1)] for name in (made, gold)
            )
            for column in ours[0]:
                values = np.array([[scores[column] for scores in side] for side in (ours, golds)])
                row, expected = found[label, column], expected + 1
                assert float(row["ours"]) == pytest.approx(values[0].mean(), rel=1e-5)
                assert float(row["sd"]) == pytest.approx(values[0].std(ddof=1), rel=1e-4, abs=1e-9)
                assert float(row["gold"]) == pytest.approx(values[1].mean(), rel=1e-5)
                assert float(row["deviation"]) == pytest.approx(
                    np.abs(values[0] - values[1]).mean(), rel=1e-4, abs=1e-9
                )
        assert expected == len(found)
    learned = [steps[f"train/ce/seed{seed}"]["learning"] for seed in (0, 1)]
    for column, name in (("train", "others"), ("id_train", "id_others"), ("test", "test")):
        assert float(cells(3)["MTL with CE", column]["ours"]) == pytest.approx(
            np.mean([one[name] for one in learned]), rel=1e-5
        )
    rebound = [steps[f"rebound/ce_dl/seed{seed}"] for seed in (0, 1)]
    for column, when in (("id_client_0", "after_ssd"), ("id_client_0_after_epoch", "after_epoch")):
        mean = np.mean([one[when]["id_client_0"] for one in rebound])
        assert float(cells(2)["MTL with CE + DL", column]["ours"]) == pytest.approx(mean, rel=1e-5, abs=1e-9)
    pruned = [steps[f"prune/DeepClean/0.2-0/backbone/seed{seed}"]["curve"][1]["test"] for seed in (0, 1)]
    assert float(cells(18)["DeepClean, 0.2, heads fixed", "test"]["ours"]) == pytest.approx(np.mean(pruned), rel=1e-5)


def test_pieces_give_the_same_as_one_go(tmp_path, monkeypatch, capsys):
    words = [*SHORT, "study.stages=[train,gold,unlearn]", "study.pipelines=[ce_dl]", "learning.epochs=2"]
    words += ["search.trials=3", "finetuning.epochs=2"]
    found = {}
    for kind, pieces in (("whole", []), ("pieces", ["study.minutes=0"])):
        monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path / kind))
        statuses = []
        while not statuses or statuses[-1] == UNFINISHED:
            statuses.append(main([*words, *pieces]))
            assert len(statuses) < 60
        assert statuses[-1] == 0
        assert (len(statuses) > 10) == (kind == "pieces")
        found[kind] = {name: without_times(result) for name, result in results(tmp_path / kind).items()}
    assert "time is up: the same command continues" in capsys.readouterr().out
    assert {name.split("/")[0] for name in found["whole"]} >= {"train", "gold", "fisher", "ssd", "finetune", "tsne"}
    assert found["whole"] == found["pieces"]


def test_killed_in_the_midst_of_training_it_continues(tmp_path, blocked):
    words = [*TRAIN, "learning.epochs=150"]
    process = subprocess.Popen(command(*words), env=blocked, stdout=subprocess.DEVNULL, start_new_session=True)
    steps = tmp_path / "home" / "studies" / "digits-laptop" / "steps"
    deadline = time.monotonic() + 120
    while not list(steps.glob("*/partial.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not results(tmp_path / "home")
    (partial,) = steps.glob("*/partial.safetensors")
    with safe_open(partial, "pt") as file:
        kept = json.loads(file.metadata()["rows"])
    again = subprocess.run(command(*words), env=blocked, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    (result,) = results(tmp_path / "home").values()
    assert len(result["history"]) == 150
    assert result["history"][: len(kept)] == kept  # with the seconds that those epochs took the first time


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study.stages=[table5]"], "study.stages: table5 is not one of train, gold"),
        (["study.only=table-5"], "study.only=table-5 matches no step of train"),
        (["data.limit=40"], r"client \d has \d images, too few for the attack's 5 folds"),
        (["data.limit=60", "partition.dirichlet_alpha=0.02"], r"client \d has (no image|\d images)"),
        (
            ["study.stages=[unlearn]"],
            r"fisher/no_mtl/class/all/seed0 needs train/no_mtl/seed0, which was not asked for",
        ),
    ],
)
def test_bad_input_gets_one_line(home, capsys, words, message):
    assert main([*SHORT, *words]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error


def test_a_folder_of_another_study_and_a_damaged_model_are_named_and_kept(home, capsys):
    assert main(TRAIN) == 0
    before = results(home)
    assert main([*TRAIN, "model.width=16"]) == 2
    assert re.search(r"is a study with model=.*'width': 8.*: choose another study.name", capsys.readouterr().err)
    assert results(home) == before
    (model,) = home.rglob("model.safetensors")
    model.write_bytes(model.read_bytes()[:-1])
    words = [*SHORT, "study.pipelines=[ce_dl]", "learning.epochs=3", "study.stages=[unlearn]", "study.only=fisher/*"]
    assert main(words) == 2
    assert re.search(r"model.safetensors was cut short or changed .*: delete", capsys.readouterr().err)
    assert results(home) == before


def test_other_settings_of_one_part_do_that_part_again(home, capsys):
    assert main(TRAIN) == 0
    assert main([*TRAIN, "learning.epochs=4"]) == 0
    assert len(list(home.rglob("result.json"))) == 2
    assert main([*TRAIN, "search.trials=7"]) == 0
    assert len(list(home.rglob("result.json"))) == 2


def cifar100_folder(folder, per_class=3):
    """CIFAR-100 unpacked, in its own format, with few images."""
    source, random = torchvision.datasets.CIFAR100, np.random.default_rng(0)
    base = folder / source.base_folder
    base.mkdir(parents=True)
    for (file, _), count in ((source.train_list[0], per_class), (source.test_list[0], 1)):
        labels = np.repeat(np.arange(100), count).tolist()
        rows = {"data": random.integers(0, 256, (len(labels), 3072), np.uint8), "fine_labels": labels}
        (base / file).write_bytes(pickle.dumps(rows))
    meta = {source.meta["key"]: [f"class {k}" for k in range(100)]}
    (base / source.meta["filename"]).write_bytes(pickle.dumps(meta))
    return base


def test_cifar100(home, monkeypatch):
    source, base = torchvision.datasets.CIFAR100, cifar100_folder(home / "data" / "cifar100")
    for part in ("train_list", "test_list"):
        checked = [[file, md5((base / file).read_bytes()).hexdigest()] for file, _ in getattr(source, part)]
        monkeypatch.setattr(source, part, checked)
    meta = source.meta | {"md5": md5((base / source.meta["filename"]).read_bytes()).hexdigest()}
    monkeypatch.setattr(source, "meta", meta)
    words = [
        "dataset=cifar100",
        "scale=laptop",
        "study.workers=1",
        "study.seeds=[0]",
        "data.limit=300",
        "data.test_limit=100",
    ]
    words += [
        "model.width=8",
        "learning.epochs=1",
        "search.trials=2",
        "finetuning.epochs=1",
        "study.pipelines=[no_mtl]",
    ]
    words += ["study.order=[0]", "study.stages=[train,gold,unlearn,report]", "partition.kind=iid"]
    assert main(words) == 0
    tables = home / "studies" / "cifar100-laptop" / "report" / "tables"
    for number, filled in ((4, True), (14, True), (11, True), (5, False), (3, False)):
        with open(tables / f"table-{number:02d}.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["row"].startswith("Without") and row["paper"]]
        assert all(bool(row["ours"]) == filled for row in rows), number


class TinyClip(torch.nn.Module):
    """Like CLIP's TorchScript archives: images of 224 pixels a side in, embeddings out."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 6, 32, 32)

    @torch.jit.export
    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode_image(images)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_every_other_reading_in_another_order(home):
    """The settings that the other tests leave alone, all at once."""
    torch.jit.script(TinyClip()).save(str(home / "clip.pt"))
    words = [
        "dataset=digits",
        "scale=laptop",
        "study.workers=1",
        "study.seeds=[4]",
        "study.order=[7,2]",
        "learning.epochs=1",
    ]
    words += ["study.pipelines=[ce]", "fisher.head=client", "fisher.full=base", "fisher.estimator=batch"]
    words += ["search.reading=exponent", "search.recalibrate=true", "search.objective=weighted", "search.trials=2"]
    words += ["study.stages=[train,gold,unlearn,report]", f"study.clip={home / 'clip.pt'}", "finetuning.epochs=1"]
    assert main(words) == 0
    steps = results(home)
    chosen = steps["ssd/ce/plain/client-weighted-exponent/stage2/seed4"]
    assert set(chosen["best"]) >= {"exponent", "lambda_"}
    assert "alpha" not in chosen["best"]
    assert set(chosen["scores"][0]) >= {"client_7", "client_2", "id_client_7", "others", "mia"}
    assert "mia" in chosen["best"]["scores"]
    assert "alpha" in steps["ssd/ce/plain/client-weighted-threshold/stage1/seed4"]["best"]
    assert "mia" not in steps["ssd/ce/plain/client-forgotten-exponent/stage1/seed4"]["best"]["scores"]
    assert len(steps["tsne/clip/seed4"]["views"]) == 1
    report = home / "studies" / "digits-laptop" / "report"
    with open(report / "tables" / "table-09.csv") as file:
        assert {row["column"] for row in csv.DictReader(file)} >= {"client_7", "client_2", "id_client_2"}
    assert "embeddings" in (report / "REPORT.md").read_text()


def test_a_report_of_what_is_there_and_no_clip_model(home, capsys):
    words = [
        *SHORT,
        "study.pipelines=[ce_dl]",
        "learning.epochs=1",
        "ablation.shares=[0.2]",
        "ablation.retain_shares=[0.2]",
    ]
    assert main([*words, "study.stages=[train,ablation,report]"]) == 0
    text = (home / "studies" / "digits-laptop" / "report" / "REPORT.md").read_text()
    assert "Not measured yet" in text
    (home / "no.pt").write_bytes(b"nothing")
    assert (
        main([*words, "study.stages=[train,gold,unlearn]", f"study.clip={home / 'no.pt'}", "study.only=tsne/clip/*"])
        == 2
    )
    assert re.search(r"error: study.clip=.* is no TorchScript CLIP model for cpu \(.*\)\n", capsys.readouterr().err)
