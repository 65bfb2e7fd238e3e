"""The study's command on bad input, on CIFAR-100's format, and with the settings that are seldom changed."""

import csv
import pickle
import re
from hashlib import md5

import numpy as np
import pytest
import torch
import torchvision

from study_data import FEW, SHORT, TRAIN, results, study


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study.stages=[table5]"], "study.stages: table5 is not one of train, retrain"),
        (["study.only=table-5"], "study.only=table-5 matches no task of train"),
        (["data.limit=40"], r"client \d has \d images, too few for the attack's 5 folds"),
        (["data.limit=60", "partition.dirichlet_alpha=0.02"], r"client \d has (no image|\d images)"),
        (
            ["study.stages=[unlearn]"],
            r"fisher/no_mtl/class/all/seed0 needs train/no_mtl/seed0, which was not asked for",
        ),
    ],
)
def test_bad_input_gets_one_line(home, capsys, words, message):
    assert study("paper", [*SHORT, *words]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error


def test_a_folder_of_another_study_and_a_damaged_model_are_named_and_kept(home, capsys):
    assert study("paper", TRAIN) == 0
    before = results(home)
    assert study("paper", [*TRAIN, "model.width=16"]) == 2
    assert re.search(r"is a study with model=.*'width': 8.*: choose another study.name", capsys.readouterr().err)
    assert results(home) == before
    (model,) = home.rglob("model.safetensors")
    model.write_bytes(model.read_bytes()[:-1])
    words = [*SHORT, "study.pipelines=[ce_dl]", "learning.epochs=3", "study.stages=[unlearn]", "study.only=fisher/*"]
    assert study("paper", words) == 2
    assert re.search(r"model.safetensors was cut short or changed .*: delete", capsys.readouterr().err)
    assert results(home) == before


def test_other_settings_of_one_part_do_that_part_again(home, capsys):
    assert study("paper", TRAIN) == 0
    assert study("paper", [*TRAIN, "learning.epochs=4"]) == 0
    assert len(list(home.rglob("result.json"))) == 2
    assert study("paper", [*TRAIN, "search.trials=7"]) == 0
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


@pytest.mark.thorough
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
    words += ["study.order=[0]", "study.stages=[train,retrain,unlearn,report]", "partition.kind=iid"]
    assert study("paper", words) == 0
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
@pytest.mark.thorough
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
        *FEW,
    ]
    words += ["study.pipelines=[ce]", "fisher.loss_head=client", "fisher.full=base", "fisher.estimator=batch"]
    words += ["search.reading=exponent", "search.recalibrate=true", "search.objective=weighted", "search.trials=2"]
    words += ["study.stages=[train,retrain,unlearn,report]", f"study.clip={home / 'clip.pt'}", "finetuning.epochs=1"]
    assert study("paper", words) == 0
    tasks = results(home)
    chosen = tasks["ssd/ce/plain/client-weighted-exponent/stage2/seed4"]
    assert set(chosen["best"]) >= {"exponent", "lambda_"}
    assert "alpha" not in chosen["best"]
    assert set(chosen["scores"][0]) >= {"client_7", "client_2", "id_client_7", "retain", "mia"}
    assert "mia" in chosen["best"]["scores"]
    assert "alpha" in tasks["ssd/ce/plain/client-weighted-threshold/stage1/seed4"]["best"]
    assert "mia" not in tasks["ssd/ce/plain/client-forgotten-exponent/stage1/seed4"]["best"]["scores"]
    assert len(tasks["tsne/clip/seed4"]["views"]) == 1
    report = home / "studies" / "digits-laptop" / "report"
    with open(report / "tables" / "table-09.csv") as file:
        assert {row["column"] for row in csv.DictReader(file)} >= {"client_7", "client_2", "id_client_2"}
    assert "embeddings" in (report / "REPORT.md").read_text()


def test_a_report_of_what_is_there_and_no_clip_model(home, capsys):
    words = [
        *SHORT,
        "study.pipelines=[ce_dl]",
        "learning.epochs=1",
        "ablation.fractions=[0.2]",
        "ablation.retain_fractions=[0.2]",
    ]
    assert study("paper", [*words, "study.stages=[train,ablation,report]"]) == 0
    text = (home / "studies" / "digits-laptop" / "report" / "REPORT.md").read_text()
    assert "Not measured yet" in text
    (home / "no.pt").write_bytes(b"nothing")
    assert (
        study(
            "paper",
            [*words, "study.stages=[train,retrain,unlearn]", f"study.clip={home / 'no.pt'}", "study.only=tsne/clip/*"],
        )
        == 2
    )
    assert re.search(r"error: study.clip=.* is no TorchScript CLIP model for cpu \(.*\)\n", capsys.readouterr().err)
