"""What stays behind: what is removed of forgotten clients, and what a search by content finds of them."""

import bz2
import gzip
import json
import lzma
import shutil
import sqlite3
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from command_line import command
from fedunlearn.build import open_dataset, slices_of
from fedunlearn.data import datasets
from fedunlearn.data.search import Found, Wanted
from fedunlearn.data.store import REMOVED_FILES
from fedunlearn.errors import UserError
from fedunlearn.federation.auditor import Auditor
from fedunlearn.runs import checkpoint, keys, scan
from fedunlearn.runs.lock import lock
from fedunlearn.runs.purge import known_class_counts
from fedunlearn.runs.receipts import FOLDER, signed, statement_of
from fedunlearn.runs.statement import NOTHING_REMOVED
from fedunlearn.runs.verifying import InvalidError, verified
from local_grid import equal

FORGOTTEN = "forget.schedule={2:[3]} forget.purge=always"


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


def double(images):
    return (images / 255).tobytes()


def whole(images):
    return images.astype(np.float64).tobytes()


def rounded(images, kind):
    numbers = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return numbers.contiguous().to(kind).view(torch.int16).numpy().tobytes()


def half(images):
    return rounded(images, torch.float16)


def brain(images):
    return rounded(images, torch.bfloat16)


@pytest.mark.parametrize("form", [plain, channels_first, scaled, fractions, double, whole, half, brain])
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
    monkeypatch.setattr("fedunlearn.data.finder.CHUNK", 100)
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


def broken(packed):
    return packed[:30] + b"\xff" * 30 + packed[60:]


def cut(packed):
    return packed[: len(packed) // 2]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("damage", [broken, cut])
def test_a_packed_file_that_is_damaged_is_named(pictures_of_one, tmp_path, pack, damage):
    images, others = pictures_of_one
    (tmp_path / "some").write_bytes(damage(pack(others.tobytes())))
    assert Wanted(images, np.arange(40), others=others).found_in(tmp_path / "some").unread


@pytest.mark.parametrize("place", ["flags", "content"])
def test_the_rest_of_an_archive_is_searched_where_one_part_is_encrypted_or_damaged(pictures_of_one, tmp_path, place):
    images, others = pictures_of_one
    with zipfile.ZipFile(tmp_path / "some", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("first", b"first" * 100)
        archive.writestr("second", images[:2].tobytes())
    content = bytearray((tmp_path / "some").read_bytes())
    if place == "flags":
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
    else:
        content[35:45] = b"\xff" * 10
    (tmp_path / "some").write_bytes(content)
    found = Wanted(images, np.arange(40), others=others).found_in(tmp_path / "some")
    assert found.images == {0, 1}
    assert found.unread


def test_links_are_followed_and_every_file_is_searched_once(tmp_path):
    inside, outside = tmp_path / "home", tmp_path / "outside"
    for folder in (inside / "z", outside):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"images")
    (inside / "data").symlink_to(outside)
    (inside / "again").symlink_to("z")
    (inside / "z" / "up").symlink_to(inside)
    (inside / "itself").symlink_to("itself")
    (inside / "a").symlink_to(outside / "file")
    found = scan.files_below([inside, tmp_path / "home" / "z"])
    assert {file.resolve() for file in found} == {inside / "z" / "file", outside / "file"}
    assert inside / "z" / "file" in found
    assert len(found) == 2


# --- purging ------------------------------------------------------------------------------------------------------


def test_after_a_run_nothing_is_found_of_whom_it_forgot(federate, capsys):
    federate(FORGOTTEN)
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
    federate(FORGOTTEN)
    before = images_of(federate, 0)[0].tobytes()
    federate(f"{FORGOTTEN} rounds=4")
    (row,) = (row for row in federate.run().metrics() if row["kind"] == "round" and row["round"] == 4)
    assert (set(row["retain_clients"]), row["forgotten"]) == ({"0", "1", "2"}, {})
    assert command("forget", "--client", "1", "--run", "test", "--engine", "local") == 0
    assert [request.state for request in federate.requests()] == ["COMPLETED", "COMPLETED"]
    assert [len(images_of(federate, client)[0]) > 0 for client in range(4)] == [True, False, True, False]
    assert images_of(federate, 0)[0].tobytes() == before
    assert command("report", "--run", "test") == 0


def test_a_run_keeps_its_bits_where_the_images_of_a_forgotten_client_are_gone(federate):
    for name, purge in (("kept", "never"), ("purged", "always")):
        federate(f"forget.schedule={{1:[3]}} rounds=2 run={name} forget.purge={purge}")
        if name == "kept":
            shutil.move(federate.folder("kept"), federate.home / "put-away")  # else its images would be kept
    federate("forget.schedule={1:[3]} rounds=3 run=purged forget.purge=always")
    assert len(images_of(federate, 3, "purged")[0]) == 0
    shutil.move(federate.home / "put-away", federate.folder("kept"))
    shutil.rmtree(federate.home / "data")
    federate("forget.schedule={1:[3]} rounds=3 run=kept")
    assert equal(federate.state("kept"), federate.state("purged"))


def test_images_stay_until_the_last_run_does_without_them(federate, capsys):
    federate("run=other partition.kind=iid")
    federate(FORGOTTEN)
    assert len(images_of(federate, 3)[0]) == 28
    status, found = found_by_scan(capsys)
    ((file, row),) = found.items()
    assert (status, row["images"], file.endswith("train_images.npy")) == (1, 28, True)
    (kept,) = (one for one in receipt(federate).kept if "images of client 3" in one.what)
    assert (kept.what.split()[0], kept.why) == ("28", "needed by run other")
    before = [images_of(federate, client, "other")[0].tobytes() for client in range(4)]
    assert command("forget", "--client", "0", "--run", "other", "--engine", "local") == 0
    assert command("purge", "--client", "0", "--run", "other") == 0
    assert [images_of(federate, client, "other")[0].tobytes() for client in range(1, 4)] == before[1:]
    left = len(images_of(federate, 3)[0])
    assert 0 < left < 28  # those of them that are client 0's in the other run are gone
    federate("run=other partition.kind=iid rounds=4")  # it goes on with what it needs


def test_a_study_keeps_the_images_that_it_is_of(federate):
    federate("forget.schedule={2:[3]}")
    dataset = open_dataset(federate.run().config_here())
    study = federate.home / "studies" / "one" / "study.json"
    study.parent.mkdir(parents=True)
    study.write_text(json.dumps({"data": dataset.fingerprint}))
    assert command("purge", "--client", "3", "--run", "test") == 0
    assert len(images_of(federate, 3)[0]) == 28
    assert "needed by study one" in {one.why for one in receipt(federate).kept}


def test_copies_that_no_run_uses_are_deleted(federate):
    federate("forget.schedule={2:[3]}")
    stale = federate.home / "data" / "digits-1-200-40"
    datasets.load("digits", cache=federate.home / "data", limit=200, test_limit=40)
    assert stale.is_dir()
    assert command("purge", "--client", "3", "--run", "test") == 0
    assert not stale.exists()
    assert "copies of images that no run uses: digits-1-200-40" in receipt(federate).deleted


def through_link_to_home(home, monkeypatch):
    link = home.with_name("link")
    link.symlink_to(home)
    monkeypatch.setenv("FEDUNLEARN_HOME", str(link))


def through_link_to_data(home, monkeypatch):
    (home / "data").rename(home / "big")
    (home / "data").symlink_to("big")


@pytest.mark.parametrize(
    "moved", [pytest.param(through_link_to_home, marks=pytest.mark.thorough), through_link_to_data]
)
def test_copies_that_another_run_needs_stay_where_the_state_folder_is_reached_through_a_link(
    federate, tree, monkeypatch, moved
):
    federate("run=other rounds=1")
    federate("forget.schedule={2:[3]}")
    folder = f"data.name=folder data.root={tree} data.image_size=8 data.limit=0 data.test_limit=0"
    federate(f"run=pictures rounds=1 {folder} {FORGOTTEN.replace('2', '1')}")
    before = {file.name for file in (federate.home / "data").iterdir()}
    moved(federate.home, monkeypatch)
    assert command("purge", "--client", "3", "--run", "test") == 0
    assert {file.name for file in (federate.home / "data").iterdir()} == before
    assert "needed by run other" in {one.why for one in receipt(federate).kept}
    federate("run=other rounds=2")
    federate(f"run=pictures rounds=2 {folder} {FORGOTTEN.replace('2', '1')}")


def test_the_copy_of_an_archive_stays_where_the_archive_is_elsewhere_for_now(federate, tree):
    archive = Path(shutil.make_archive(str(tree), "zip", tree.parent, tree.name))
    folder = f"data.name=folder data.root={archive} data.image_size=8 data.limit=0 data.test_limit=0"
    federate(f"run=pictures rounds=1 {folder}")
    federate("forget.schedule={1:[3]} rounds=1")
    before = {file.name for file in (federate.home / "data").iterdir()}
    archive.rename(archive.with_name("away.zip"))
    assert command("purge", "--client", "3", "--run", "test") == 0
    assert {file.name for file in (federate.home / "data").iterdir()} == before | {"lock"}
    archive.with_name("away.zip").rename(archive)
    federate(f"run=pictures rounds=2 {folder}")


def test_images_that_come_back_are_removed_when_the_run_is_opened_again(federate, capsys):
    federate(FORGOTTEN)
    shutil.rmtree(federate.home / "data")
    assert found_by_scan(capsys) == (0, {})  # compared with the source
    assert len(images_of(federate, 3)[0]) == 28
    assert found_by_scan(capsys)[0] == 1
    federate(f"{FORGOTTEN} rounds=4")
    assert found_by_scan(capsys) == (0, {})


def test_images_are_found_behind_a_link_and_a_path_that_is_not_there_is_named(federate, capsys):
    federate("rounds=1")
    through_link_to_data(federate.home, None)
    status, found = found_by_scan(capsys)
    assert (status, [Path(file).name for file in found]) == (1, ["train_images.npy"])
    assert command("scan", "--client", "3", "--run", "test", "--also", "/typo/nowhere") == 2
    assert "/typo/nowhere: there is no such file or folder" in capsys.readouterr().err


def test_a_damaged_file_stops_nothing_and_the_receipt_names_it(federate, capsys):
    federate("rounds=1 forget.purge=always")
    (federate.home / "data" / "backup.gz").write_bytes(broken(gzip.compress(str(list(range(999))).encode())))
    assert command("forget", "--client", "3", "--run", "test", "--engine", "local") == 0
    said = receipt(federate)
    (left,) = (one for one in said.kept if "backup.gz" in one.what)
    assert left.what == "perhaps images of client 3 in data/backup.gz"
    assert left.why.startswith("it cannot be read to the end (Error -3")
    assert not any("none was found" in line for line in said.deleted)
    status, found = found_by_scan(capsys)
    assert (status, [Path(file).name for file in found]) == (1, ["backup.gz"])


def forgotten_once(federate):
    """A run that has forgotten client 3, and still has its images."""
    federate.shared("forget.schedule={1:[3]} rounds=1", name="test")
    open_dataset(federate.run().config_here())


@pytest.mark.parametrize("text", ["{}", "junk", "[]", '{"class_names": [], "fingerprint": "0", "source": null}'])
def test_what_is_damaged_beside_a_run_stops_no_purge(federate, text):
    forgotten_once(federate)
    for file in ("data/foo/meta.json", "runs/test/x-client-3.d/file"):
        (federate.home / file).parent.mkdir(parents=True)
        (federate.home / file).write_text(text)
    assert command("purge", "--client", "3", "--run", "test") == 0
    assert any("decoded images of client 3" in line for line in receipt(federate).deleted)
    assert (federate.home / "data/foo/meta.json").exists()


@pytest.mark.parametrize("text", ["[]", "null", '{"data": null}', "junk"])
def test_a_damaged_study_keeps_the_images(federate, text):
    forgotten_once(federate)
    study = federate.home / "studies" / "s" / "study.json"
    study.parent.mkdir(parents=True)
    study.write_text(text)
    assert command("purge", "--client", "3", "--run", "test") == 0
    assert len(images_of(federate, 3)[0]) == 28
    (kept,) = (one for one in receipt(federate).kept if "images of client 3" in one.what)
    assert f"{study} is damaged" in kept.why


@pytest.mark.parametrize(
    ("name", "text"),
    [("train_images.npy", "junk"), ("meta.json", None), ("meta.json", "{}"), ("meta.json", "[]"), ("meta.json", "")],
)
def test_a_damaged_copy_is_named_and_the_receipt_is_written(federate, capsys, caplog, name, text):
    forgotten_once(federate)
    (store,) = (federate.home / "data").glob("digits-*")
    (store / name).unlink()
    if text is not None:
        (store / name).write_text(text)
    assert found_by_scan(capsys)[0] in (0, 1)  # compared with the source
    assert command("purge", "--client", "3", "--run", "test") == 0
    assert f"{store / name} is missing or damaged" in caplog.text
    assert receipt(federate).kept != [NOTHING_REMOVED]
    with pytest.raises(UserError, match=f"{name} is missing or damaged .*: remove the folder {store}"):
        federate("rounds=2 run=other")


def test_what_is_kept_beside_the_model_is_said_whatever_it_is_called(federate, monkeypatch):
    forgotten_once(federate)
    for kind, prefix in (("momentum", "impulse."), ("predictions", "probs.")):
        monkeypatch.setitem(checkpoint.BESIDE, kind, prefix)
    state, run = federate.server_state(), federate.run()
    beside = replace(state, momentum={"w": torch.zeros(1)}, predictions={"0": torch.zeros(1)})
    run.commit(beside.tensors(), state.round)
    assert command("purge", "--client", "3", "--run", "test") == 0
    said = receipt(federate)
    assert {one.what for one in said.kept} >= {"the server's momentum"}
    assert not any("predictions" in line for line in said.deleted)  # those of round 0 knew the client


def test_figures_are_removed_where_that_is_asked_for(federate):
    federate("forget.schedule={2:[3]}")
    assert any("3" in row.get("forgotten", {}) for row in federate.run().metrics())
    counts = federate.run().ledger.examples()
    assert command("purge", "--client", "3", "--run", "test", "--metrics") == 0
    text = (federate.folder() / "metrics.jsonl").read_text()
    assert '"3": {' not in text
    assert '"0": {' in text
    assert not (federate.folder() / "report").exists()
    assert command("report", "--run", "test") == 0
    page = (federate.folder() / "report" / "index.html").read_text()
    assert f"client 3, {counts[3]} images" not in page
    assert not any("accuracies" in one.what for one in receipt(federate).kept)
    assert command("verify", "--run", "test") == 0


def test_class_counts_outlive_the_images_in_reports(federate):
    federate(FORGOTTEN)
    auditor = Auditor(federate.run().config_here())
    assert auditor.class_counts([3]).sum() == 0
    assert known_class_counts(federate.run(), auditor.class_counts())[3].sum() == 28


def test_files_that_are_named_after_a_client_are_deleted(federate):
    federate("forget.schedule={2:[3]}")
    updates = federate.folder() / "updates" / "after-1"
    updates.mkdir(parents=True)
    for client in (3, 30):
        (updates / f"round-00002-client-{client}.safetensors").write_bytes(b"update")
    assert command("purge", "--client", "3", "--run", "test") == 0
    assert [file.name for file in updates.iterdir()] == ["round-00002-client-30.safetensors"]
    assert "stored updates of client 3: 1 files deleted" in receipt(federate).deleted


def test_only_forgotten_clients_are_purged_and_no_live_run_is(federate, capsys):
    federate("forget.schedule={2:[3]}")
    assert command("purge", "--client", "1", "--run", "test") == 2
    assert "client 1 is not forgotten in run test: fedunlearn forget --client 1" in capsys.readouterr().err
    with lock(federate.folder()):
        assert command("purge", "--client", "3", "--run", "test") == 2
    assert "run test is locked" in capsys.readouterr().err
    assert receipt(federate).kept == [NOTHING_REMOVED]
    assert (receipt(federate).deleted, len(images_of(federate, 3)[0])) == ([], 28)


def test_whoever_was_forgotten_together_is_purged_together_or_not_at_all(federate, capsys):
    federate("forget.schedule={1:[1,3]} rounds=1 strategy=leave train.client_head_steps=1")
    counts = {client: len(images_of(federate, client)[0]) for client in (1, 3)}
    assert min(counts.values()) > 0
    assert command("purge", "--client", "3", "--run", "test") == 2
    said = "request r1 was about clients 1 and 3 together: name client 1 too"
    assert said in capsys.readouterr().err
    assert {client: len(images_of(federate, client)[0]) for client in (1, 3)} == counts
    assert federate.run().ledger.purged() == []
    assert command("purge", "--client", "3,1", "--run", "test") == 0
    assert [len(images_of(federate, client)[0]) for client in (1, 3)] == [0, 0]


def test_what_a_receipt_says_is_gone_follows_from_the_ledger(federate):
    federate(FORGOTTEN)
    file = federate.folder() / FOLDER / "r1-2.json"
    said = receipt(federate)
    (event,) = (json.loads(event.text) for event in said.events if "purged" in event.text)
    assert said.deleted == event["deleted"]
    lie = said.model_copy(update={"deleted": [*said.deleted, "everything else"]})
    run = federate.run()
    file.write_bytes(signed(statement_of(lie), keys.file_of(run.ledger.keys, lie.head.key)))
    with pytest.raises(InvalidError, match="deleted is not what follows from the ledger's events"):
        verified(file.read_bytes())


# --- a folder of images -------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A folder of images of two classes."""
    random = np.random.default_rng(2)
    for split, count in (("train", 30), ("test", 4)):
        for name in ("a", "b"):
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for n in range(count):
                image = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
                image.save(tmp_path / "tree" / split / name / f"{n:02}.png")
    return tmp_path / "tree"


def test_a_run_goes_on_when_the_files_of_whom_it_forgot_are_deleted(federate, tree, capsys):
    words = f"data.name=folder data.root={tree} data.image_size=8 data.limit=0 data.test_limit=0 {FORGOTTEN}"
    federate(words)
    (listed,) = {file.resolve() for file in (federate.home / "data").glob(f"*/{REMOVED_FILES}")}
    files = listed.read_text().splitlines()
    assert len(files) == federate.run().ledger.examples()[3]
    status, found = found_by_scan(capsys, "--also", str(tree))
    assert (status, set(found)) == (1, set(files))
    for file in files:
        Path(file).unlink()
    federate(f"{words} rounds=4")
    assert federate.run().ledger.current().round == 4
    assert command("scan", "--client", "3", "--run", "test") == 2
    assert "neither the decoded copy" in capsys.readouterr().err


def test_a_run_goes_on_when_the_files_of_all_whom_it_forgot_are_deleted(federate, tree):
    words = f"data.name=folder data.root={tree} data.image_size=8 data.limit=0 data.test_limit=0 strategy=leave"
    words += " forget.schedule={1:[1],2:[3]}"
    federate(f"{words} rounds=2")
    (listed,) = {file.resolve() for file in (federate.home / "data").glob(f"*/{REMOVED_FILES}")}
    files, examples = listed.read_text().splitlines(), federate.run().ledger.examples()
    assert len(files) == examples[1] + examples[3]
    for file in files:
        Path(file).unlink()
    federate(f"{words} rounds=3")
    assert federate.run().ledger.current().round == 3


def test_a_copy_stays_while_the_folder_of_its_images_is_not_as_it_was(federate, tree):
    words = f"data.name=folder data.root={tree} data.image_size=8 data.limit=0 data.test_limit=0 strategy=leave"
    federate(f"{words} rounds=1")
    copies = {copy.name for copy in (federate.home / "data").glob("folder-*") if not copy.is_symlink()}
    (tree / "train" / "a" / "00.png").rename(tree / "train" / "a" / "elsewhere.png")
    federate("run=other rounds=1 strategy=leave forget.schedule={1:[3]} forget.purge=always")
    (tree / "train" / "a" / "elsewhere.png").rename(tree / "train" / "a" / "00.png")
    assert copies <= {copy.name for copy in (federate.home / "data").iterdir()}
    federate(f"{words} rounds=2")


def test_a_run_names_the_clients_whose_files_have_changed(federate, tree):
    words = f"data.name=folder data.root={tree} data.image_size=8 data.limit=0 data.test_limit=0 "
    federate(f"{words} partition.kind=class clients=2 rounds=1")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tree / "train" / "b" / "07.png")
    with pytest.raises(UserError, match=r"run test was trained on other data \(other images of client 1\)"):
        federate(f"{words} partition.kind=class clients=2 rounds=2")


# --- coming back --------------------------------------------------------------------------------------------------


def test_a_new_run_does_not_train_whom_another_has_forgotten(federate):
    federate("run=needs-all-images rounds=1")
    federate(FORGOTTEN)
    with pytest.raises(UserError, match=r"client 3 was forgotten by run test \(request r1\): leave it out with"):
        federate("run=other")
    assert not federate.folder("other").exists() or not (federate.folder("other") / "run.json").exists()
    federate("run=retrained forget.schedule={0:[3]} strategy=leave")
    federate("run=fork fork=test")
    federate("run=dealt partition.seed=1 rounds=1")  # nobody there has the images that client 3 had
    federate("run=back readmit=[3]")
    (event,) = (event for event in federate.run("back").ledger.events() if "readmitted" in event)
    assert event["readmitted"] == {"3": "run test (request r1)"}
    assert not any("readmitted" in event for event in federate.run("retrained").ledger.events())


def changed_about(folder):
    (folder / "run.json").write_text((folder / "run.json").read_text() + "\n")


def settings_of_another_version(folder):
    about = json.loads((folder / "run.json").read_text())
    about["config"]["gone"] = 1
    (folder / "run.json").write_text(json.dumps(about))


def lost_about(folder):
    (folder / "run.json").unlink()


def junk_about(folder):
    (folder / "run.json").write_text('{"created": "", "data": [], "images": 1, "versions": 1, "config": []}')


def lost_ledger(folder):
    (folder / "ledger.sqlite").unlink()


def junk_ledger(folder):
    (folder / "ledger.sqlite").write_bytes(b"junk" * 1000)


FORGOT = r"client 3 was forgotten by run test \(request r1\)"
NOBODY_KNOWS = r"whom run test has forgotten is not known, perhaps client 0 \(.*\): repair or remove that run"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed_about, FORGOT),
        (settings_of_another_version, FORGOT),
        (lost_about, NOBODY_KNOWS),
        (junk_about, NOBODY_KNOWS),
        (lost_ledger, NOBODY_KNOWS),
        (junk_ledger, NOBODY_KNOWS),
    ],
)
def test_a_damaged_run_keeps_its_ban(federate, damage, message):
    federate.shared("forget.schedule={1:[3]} rounds=1 forget.purge=always", name="test")
    shutil.rmtree(federate.home / "data", ignore_errors=True)  # its images come back
    damage(federate.folder())
    with pytest.raises(UserError, match=message):
        federate("run=other rounds=1 forget.purge=always")


def test_beside_a_damaged_run_a_run_with_public_images_begins(federate, capsys):
    federate.shared("forget.schedule={1:[3]} rounds=1 forget.purge=always", name="test")
    junk_ledger(federate.folder())
    federate("run=other rounds=1")
    assert "whom run test has forgotten is not known (" in capsys.readouterr().err


def test_whoever_names_every_client_begins_beside_a_damaged_run(federate):
    federate.shared("forget.schedule={1:[3]} rounds=1 forget.purge=always", name="test")
    junk_ledger(federate.folder())
    federate("run=other rounds=1 forget.purge=always readmit=[0,1,2,3]")
    (event,) = (event for event in federate.run("other").ledger.events() if "readmitted" in event)
    assert event["readmitted"] == dict.fromkeys("0123", "run test, perhaps")


def test_a_damaged_run_that_has_forgotten_nobody_bans_nobody(federate):
    federate.shared("rounds=1", name="test")
    lost_about(federate.folder())
    federate("run=other rounds=1")
    assert federate.run("other").ledger.current().finished


def test_whose_key_asked_to_be_forgotten_is_known_by_the_key(federate):
    key = "a" * 64
    federate(f"{FORGOTTEN} forget.keys={{3:{key}}} rounds=2")
    with pytest.raises(UserError, match=r"client 0 was forgotten by run test \(request r1\)"):
        federate(f"run=other partition.seed=1 forget.keys={{0:{key}}}")


def test_whoever_is_readmitted_has_images_again(federate):
    federate(FORGOTTEN)
    assert len(images_of(federate, 3)[0]) == 0
    federate("run=back readmit=[3]")
    assert len(images_of(federate, 3, "back")[0]) == 28
    assert federate.run("back").ledger.examples()[3] == 28


def test_images_that_come_back_change_hands_in_no_other_run(federate):
    federate(FORGOTTEN)
    federate("run=dealt partition.seed=1 rounds=1")  # what is left
    dealt = [images_of(federate, client, "dealt") for client in range(4)]
    federate("run=back readmit=[3]")
    assert len(images_of(federate, 3, "back")[0]) == 28
    assert len(images_of(federate, 3)[0]) == 28  # they had the same owner there
    for client, parts in enumerate(dealt):
        assert all(map(np.array_equal, images_of(federate, client, "dealt"), parts))
    federate("run=dealt partition.seed=1 rounds=2")
    assert federate.run("dealt").ledger.current().round == 2


def test_who_comes_back_has_those_images_too_that_another_run_alone_had_taken_out(federate):
    federate("run=other partition.seed=1 rounds=1 forget.purge=always")
    federate(FORGOTTEN)
    assert len(images_of(federate, 3)[0]) == 28  # the other run needs them
    assert command("forget", "--client", "2", "--run", "other", "--engine", "local") == 0
    assert len(images_of(federate, 3)[0]) < 28
    federate("run=back readmit=[3]")
    assert len(images_of(federate, 3, "back")[0]) == 28


def test_nobody_comes_back_into_runs_that_began_without_them(federate):
    federate(FORGOTTEN)
    federate("run=class partition.kind=class clients=10 rounds=1")
    images = [images_of(federate, client, "class")[0] for client in range(10)]
    federate("run=back readmit=[3]")
    assert all(map(np.array_equal, (images_of(federate, client, "class")[0] for client in range(10)), images))
    federate("run=class partition.kind=class clients=10 rounds=2")


def test_nobody_comes_back_where_a_run_of_the_same_deal_began_without_them(federate):
    federate(FORGOTTEN)
    federate("run=after rounds=1")
    with pytest.raises(UserError, match=r"readmit=\[3\]: a run has begun without the images of client 3; name another"):
        federate("run=back readmit=[3]")
    federate("run=after rounds=2")
    assert len(images_of(federate, 3)[0]) == 0


def test_whoever_comes_back_needs_a_source_that_is_as_it_was(federate, monkeypatch):
    federate(FORGOTTEN)
    whole = datasets._decode_digits()
    turned = whole._replace(train=whole.train._replace(images=whole.train.images[:, ::-1]))
    monkeypatch.setattr(datasets, "_decode_digits", lambda: turned)
    with pytest.raises(UserError, match="does not give the images any more"):
        federate("run=back readmit=[3]")
    monkeypatch.undo()
    assert [len(images_of(federate, client)[0]) for client in range(4)] == [32, 36, 24, 0]


def test_who_is_readmitted_beside_a_damaged_run_has_images_again(federate):
    federate(FORGOTTEN)
    federate("run=damaged rounds=1 forget.schedule={0:[3]}")
    junk_ledger(federate.folder("damaged"))
    federate("run=back readmit=[0,1,2,3]")
    assert len(images_of(federate, 3, "back")[0]) == 28


def test_the_same_process_does_not_train_on_images_that_are_gone(federate):
    federate(FORGOTTEN)
    federate("run=other")
    assert federate.run("other").ledger.examples() == {0: 32, 1: 36, 2: 24, 3: 0}


def test_who_was_forgotten_in_an_experiment_with_public_images_trains_in_the_next(federate):
    federate("forget.schedule={2:[3]}")
    assert len(images_of(federate, 3)[0]) == 28
    federate("run=other")
    assert federate.run("other").ledger.examples()[3] == 28


def test_a_run_says_once_that_images_of_forgotten_clients_are_gone(federate, capsys):
    forgotten_once(federate)
    assert command("purge", "--client", "3", "--run", "test") == 0
    capsys.readouterr()
    federate("rounds=1 run=other", nodes=4)
    assert capsys.readouterr().err.count("is without 28 images of forgotten clients") == 1
