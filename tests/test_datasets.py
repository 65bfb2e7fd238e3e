import json
import logging
import pickle
import tarfile
import threading
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torchvision
from PIL import Image

from fedunlearn.data import datasets
from fedunlearn.data.store import Dataset
from fedunlearn.errors import UserError


def image_tree(root, classes=("a", "b"), per_class=6, size=12):
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


def test_digits_are_embedded_and_memory_mapped(tmp_path):
    data = datasets.load("digits", cache=tmp_path)
    assert data.train.images.shape == (1437, 8, 8, 1)
    assert data.test.images.shape == (360, 8, 8, 1)
    assert data.train.images.dtype == np.uint8
    assert data.train.images.max() == 255
    assert isinstance(data.train.images, np.memmap)
    assert len(data.class_names) == 10


def test_who_asks_for_test_images_alone_never_touches_the_training_images(tmp_path):
    store = datasets.load("digits", cache=tmp_path).store
    for file in store.glob("train_*"):
        file.unlink()
    data = datasets.load("digits", cache=tmp_path)
    assert data.test.images.shape == (360, 8, 8, 1)
    assert (data.channels, len(data.class_names), len(data.fingerprint)) == (1, 10, 64)
    with pytest.raises(UserError, match=r"train_images\.npy is missing or damaged"):
        _ = data.train


def test_stores_of_earlier_versions_have_channels_too(tmp_path):
    data = datasets.load("random", cache=tmp_path, limit=20, test_limit=20)
    meta = json.loads((data.store / "meta.json").read_text())
    assert meta.pop("channels") == data.channels == 3
    (data.store / "meta.json").write_text(json.dumps(meta))
    assert Dataset(data.store).channels == 3


def test_is_decoded_once(tmp_path, monkeypatch):
    first = datasets.load("digits", cache=tmp_path)
    monkeypatch.setattr(datasets, "_decode_digits", lambda: pytest.fail("decoded again"))
    second = datasets.load("digits", cache=tmp_path)
    assert first.fingerprint == second.fingerprint
    assert (first.train.images == second.train.images).all()


def test_random_images_have_the_size_and_number_asked_for_and_are_always_the_same(tmp_path):
    first, again = (
        datasets.load("random", cache=tmp_path / home, limit=50, test_limit=20, image_size=8) for home in "ab"
    )
    assert first.train.images.shape == (50, 8, 8, 3)
    assert first.test.images.shape == (20, 8, 8, 3)
    assert np.bincount(first.train.labels).tolist() == [5] * 10
    assert first.fingerprint == again.fingerprint
    same, other = first.train.images[[0, 10]].astype(float), first.train.images[[0, 11]].astype(float)
    assert np.abs(same[0] - same[1]).mean() < np.abs(other[0] - other[1]).mean()


def test_limit_keeps_the_first_of_each_class_in_order(tmp_path):
    whole, part = (datasets.load("digits", cache=tmp_path, limit=n) for n in (0, 50))
    assert np.bincount(part.train.labels).tolist() == [5] * 10
    for k in range(10):
        expected = whole.train.images[whole.train.labels == k][:5]
        assert (part.train.images[part.train.labels == k] == expected).all()
    assert part.fingerprint != whole.fingerprint


def test_folder_with_splits(tmp_path):
    image_tree(tmp_path / "tree" / "train")
    image_tree(tmp_path / "tree" / "test", per_class=2)
    data = datasets.load("folder", root=str(tmp_path / "tree"), cache=tmp_path / "cache", image_size=12)
    assert data.train.images.shape == (12, 12, 12, 3)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.class_names == ["a", "b"]
    with Image.open(tmp_path / "tree" / "train" / "b" / "0.png") as image:
        assert (data.train.images[6] == np.asarray(image)).all()


def test_folder_without_splits_takes_every_sixth_of_a_class_for_testing(tmp_path):
    image_tree(tmp_path / "tree", per_class=12)
    data = datasets.load("folder", root=str(tmp_path / "tree"), cache=tmp_path / "cache")
    assert (len(data.train.labels), data.test.labels.tolist()) == (20, [0, 0, 1, 1])


def test_archive_of_a_folder_is_unpacked_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fedunlearn")
    tree = image_tree(tmp_path / "tree")
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz") as archive:
        for child in tree.iterdir():
            archive.add(child, child.name)
    for _ in range(2):
        data = datasets.load("folder", root=str(tmp_path / "images.tar.xz"), cache=tmp_path / "cache")
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    assert [record.getMessage().split()[0] for record in caplog.records] == ["unpacking", "decoding", "12"]


def test_changed_folder_is_decoded_again(tmp_path):
    tree = image_tree(tmp_path / "tree")
    before = datasets.load("folder", root=str(tree), cache=tmp_path / "cache")
    (tree / "a" / "0.png").unlink()
    after = datasets.load("folder", root=str(tree), cache=tmp_path / "cache")
    counts = [len(data.train.labels) + len(data.test.labels) for data in (before, after)]
    assert counts == [12, 11]


@pytest.mark.parametrize(
    ("name", "file", "hint"),
    [
        ("folder", "x.npz", "is read as data.name=npz or data.name=medmnist, not as folder"),
        ("folder", "x.csv", "is read as data.name=table, not as folder"),
        ("folder", "x.xlsx", "save it as a CSV file, for data.name=table"),
        ("table", "x.NPZ", "is read as data.name=npz or data.name=medmnist, not as table"),
        ("npz", "x.parquet", "is read as data.name=hf or data.name=table, not as npz"),
        ("npz", "x.npy", "save its arrays with numpy.savez"),
        ("hf", "x.tar.gz", "is read as data.name=folder, not as hf"),
    ],
)
@pytest.mark.parametrize("kind", ["", "folders"])
def test_a_file_of_another_data_set_is_named_before_it_is_read(tmp_path, name, file, hint, kind):
    np.savez(tmp_path / "x.npz", images=np.zeros((12, 8, 8)), labels=np.arange(12) % 2)
    (tmp_path / "x.npz").rename(tmp_path / file)
    owners = datasets.Owners(kind if name == "folder" else "")
    with pytest.raises(UserError, match=hint) as raised:
        datasets.load(name, root=str(tmp_path / file), cache=tmp_path / "cache", owners=owners)
    assert str(tmp_path / file) in str(raised.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tree: None, "does not exist"),
        (lambda tree: tree.mkdir(), "is no folder of one subfolder of images a class"),
        (lambda tree: image_tree(tree, classes=("only",)), r"has one class \(only\)"),
        (lambda tree: image_tree(tree) and (tree / "a" / "0.png").write_bytes(b"no image"), "is not a readable image"),
        (lambda tree: tree.write_bytes(b"no archive"), "no folder and no readable archive"),
        (lambda tree: image_tree(tree, per_class=5), "has no images for testing"),
    ],
    ids=["missing", "empty", "one class", "damaged image", "damaged archive", "too few to test"],
)
def test_unusable_folders_are_named(tmp_path, make, message):
    make(tmp_path / "tree")
    with pytest.raises(UserError, match=message):
        datasets.load("folder", root=str(tmp_path / "tree"), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("folder*"))


def test_relative_root_is_refused(tmp_path):
    with pytest.raises(UserError, match="no absolute path"):
        datasets.load("folder", root="images", cache=tmp_path)


def cifar_archive(folder, name, labels_key, classes):
    """An archive in CIFAR's own format, of ten training images and ten test images."""
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    random, checksums, contents = np.random.default_rng(0), {}, {}
    meta = (source.meta["filename"], pickle.dumps({source.meta["key"]: [f"class {k}" for k in range(classes)]}))
    splits = [(file, i) for i, (file, _) in enumerate([*source.train_list, *source.test_list])]
    for file, i in splits:
        rows = {
            "data": random.integers(0, 256, (10, 3072), np.uint8),
            labels_key: [(i + j) % classes for j in range(10)],
        }
        contents[file] = pickle.dumps(rows)
    contents[meta[0]] = meta[1]
    base = folder / source.base_folder
    base.mkdir(parents=True)
    for file, data in contents.items():
        (base / file).write_bytes(data)
        checksums[file] = md5(data).hexdigest()
    archive = folder / "web" / source.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, source.base_folder)
    return source, archive, checksums


@pytest.fixture
def web(tmp_path):
    """A web server of this machine alone, for `tmp_path`."""
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve(monkeypatch, web, source, archive, checksums):
    monkeypatch.setattr(source, "url", f"{web}/made/web/{archive.name}")
    monkeypatch.setattr(source, "tgz_md5", md5(archive.read_bytes()).hexdigest())
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [[file, checksums[file]] for file, _ in getattr(source, part)])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": checksums[source.meta["filename"]]})


@pytest.mark.parametrize(
    ("name", "labels_key", "classes", "train"), [("cifar10", "labels", 10, 50), ("cifar100", "fine_labels", 100, 10)]
)
def test_cifar_is_downloaded_verified_and_decoded(tmp_path, monkeypatch, web, name, labels_key, classes, train):
    source, archive, checksums = cifar_archive(tmp_path / "made", name, labels_key, classes)
    serve(monkeypatch, web, source, archive, checksums)
    data = datasets.load(name, cache=tmp_path / "cache")
    assert data.train.images.shape == (train, 32, 32, 3)
    assert data.class_names == [f"class {k}" for k in range(classes)]
    rows = pickle.loads((tmp_path / "made" / source.base_folder / source.train_list[0][0]).read_bytes())
    assert (data.train.images[0] == rows["data"][0].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert data.train.labels[:10].tolist() == rows[labels_key]


def test_corrupt_download_and_no_network_are_named(tmp_path, monkeypatch, web):
    source, archive, checksums = cifar_archive(tmp_path / "made", "cifar100", "fine_labels", 100)
    serve(monkeypatch, web, source, archive, checksums)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cifar100 could not be loaded .*put a good cifar-100-python.tar.gz into"):
        datasets.load("cifar100", cache=tmp_path / "cache")
    archive.unlink()
    with pytest.raises(
        UserError, match=r"or use images of your own with data\.name=folder data\.root=/path/to/images$"
    ):
        datasets.load("cifar100", cache=tmp_path / "other")
    assert not list(tmp_path.glob("*/cifar100-*"))


def test_whoever_has_images_open_that_are_written_anew_is_told_so(tmp_path):
    opened, changed = (datasets.load("digits", cache=tmp_path) for _ in range(2))
    changed.without(np.arange(len(changed.train.labels)) < 5, {})
    for what in ("train", "files", "owners"):
        with pytest.raises(UserError, match="was written anew meanwhile"):
            getattr(opened, what)
    assert opened.version != datasets.load("digits", cache=tmp_path).version
