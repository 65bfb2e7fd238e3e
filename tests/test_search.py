"""The search by content claims nothing of a file that has only what files of its kind share, and finds real copies."""

import json
import sqlite3
import tarfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from fedunlearn.data.search import Found, Wanted
from fedunlearn.data.source_files import SourceFiles, windows_of
from fedunlearn.runs import scan

NOTHING = np.empty((0, 8, 8, 3), np.uint8)


def photo(seed, size=32):
    """A smooth picture with some noise, as photographs are."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(coarse) + random.normal(0, 4, (size, size, 3)), 0, 255).astype(np.uint8)


def black_in_the_middle(seed, size=96):
    pixels = photo(seed, size)
    pixels[8:-8] = 0
    return pixels


def saved(folder, ending, picture=photo, seeds=range(3), **how):
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{seed}.{ending}" for seed in seeds]
    for seed, file in zip(seeds, files, strict=True):
        Image.fromarray(picture(seed)).save(file, **how)
    return files


def looking_for(files, others=()):
    return Wanted(NOTHING, np.empty(0, np.int64), others=NOTHING, files=files, other_files=others)


def files_found(wanted, *places):
    return {path.name: one.files for path, one in scan.scan(wanted, places) if one.files}


SORTS = [
    ("jpg", photo, {}),
    ("jpg", photo, {"progressive": True}),
    ("jpg", photo, {"exif": b"Exif\0\0" + bytes(range(256)) * 9}),
    ("bmp", black_in_the_middle, {}),
    ("tif", black_in_the_middle, {}),
    ("png", photo, {}),
    ("png", photo, {"icc_profile": bytes(range(1, 256)) * 9}),
    ("webp", photo, {}),
    ("gif", photo, {}),
    ("tif", photo, {"compression": "jpeg"}),
]


@pytest.mark.parametrize(("ending", "picture", "how"), SORTS)
def test_files_of_the_same_kind_are_told_apart_and_copies_are_found(tmp_path, ending, picture, how):
    mine = saved(tmp_path / "mine", ending, picture, **how)
    theirs = saved(tmp_path / "theirs", ending, picture, range(10, 14), **how)
    saved(tmp_path / "elsewhere", ending, picture, range(20, 23), **how)
    wanted = looking_for(mine, theirs)
    assert wanted.unknown_files == 0
    for place, file in enumerate(mine):
        assert wanted.found_in(file) == Found(files={place})
    assert not files_found(wanted, tmp_path / "theirs", tmp_path / "elsewhere")


@pytest.mark.parametrize(("ending", "picture", "how"), [sort for sort in SORTS if not sort[2].get("compression")])
def test_a_single_file_is_not_taken_for_any_other_of_its_kind(tmp_path, ending, picture, how):
    mine = saved(tmp_path / "mine", ending, picture, range(1), **how)
    saved(tmp_path / "elsewhere", ending, picture, range(20, 24), **how)
    wanted = looking_for(mine)
    assert files_found(wanted, tmp_path) == {"0." + ending: {0}}


def test_what_is_the_same_all_over_is_in_no_file_of_other_kinds(tmp_path):
    wanted = looking_for(saved(tmp_path / "mine", "bmp", black_in_the_middle))
    save_file({"zeros": np.zeros(9999, np.float32), "ones": np.ones(9999)}, tmp_path / "model.safetensors")
    np.save(tmp_path / "numbers.npy", np.arange(9999))
    np.save(tmp_path / "bytes.npy", np.arange(9999).astype(np.uint8))
    (tmp_path / "run.json").write_text(json.dumps({"names": ["of all"] * 99}))
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("CREATE TABLE events (content BLOB)")
    db.execute("INSERT INTO events VALUES (?)", (bytes(99999),))
    db.commit()
    db.close()
    assert set(files_found(wanted, tmp_path)) == {"0.bmp", "1.bmp", "2.bmp"}


def test_files_without_anything_of_their_own_are_counted_and_claimed_nowhere(tmp_path):
    black = [tmp_path / name for name in ("black.bmp", "tiny.txt", "ramp.bin", "missing.png")]
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(black[0])
    black[1].write_text("tiny")
    black[2].write_bytes(bytes(range(256)) * 9)
    wanted = looking_for(black)
    assert wanted.unknown_files == 4
    assert not files_found(wanted, tmp_path)
    assert scan.not_told_apart(wanted) == ["4 of the source files cannot be told from others"]


def test_a_file_that_another_client_has_too_is_nobodys(tmp_path):
    mine, theirs = saved(tmp_path / "mine", "jpg"), saved(tmp_path / "theirs", "jpg", seeds=[1, 11])
    wanted = looking_for(mine, theirs)
    assert wanted.unknown_files == 1
    assert files_found(wanted, tmp_path) == {"0.jpg": {0}, "2.jpg": {2}}


def test_an_image_that_was_saved_again_with_other_metadata_is_of_both(tmp_path):
    mine = saved(tmp_path / "mine", "jpg", seeds=[1])
    theirs = saved(tmp_path / "theirs", "jpg", seeds=[1], exif=b"Exif\0\0" + bytes(99))
    assert looking_for(mine, theirs).unknown_files == 1


def test_of_files_with_the_same_content_the_first_stands_for_both(tmp_path):
    mine = [*saved(tmp_path / "mine", "jpg", seeds=[1]), *saved(tmp_path / "again", "jpg", seeds=[1, 2])]
    wanted = looking_for(mine)
    assert wanted.unknown_files == 0
    assert wanted.found_in(mine[1]) == Found(files={0})


def test_a_picture_that_its_owner_has_twice_is_found(tmp_path):
    mine = [*saved(tmp_path / "a", "png"), *saved(tmp_path / "b", "png", icc_profile=bytes(range(1, 256)))]
    wanted = looking_for(mine)
    assert wanted.unknown_files == 0
    assert all(wanted.found_in(file).files for file in mine)


def test_another_clients_decoded_images_are_no_source_files(tmp_path):
    """A bitmap that is not compressed has the pixels of the same picture in another format."""
    mine = saved(tmp_path, "ppm")
    theirs = np.stack([np.asarray(Image.open(file)) for file in mine[:2]])
    np.save(tmp_path / "train_images.npy", theirs)
    wanted = Wanted(NOTHING, np.empty(0, np.int64), others=theirs, files=mine)
    assert wanted.unknown_files == 2
    assert files_found(wanted, tmp_path) == {"2.ppm": {2}}


@pytest.mark.parametrize("ending", ["jpg", "bmp"])
def test_copies_are_found_within_other_files(tmp_path, ending):
    mine = saved(tmp_path / "mine", ending, black_in_the_middle)
    wanted = looking_for(mine, saved(tmp_path / "theirs", ending, black_in_the_middle, range(10, 13)))
    for mode in ("w", "w:gz"):
        with tarfile.open(tmp_path / "some.tar", mode) as archive:
            archive.add(mine[0], "one")
            archive.add(mine[2], "two")
        assert wanted.found_in(tmp_path / "some.tar") == Found(files={0, 2})
    db = sqlite3.connect(tmp_path / "some.db")
    db.execute("PRAGMA secure_delete=OFF")
    db.execute("CREATE TABLE messages (content BLOB)")
    for file in mine:
        db.execute("INSERT INTO messages VALUES (?)", (file.read_bytes(),))
    db.commit()
    db.execute("DELETE FROM messages")
    db.commit()
    db.close()
    assert wanted.found_in(tmp_path / "some.db") == Found(files={0, 1, 2})
    cut = mine[1].read_bytes()
    (tmp_path / "cut").write_bytes(cut[len(cut) // 3 :] if ending == "jpg" else cut[: len(cut) // 2])
    assert wanted.found_in(tmp_path / "cut") == Found(files={1})


def test_less_than_half_of_a_files_windows_is_no_copy(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "mine").write_bytes(random.bytes(8000))
    content = (tmp_path / "mine").read_bytes()
    windows = sorted(content.index(window) for window in windows_of(content))
    source = SourceFiles([tmp_path / "mine"], [])
    found = [source.having([content[start : start + 64] for start in windows[:count]]) for count in (0, 3, 4, 8)]
    assert found == [set(), set(), {0}, {0}]


def test_images_without_anything_of_their_own_are_found_nowhere(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[1] = 255
    images[2] = (10, 200, 30)
    images[3] = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    wanted = Wanted(images, np.arange(4), others=NOTHING)
    assert wanted.unknown == 3
    (tmp_path / "zeros").write_bytes(bytes(9999) + b"\xff" * 9999 + bytes([10, 200, 30] * 99))
    assert not wanted.found_in(tmp_path / "zeros")
    np.save(tmp_path / "floats.npy", images.astype(np.float32) / 255)
    assert wanted.found_in(tmp_path / "floats.npy") == Found(images={3})


def test_rows_of_ones_and_zeros_are_found_nowhere_and_others_are(tmp_path):
    rows = np.array([[0, 1, 1, 0], [63, 1, 140.5, 0]], np.float32)[:, None, None, :]
    wanted = Wanted(rows, np.arange(2), others=np.zeros((1, 1, 1, 4), np.float32))
    assert wanted.unknown == 1
    np.save(tmp_path / "some.npy", rows)
    assert wanted.found_in(tmp_path / "some.npy") == Found(images={1})


def test_sorted_labels_tell_nobody_apart(tmp_path):
    labels = np.repeat(np.arange(10), 10)
    (tmp_path / "labels").write_bytes(labels.tobytes())
    assert not Wanted(NOTHING, labels, others=NOTHING).found_in(tmp_path / "labels")
    both = np.concatenate([labels, labels])  # of images to train with, then of held-out ones
    (tmp_path / "labels").write_bytes(both.tobytes())
    assert not Wanted(NOTHING, both, others=NOTHING).found_in(tmp_path / "labels")
