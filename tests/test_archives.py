"""Runs of images in an archive: what of it is unpacked stays without the files of forgotten clients."""

import shutil
from pathlib import Path

import pytest

from command_line import command
from fedunlearn.build import open_dataset, slices_of
from fedunlearn.errors import UserError
from fedunlearn.runs.receipts import FOLDER
from fedunlearn.runs.verifying import verified
from test_owners import hospitals, picture

QUICK = "strategy=leave train.batch_size=64 train.client_head_steps=1 batch_norm_fraction=0 model.width=8"
CLIENTS = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Ray and Flower have no files here."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))


def folders(tmp_path):
    hospitals(tmp_path / "tree", CLIENTS)
    return "partition.kind=folders"


def table(tmp_path):
    hospitals(tmp_path / "tree", CLIENTS)
    lines = [f"{c}/{k}/{i}.png,{c}" for c in CLIENTS for k in ("no", "yes") for i in range(6)]
    (tmp_path / "tree" / "clients.csv").write_text("\n".join(["path,client", *lines]))
    return "partition.file=clients.csv"


def dealt(tmp_path):
    for k, name in enumerate(("no", "yes")):
        for i in range(24):
            picture(tmp_path / "tree" / name / f"{i:02}.png", 100 * k + i)
    return "partition.kind=iid"


SORTS = [(folders, "zip"), pytest.param((table, "gztar"), marks=pytest.mark.thorough), (dealt, "tar")]


@pytest.fixture(params=SORTS, ids=["folders", "table", "dealt"])
def hosted(federate, tmp_path, request):
    """Runs of an archive of four clients."""
    make, form = request.param
    kind = make(tmp_path)
    archive = shutil.make_archive(str(tmp_path / "own"), form, tmp_path, "tree")
    about = f"data.name=folder data.root={archive} data.image_size=8 data.limit=0 data.test_limit=0 {QUICK} {kind}"

    def run(words="", rounds=1):
        return federate(f"{about} rounds={rounds} {words}", nodes=1)

    run.archive = Path(archive)
    run.is_dealt = make is dealt
    return run


def sizes(federate, name="test"):
    config = federate.run(name).config_here()
    return [len(own) for own in slices_of(config, open_dataset(config))]


def unpacked(federate):
    """How many files of images lie unpacked."""
    return len(list((federate.home / "data").glob("unpacked-*/**/*.png")))


def receipt(federate, name="test"):
    files = sorted((federate.folder(name) / FOLDER).glob("*.json"), key=lambda file: (len(file.stem), file.stem))
    return verified(files[-1].read_bytes())


def test_files_of_whom_a_run_forgot_are_unpacked_no_more_and_the_archive_is_named(federate, hosted, capsys):
    hosted("forget.schedule={1:[1]}")
    own, kept = (10, 40 - 10) if hosted.is_dealt else (12, 48 - 12)
    kept += 8 if hosted.is_dealt else 0  # held out, of nobody
    assert unpacked(federate) == kept
    (listed,) = {file.resolve() for file in (federate.home / "data").glob("*/files-to-delete.txt")}
    lines = listed.read_text().splitlines()
    assert len(lines) == own
    assert all(line.startswith(f"{hosted.archive}: tree/") and line.endswith(".png") for line in lines)
    said = receipt(federate)
    assert any(line.endswith(f"in the unpacked archive: {own} deleted") for line in said.deleted)
    assert any("none was found" in line for line in said.deleted)
    for words in ("", "again"):
        if words:
            shutil.rmtree(next((federate.home / "data").glob("unpacked-*/")))
        hosted("forget.schedule={1:[1]}", rounds=3 if words else 2)
        assert unpacked(federate) == kept
        assert command("scan", "--client", "1", "--run", "test") == 0
        assert sizes(federate)[1] == 0
    assert "none was found" in str(receipt(federate).deleted)
    assert command("scan", "--client", "1", "--run", "test", "--also", hosted.archive) == 1
    hosted("run=back readmit=[1]")
    assert sizes(federate, "back")[1] == 10
    assert unpacked(federate) == 48


@pytest.mark.parametrize("hosted", [(folders, "zip")], indirect=True, ids=["folders"])
def test_files_stay_unpacked_while_a_run_with_another_copy_needs_them(federate, hosted):
    hosted("run=other data.image_size=9")
    hosted("forget.schedule={1:[1]}")
    assert unpacked(federate) == 48
    assert any("an unpacked archive" in one.why for one in receipt(federate).kept)
    hosted("run=other data.image_size=9", rounds=2)
    assert command("forget", "--client", "b", "--run", "other", "--engine", "local") == 0
    assert unpacked(federate) == 36


@pytest.mark.parametrize("hosted", [(dealt, "tar")], indirect=True, ids=["dealt"])
def test_dealt_files_of_another_client_stay_away_when_one_is_readmitted(federate, hosted):
    hosted("forget.schedule={1:[1,3]}")
    assert unpacked(federate) == 28
    hosted("run=back readmit=[1]")
    assert sizes(federate, "back") == [10, 10, 10, 0]
    assert unpacked(federate) == 38
    hosted("forget.schedule={1:[1,3]}", rounds=2)
    assert federate.run().ledger.current().round == 2


@pytest.mark.parametrize("hosted", [(dealt, "tar")], indirect=True, ids=["dealt"])
def test_two_copies_of_an_archive_are_found_whatever_is_deleted_and_unpacked(federate, hosted):
    runs = {"other": "run=other data.image_size=9", "test": "", "back": "run=back readmit=[1]"}
    for name in ("other", "test"):
        hosted(runs[name])
    for name in ("other", "test"):
        assert command("forget", "--client", "1", "--client", "3", "--run", name, "--engine", "local") == 0
    assert unpacked(federate) == 28
    hosted(runs["back"])
    assert unpacked(federate) == 38
    for name, words in runs.items():
        hosted(words, rounds=2)
        assert federate.run(name).ledger.current().round == 2


@pytest.mark.parametrize("hosted", [(dealt, "tar")], indirect=True, ids=["dealt"])
def test_nobody_comes_back_from_an_archive_whose_copy_is_gone(federate, hosted):
    hosted("forget.schedule={1:[1]}")
    with pytest.raises(UserError, match=r"readmit=\[1\]: files of forgotten clients in .* stay away"):
        hosted("run=back readmit=[1] data.image_size=9")
    assert unpacked(federate) == 38


@pytest.mark.parametrize("hosted", [(folders, "zip")], indirect=True, ids=["folders"])
def test_files_of_another_client_stay_away_when_one_is_readmitted(federate, hosted):
    hosted("forget.schedule={1:[b,d]}")
    assert unpacked(federate) == 24
    with pytest.raises(UserError, match="clients b and d were forgotten by run test"):
        hosted("run=plain")
    hosted("run=back readmit=[b] forget.schedule={0:[d]} forget.purge=never")
    assert unpacked(federate) == 48
    shutil.rmtree(federate.folder("back"))
    hosted("forget.schedule={1:[b,d]}", rounds=2)
    assert unpacked(federate) == 24
    hosted("run=again clients=3 partition.names=[a,b,c] readmit=[b] data.image_size=9")
    assert sizes(federate, "again") == [10, 10, 10]
    assert unpacked(federate) == 36
