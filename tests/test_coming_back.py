"""Clients with names come back, stay away and are known after their images were removed."""

import csv
import shutil

import numpy as np
import pytest

from command_line import command
from fedunlearn.build import open_dataset, slices_of
from fedunlearn.errors import UserError
from fedunlearn.runs.receipts import FOLDER
from fedunlearn.runs.verifying import verified
from test_owners import hospitals

QUICK = "strategy=leave train.batch_size=64 train.client_head_steps=1 batch_norm_fraction=0 model.width=8"
CLIENTS = ("a", "b", "c", "d")
EACH = 12


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Ray and Flower have no files here."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))


def values():
    """Images, labels, and the owner of each."""
    count = EACH * len(CLIENTS)
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return images, np.arange(count) % 2, np.repeat(CLIENTS, EACH)


def npz(folder):
    images, labels, clients = values()
    np.savez(folder / "own.npz", images=images, labels=labels, clients=clients)
    return f"data.name=npz data.root={folder / 'own.npz'} partition.kind=column"


def table(folder):
    _, labels, clients = values()
    rows = np.random.default_rng(1).normal(size=(len(labels), 3))
    with (folder / "own.csv").open("w") as file:
        csv.writer(file).writerows(
            [["x", "y", "z", "ill", "hospital"], *([*x, k, c] for x, k, c in zip(rows, labels, clients, strict=True))]
        )
    about = "data.label=ill data.client=hospital model=mlp partition.kind=column"
    return f"data.name=table data.root={folder / 'own.csv'} {about}"


def hf(folder):
    import io

    from PIL import Image

    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images, labels, clients = values()
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    parquet.write_table(arrow.table({"image": files, "label": labels, "site": list(clients)}), folder / "train.parquet")
    return f"data.name=hf data.root={folder / 'train.parquet'} data.client=site data.image_size=8 partition.kind=column"


def folders(folder):
    root = hospitals(folder / "tree", CLIENTS)
    return f"data.name=folder data.root={root} data.image_size=8 partition.kind=folders"


SORTS = [npz, *(pytest.param(make, marks=pytest.mark.thorough) for make in (table, hf)), folders]


@pytest.fixture(params=SORTS, ids=["npz", "table", "hf", "folders"])
def hosted(federate, tmp_path, request):
    """Runs of clients that a column or a folder names."""
    about = request.param(tmp_path)
    quick = QUICK.replace(" model.width=8", "") if "mlp" in about else QUICK

    def run(words="", rounds=1):
        return federate(f"{about} {quick} data.limit=0 data.test_limit=0 rounds={rounds} {words}", nodes=1)

    return run


def sizes(federate, name="test"):
    config = federate.run(name).config_here()
    return [len(own) for own in slices_of(config, open_dataset(config))]


def receipt(federate, name="test"):
    files = sorted((federate.folder(name) / FOLDER).glob("*.json"), key=lambda file: (len(file.stem), file.stem))
    return verified(files[-1].read_bytes())


def test_clients_are_known_after_their_images_were_removed(federate, hosted):
    hosted("forget.schedule={1:[b, d]}")
    assert sizes(federate) == [10, 0, 10, 0]
    said = r"clients b and d were forgotten by run test .*'forget.schedule=\{0:\[b,d\]\}'.*'readmit=\[b,d\]'"
    with pytest.raises(UserError, match=said):
        hosted("run=plain")
    hosted("run=without forget.schedule={0:[b,d]}")
    assert federate.run("without").config.partition.names == list(CLIENTS)
    assert sizes(federate, "without") == [10, 0, 10, 0]
    assert [request.state for request in federate.requests("without")] == ["COMPLETED"]
    assert federate.run("without").ledger.examples() == {0: 10, 1: 10, 2: 10, 3: 10}
    assert any("none was found" in line for line in receipt(federate, "without").deleted)
    assert command("report", "--run", "test", "--retrained", "without") == 0
    hosted("run=back readmit=[b] forget.schedule={0:[d]}")
    assert sizes(federate, "back") == [10, 10, 10, 0]
    hosted("forget.schedule={1:[b,d]}", rounds=2)
    assert federate.run().ledger.current().round == 2
    assert sizes(federate, "back") == [10, 10, 10, 0]


OF_A_COLUMN = pytest.mark.parametrize("hosted", SORTS[:-1], indirect=True, ids=["npz", "table", "hf"])


@OF_A_COLUMN
def test_test_images_of_a_column_leave_with_their_client(federate, hosted):
    hosted("forget.schedule={1:[b]}")
    config = federate.run().config_here()
    dataset = open_dataset(config)
    assert set(dataset.test_owners) == {"a", "c", "d"}
    assert len(dataset.test.labels) == len(dataset.test_owners) == 6
    assert "12 decoded images of client b, with their labels" in receipt(federate).deleted
    assert any("none was found" in line for line in receipt(federate).deleted)
    assert not any("test images" in one.what for one in receipt(federate).kept)
    hosted("", rounds=2)
    hosted("run=back readmit=[b]")
    assert set(open_dataset(config).test_owners) == set(CLIENTS)
    hosted("", rounds=3)
    assert federate.run().ledger.current().round == 3


@OF_A_COLUMN
def test_only_who_is_readmitted_comes_back_into_a_copy(federate, hosted):
    hosted("forget.schedule={1:[b, d]}")
    hosted("run=back clients=3 partition.names=[a,b,c] readmit=[b]")
    dataset = open_dataset(federate.run().config_here())
    assert {*dataset.owners} == {*dataset.test_owners} == {"a", "b", "c"}


OF_ARRAYS = pytest.mark.parametrize("hosted", [npz], indirect=True, ids=["npz"])


@OF_ARRAYS
def test_whoever_came_back_for_a_run_that_is_gone_can_be_removed_and_come_again(federate, hosted):
    hosted("forget.schedule={1:[b, d]}")
    hosted("run=back clients=3 partition.names=[a,b,c] readmit=[b]")
    hosted("run=again readmit=[b] forget.schedule={0:[d]}")
    assert sizes(federate, "again") == [10, 10, 10, 0]
    for name in ("back", "again"):
        shutil.rmtree(federate.folder(name))
    assert command("purge", "--client", "b", "--client", "d", "--run", "test") == 0
    assert sizes(federate) == [10, 0, 10, 0]
    assert {*open_dataset(federate.run().config_here()).test_owners} == {"a", "c"}


@OF_ARRAYS
def test_labels_of_training_images_are_found_in_a_file_of_their_own(federate, hosted, tmp_path, capsys):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (200, 8, 8, 3), np.uint8), rng.integers(0, 2, 200)
    np.savez(tmp_path / "own.npz", images=images, labels=labels, clients=np.repeat(CLIENTS, 50))
    hosted("")
    dataset = open_dataset(federate.run().config_here())
    np.save(tmp_path / "stray.npy", dataset.train.labels[np.array(dataset.owners) == "b"])
    assert command("scan", "--client", "b", "--run", "test", "--also", str(tmp_path / "stray.npy")) == 1
    assert "stray.npy: all labels" in capsys.readouterr().out


def test_the_last_test_images_stay_and_the_receipt_says_why(federate, tmp_path):
    images, labels, clients = values()
    some = np.concatenate([np.arange(EACH), EACH + np.arange(4), 2 * EACH + np.arange(4)])  # a alone has six of a class
    np.savez(tmp_path / "own.npz", images=images[some], labels=labels[some], clients=clients[some])
    about = f"data.name=npz data.root={tmp_path / 'own.npz'} partition.kind=column clients=3 {QUICK}"
    federate(f"{about} data.limit=0 data.test_limit=0 forget.schedule={{1:[a]}} rounds=1", nodes=1)
    assert sizes(federate) == [0, 4, 4]
    assert open_dataset(federate.run().config_here()).test_owners == ["a", "a"]
    (left,) = (one for one in receipt(federate).kept if "test" in one.what)
    assert "the server, which has no other test images" in left.why


@OF_ARRAYS
def test_a_copy_that_is_missing_is_decoded_anew_for_who_is_readmitted(federate, hosted):
    hosted("forget.schedule={1:[b]}")
    for file in sorted((federate.home / "data").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    with pytest.raises(UserError, match="client b was forgotten by run test"):
        hosted("run=plain")
    hosted("run=back readmit=[b]")
    assert sizes(federate, "back") == [10, 10, 10, 10]
