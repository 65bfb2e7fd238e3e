"""What stays behind: what is removed of forgotten clients, and what a search by content finds of them."""

import gzip
import json
import shutil
import sqlite3
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from command_line import command
from fedunlearn.build import open_dataset, slices_of
from fedunlearn.data import datasets
from fedunlearn.data.search import Found, Wanted
from fedunlearn.errors import UserError
from fedunlearn.runs import scan
from fedunlearn.runs.purge import purge_due
from fedunlearn.runs.receipts import FOLDER
from fedunlearn.runs.run import read_about
from fedunlearn.runs.statement import NOTHING_REMOVED
from fedunlearn.runs.verifying import verified

PURGED = "forget.schedule={2:[3]} forget.purge=true"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Ray and Flower have no files here but those that a test plants."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))


def images_of(federate, client, name="test"):
    """A client's images and labels."""
    config = federate.run(name).config_here()
    dataset = open_dataset(config)
    own = slices_of(config, dataset)[client]
    return dataset.train.images[own], dataset.train.labels[own]


def receipt(federate, name="test", number=-1):
    """The newest receipt of a run."""
    files = sorted((federate.folder(name) / FOLDER).glob("*.json"), key=lambda file: (len(file.stem), file.stem))
    return verified(files[number].read_bytes())


def found_by_scan(capsys, *words, client=3):
    """What `fedunlearn scan` finds, by file, and its status."""
    capsys.readouterr()
    status = command("scan", "--client", str(client), "--run", "test", "--json", *words)
    return status, {row["file"]: row for row in json.loads(capsys.readouterr().out)["found"]}


# --- the search ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures_of_one():
    """Images of one owner, and of others."""
    random = np.random.default_rng(0)
    return random.integers(0, 256, (40, 16, 16, 3), np.uint8), random.integers(0, 256, (200, 16, 16, 3), np.uint8)


def plain(images):
    return images.tobytes()


def channels_first(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).tobytes()


def scaled(images):
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous().numpy().tobytes()


def fractions(images):
    return (images.astype(np.float32) / 255).tobytes()


@pytest.mark.parametrize("form", [plain, channels_first, scaled, fractions])
@pytest.mark.parametrize("before", [b"", b"x", b"\0" * 4099])
def test_images_are_found_in_every_form_and_at_every_place(pictures_of_one, tmp_path, form, before):
    images, others = pictures_of_one
    wanted = Wanted(images, np.arange(40) % 10, others=others)
    file = tmp_path / "some"
    file.write_bytes(before + form(others[:5]) + form(images[7:10]) + before)
    assert wanted.found_in(file) == Found(images={7, 8, 9})
    file.write_bytes(before + form(others))
    assert not wanted.found_in(file)


def test_images_are_found_across_the_pieces_in_which_a_file_is_read(pictures_of_one, tmp_path, monkeypatch):
    images, others = pictures_of_one
    monkeypatch.setattr("fedunlearn.data.search.CHUNK", 100)
    (tmp_path / "some").write_bytes(scaled(images[:2]))
    assert Wanted(images, np.arange(40), others=others).found_in(tmp_path / "some") == Found(images={0, 1})


def test_a_part_of_an_image_is_enough(pictures_of_one, tmp_path):
    images, others = pictures_of_one
    (tmp_path / "some").write_bytes(images[3].tobytes()[384:])
    assert Wanted(images, np.arange(40), others=others).found_in(tmp_path / "some") == Found(images={3})


def test_what_others_have_too_tells_nobody_apart(pictures_of_one, tmp_path):
    images, others = pictures_of_one
    wanted = Wanted(images, np.arange(40), others=np.concatenate([others, images[:2]]))
    (tmp_path / "some").write_bytes(images[:3].tobytes())
    assert wanted.unknown == 2
    assert wanted.found_in(tmp_path / "some") == Found(images={2})


def test_labels_are_found_as_one_sequence(pictures_of_one, tmp_path):
    images, others = pictures_of_one
    labels = np.random.default_rng(1).integers(0, 10, 40)
    wanted = Wanted(images, labels, others=others)
    for kind in (np.int64, np.int32, np.uint8):
        (tmp_path / "some").write_bytes(b"123" + labels.astype(kind).tobytes())
        assert wanted.found_in(tmp_path / "some") == Found(labels=True)
    (tmp_path / "some").write_bytes(labels[::-1].tobytes())
    assert not wanted.found_in(tmp_path / "some")


def plant(folder, images):
    """Files of all sorts that have images, with how many."""
    folder.mkdir()
    np.save(folder / "array.npy", images[:2])
    np.savez(folder / "stored.npz", a=images[:3])
    np.savez_compressed(folder / "packed.npz", a=images[:4])
    save_file({"x": torch.from_numpy(images[:5]).float() / 255}, folder / "tensors.safetensors")
    (folder / "array.gz").write_bytes(gzip.compress(images[:6].tobytes()))
    with zipfile.ZipFile(folder / "files.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one", channels_first(images[:7]))
    return {"array.npy": 2, "stored.npz": 3, "packed.npz": 4, "tensors.safetensors": 5, "array.gz": 6, "files.zip": 7}


def test_images_are_found_in_files_of_all_sorts(pictures_of_one, tmp_path):
    images, others = pictures_of_one
    sorts = plant(tmp_path / "planted", images)
    wanted = Wanted(images, np.arange(40), others=others)
    found = {path.name: len(one.images) for path, one in scan.scan(wanted, [tmp_path / "planted"])}
    assert found == sorts


def test_images_are_found_in_a_databases_freed_pages_and_in_its_log(pictures_of_one, tmp_path):
    images, others = pictures_of_one
    wanted = Wanted(images, np.arange(40), others=others)
    db = sqlite3.connect(tmp_path / "superlink.db")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA secure_delete=OFF")
    db.execute("CREATE TABLE messages (content BLOB)")
    db.execute("INSERT INTO messages VALUES (?)", (scaled(images[:10]),))
    db.commit()
    assert len(wanted.found_in(tmp_path / "superlink.db-wal").images) == 10
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.execute("DELETE FROM messages")
    db.commit()
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    assert len(wanted.found_in(tmp_path / "superlink.db").images) == 10


# --- purging ------------------------------------------------------------------------------------------------------


def test_after_a_run_nothing_is_found_of_whom_it_forgot(federate, capsys):
    federate(PURGED)
    (images, labels), (others, _) = images_of(federate, 3), images_of(federate, 0)
    assert len(images) == len(labels) == 0
    assert len(others)
    assert found_by_scan(capsys) == (0, {})
    assert found_by_scan(capsys, client=0)[0] == 1
    said = receipt(federate)
    assert any("decoded images of client 3, with their labels" in line for line in said.deleted)
    assert any(line.startswith("images of client 3: none was found") for line in said.deleted)
    assert any("checkpoints/ has round-00003.safetensors alone" in line for line in said.deleted)
    assert {"accuracies by round of client 3"} <= {one.what for one in said.kept}
    assert command("verify", "--run", "test") == 0


def test_a_run_goes_on_without_the_images_and_forgets_again(federate):
    federate("forget.schedule={2:[3]}")
    federate("forget.schedule={2:[3]} forget.purge=true run=purged")
    shutil.rmtree(federate.folder())  # it would need the images
    federate(f"{PURGED} run=purged")
    federate("run=purged rounds=4")
    (row,) = (row for row in federate.run("purged").metrics() if row["round"] == 4)
    assert set(row["retain_clients"]) == {"0", "1", "2"}
    assert command("forget", "--client", "1", "--run", "purged", "--engine", "local") == 0
    assert [request.state for request in federate.requests("purged")] == ["COMPLETED", "COMPLETED"]
    assert [len(images_of(federate, client, "purged")[0]) > 0 for client in range(4)] == [True, False, True, False]
    assert command("report", "--run", "purged") == 0
