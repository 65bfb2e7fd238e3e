"""Images whose owners are known: trees and tables, a part of the copy for each client, names in settings."""

import logging
import os
import shutil
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedunlearn import build
from fedunlearn.composing import compose
from fedunlearn.data.datasets import Choices, Owners, load, source_of
from fedunlearn.data.folders import of_folders, of_table
from fedunlearn.data.joined import Joined
from fedunlearn.errors import UserError
from fedunlearn.naming import as_typed, class_numbers, for_shell, named, numbers_of
from fedunlearn.owners import named_settings
from fedunlearn.runs.hints import forget_command
from fedunlearn.words import split_words

ODD_NAMES = [
    "St. Mary, Ward 2",
    "it's",
    'the "other"',
    "a b",
    "$HOME `x` !y",
    "[1]",
    "b\\",
    "no\xa0break",
    "병원",
    "{1,2}",
]
HOSPITALS = ("a", "b", "c")


def picture(file, value=0):
    """An image of 8 x 8 pixels that no other value gives."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def hospitals(root, clients=HOSPITALS, classes=("no", "yes"), each=6, below=""):
    """A tree root/client/class/image."""
    for c, client in enumerate(clients):
        for k, name in enumerate(classes):
            for i in range(each):
                picture(root / below / client / name / f"{i}.png", 100 * c + 10 * k + i)
    return root


@pytest.fixture
def tree(tmp_path):
    return hospitals(tmp_path / "tree")


def place(tree, kind="folders", **owners):
    """What `load` takes."""
    about = {"cache": tree.parent / "cache", "root": str(tree), "image_size": 8}
    return about | {"owners": Owners(kind, **owners)}


def opened(tree, kind="folders", **owners):
    return load("folder", **place(tree, kind, **owners))


def parts_of(tree):
    """The folders of all parts of the copy."""
    return {file.parent.name for file in (tree.parent / "cache").glob("owners-*/*/meta.json")}


def own_files(dataset):
    """By client's name, the files of its training images."""
    return {name: [dataset.files[i] for i in own] for name, own in zip(dataset.clients, dataset.slices, strict=True)}


# --- trees --------------------------------------------------------------------------------------------------------


def test_a_folder_for_each_client_is_read_by_class_and_every_sixth_image_is_held_out(tree):
    data = opened(tree)
    assert data.clients == ["a", "b", "c"]
    assert data.class_names == ["no", "yes"]
    assert [len(own) for own in data.slices] == [10, 10, 10]
    assert own_files(data)["b"] == [f"b/{name}/{i}.png" for name in ("no", "yes") for i in range(5)]
    with Image.open(tree / "b" / "yes" / "2.png") as image:
        assert (data.train.images[data.slices[1][7]] == np.asarray(image)).all()
    assert data.train.labels[data.slices[1]].tolist() == [0] * 5 + [1] * 5
    assert data.test.labels[np.arange(6)].tolist() == [0, 1] * 3


def test_test_images_may_be_nobodys_or_a_clients(tmp_path):
    tree = hospitals(tmp_path / "tree", below="train", each=2)
    picture(tree / "test" / "yes" / "0.png", 900)
    picture(tree / "test" / "b" / "no" / "0.png", 901)
    data = opened(tree)
    assert [len(own) for own in data.slices] == [4, 4, 4]
    assert data.test.labels[:].tolist() == [0, 1]
    assert data.parts[1].files("test") == ["test/b/no/0.png"]
    assert data.parts[-1].files("test") == ["test/yes/0.png"]


@pytest.mark.parametrize("has_test", [True, False])
def test_images_for_validation_are_held_out_or_left_out(tmp_path, caplog, has_test):
    caplog.set_level(logging.INFO, "fedunlearn")
    tree = hospitals(tmp_path / "tree", below="train", each=7)
    for client, label in product(HOSPITALS, ("no", "yes")):
        picture(tree / "val" / client / label / "0.png", 900)
    if has_test:
        picture(tree / "test" / "no" / "0.png", 901)
    data = opened(tree)
    assert [len(own) for own in data.slices] == [14] * 3
    assert len(data.test.labels) == (1 if has_test else 6)
    assert (f"left out of {tree}: val" in caplog.text) == has_test


def test_clients_may_miss_a_class_have_one_image_or_none(tmp_path):
    tree = hospitals(tmp_path / "tree", clients=("a",))
    picture(tree / "b" / "yes" / "only.png", 900)
    (tree / "c").mkdir()
    data = opened(tree)
    assert data.clients == ["a", "b", "c"]
    assert [len(own) for own in data.slices] == [10, 1, 0]
    assert data.train.labels[data.slices[1]].tolist() == [1]


def test_names_may_be_of_any_script_and_have_any_sign(tmp_path):
    names = ("Klinik Süd, Haus 2", "a=b$c", "병원")
    data = opened(hospitals(tmp_path / "tree", clients=names, classes=("x = 1", "ja, $2")))
    assert data.clients == sorted(names)
    assert data.class_names == ["ja, $2", "x = 1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: picture(t / "0.png"), "has no folder of a client and a class"),
        (lambda t: picture(t / "a" / "0.png"), "has no folder of a client and a class"),
        (lambda t: picture(t / "a" / "no" / "p1" / "0.png") and shutil.rmtree(t / "b"), None),
        (lambda t: hospitals(t, ("d",), ("train", "test")), "has test, train, which are no classes and no clients"),
        (lambda t: hospitals(t, ("training", "validation")), "has training, validation, which are no classes"),
        (lambda t: hospitals(t, ("test",)), "has test beside folders of clients"),
        (lambda t: picture(t / "d" / "no" / "patient 1" / "0.png"), "is the folder of a class and holds only folders"),
        (lambda t: hospitals(t, below="train"), r"has a, b, c beside train/ and test/"),
    ],
    ids=[
        "image at the top",
        "image of no class",
        "images beside folders",
        "splits",
        "splits 2",
        "a split among clients",
        "only folders",
        "mixed",
    ],
)
def test_a_tree_of_another_form_is_refused_with_a_hint(tree, make, message):
    make(tree)
    if message is None:
        assert len(of_folders(tree).images["a"]) == 13
        return
    with pytest.raises(UserError, match=message):
        opened(tree)


def test_a_test_folder_that_is_no_client_is_named(tmp_path):
    tree = hospitals(tmp_path / "tree", below="train", each=2)
    picture(tree / "test" / "d" / "no" / "0.png")
    with pytest.raises(UserError, match="there is no client d in"):
        opened(tree)


@pytest.mark.parametrize("names", [HOSPITALS, ("valid", "Testing")])
def test_without_owners_folders_of_folders_and_splits_are_no_classes(tmp_path, names):
    tree = hospitals(tmp_path / "tree", clients=names, each=1)
    with pytest.raises(UserError, match=r"partition\.kind=folders"):
        load("folder", root=str(tree), cache=tmp_path / "cache")


def test_too_few_images_to_hold_any_out_are_refused(tmp_path):
    tree = hospitals(tmp_path / "tree", each=5)
    with pytest.raises(UserError, match="has no images for testing: give six of a class and client"):
        opened(tree)


def test_unreadable_images_of_all_clients_are_named_in_one_list(tree):
    for client in ("a", "c"):
        (tree / client / "no" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"(?s)2 of 36 files.*a/no/2\.png.*c/no/2\.png"):
        opened(tree)
    data = load("folder", **place(tree), choices=Choices(skip_bad=True))
    assert [len(own) for own in data.slices] == [9, 10, 9]


# --- tables -------------------------------------------------------------------------------------------------------


def table(tree, text, name="clients.csv"):
    (tree / name).write_text(text)
    return name


def test_a_table_says_whose_images_are(tree):
    rows = [f"b/no/{i}.png,Bergen,p{i // 2},{i == 5}" for i in range(6)]
    rows += [f"a/yes/{i}.png,Aachen,,False" for i in range(3)]
    lines = [row.replace("False", "train").replace("True", "test") for row in rows]
    data = opened(tree, "file", file=table(tree, "\n".join(["path,client,patient,split", *lines])))
    assert data.clients == ["Aachen", "Bergen"]
    assert [len(own) for own in data.slices] == [3, 5]
    assert data.patients == ["", "", "", "p0", "p0", "p1", "p1", "p2"]
    assert own_files(data)["Aachen"] == ["a/yes/0.png", "a/yes/1.png", "a/yes/2.png"]
    assert data.train.labels[:].tolist() == [1] * 3 + [0] * 5


def held_out(tree, rows):
    """The patients that are trained on, and those that are held out, and how many images are."""
    data = opened(tree, "file", file=table(tree, "\n".join(["path,client,patient", *rows])))
    trained = set(data.patients)
    return trained, {row.split(",")[2] for row in rows} - trained, len(data.test.labels)


def test_a_patient_is_held_out_with_all_images_or_with_none_and_stays_there_when_others_go(tree):
    def rows(patients):
        files = [f"{client}/{name}/{i}.png,{client}" for client in "abc" for name in ("no", "yes") for i in range(6)]
        return [f"{file},p{place % 12}" for place, file in enumerate(files) if place % 12 in patients]

    trained, test, images = held_out(tree, rows(range(12)))
    assert (len(trained | test), trained & test, images) == (12, set(), 3 * len(test))
    assert 1 <= len(test) <= 4
    without = min(trained)
    assert held_out(tree, rows(set(range(12)) - {int(without[1:])})) == (trained - {without}, test, images)


def test_where_a_patient_is_not_known_each_image_is_held_out_alone(tree):
    files = [f"{client}/{name}/{i}.png,{client}," for client in "abc" for name in ("no", "yes") for i in range(6)]
    data = opened(tree, "file", file=table(tree, "\n".join(["path,client,patient", *files])))
    assert (len(data.train.labels), len(data.test.labels)) == (33, 3)


def test_a_table_may_say_classes_and_splits_too(tree):
    text = """\ufeffpath;client;class;split
a/no/0.png;x;sick;train
a\\no\\1.png;x;well;TEST
b/no/0.png;"y; z";well;train
c/no/0.png;;sick;test
"""
    data = opened(tree, "file", file=table(tree, text))
    assert (data.clients, data.class_names) == (["x", "y; z"], ["sick", "well"])
    assert [len(own) for own in data.slices] == [1, 1]
    assert data.test.labels[:].tolist() == [1, 0]


def test_a_table_is_read_as_spreadsheets_write_it(tree):
    rows = [f"a/no/{i}.png\t{name}\r\n" for i, name in enumerate(["\xe9", "e\u0301 ", "\xe9"])]
    rows += [f"{tree / 'b' / 'yes'}/{i}.png\tz\r\n" for i in range(6)] + ["\t\r\n"]
    link = tree.parent / "link"
    link.symlink_to(tree)
    data = opened(link, "file", file=table(tree, "".join(["path\tclient\r\n", *rows])))
    assert (data.clients, [len(own) for own in data.slices]) == (["z", "\xe9"], [5, 3])


def test_a_quote_that_is_not_closed_is_named(tree):
    text = 'path,client\n"a/no/0.png,x\n' + "b/no/0.png,y\n" * 20_000
    with pytest.raises(UserError, match=r"clients\.csv cannot be read: line \d+: .* is a quote not closed"):
        opened(tree, "file", file=table(tree, text))


def test_an_archive_may_have_its_table_beside_the_one_folder_of_images(tree):
    rows = [f"images/{c}/no/{i}.png,{c}" for c in "ab" for i in range(6)] + ["images/c/yes/0.png,b"]
    outer = tree.parent / "outer"
    shutil.copytree(tree, outer / "images")
    table(outer, "\n".join(["path,client", *rows]))
    archive = shutil.make_archive(str(tree.parent / "sent"), "zip", outer)
    about = place(tree, "file", file="clients.csv") | {"root": archive}
    assert [len(own) for own in load("folder", **about).slices] == [5, 6]


def test_all_mistakes_of_a_table_are_in_one_list(tree):
    rows = ["a/no/0.png,x,train", "a/no/0.png,y,train", "a/no/99.png,x,train", "../other.png,x,train"]
    rows += ["a/no/1.png,,train", "a/no/2.png,x,validate", "clients.csv,x,train", "a/no/3.png,x,train,more"]
    rows += ["loose.png,x,train"]
    picture(tree / "loose.png", 7)
    with pytest.raises(UserError) as error:
        opened(tree, "file", file=table(tree, "\n".join(["path,client,split", *rows])))
    expected = {
        3: "a/no/0.png is there twice",
        4: "a/no/99.png is not there",
        5: "../other.png is outside of data.root",
        6: "a/no/1.png has no client",
        7: "split 'validate' is neither train nor test",
        8: "clients.csv is no image",
        9: "it has more values than there are columns",
        10: "loose.png has no class: give it one in the column class, or put it into a folder",
    }
    assert f"has {len(expected)} wrong lines" in str(error.value)
    assert all(f"line {number}: {text}" in str(error.value) for number, text in expected.items())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,clinet", "'clinet' is no column: did you mean client"),
        ("path,client,age", "'age' is no column: there are path, client, class, split, patient"),
        ("client,class", "has no column path: it has client, class"),
        ("path,client,path", "has a column twice"),
    ],
)
def test_columns_of_other_names_are_refused(tree, header, message):
    with pytest.raises(UserError, match=message):
        opened(tree, "file", file=table(tree, f"{header}\n"))


def test_a_table_that_cannot_be_read_is_named(tree):
    (tree / "latin.csv").write_bytes(b"path,client\nm\xe4rz.png,a\n")
    for name, reason in (("missing.csv", "No such file"), ("latin.csv", "it is not in UTF-8")):
        with pytest.raises(UserError, match=f"{name} cannot be read: {reason}"):
            of_table(tree, tree / name)


def test_a_renamed_client_has_a_part_of_its_own(tree):
    rows = [f"b/no/{i}.png" for i in range(6)], [f"a/yes/{i}.png" for i in range(6)]
    for names in (("x", "y"), ("x", "z")):
        lines = [f"{path},{name}" for own, name in zip(rows, names, strict=True) for path in own]
        assert opened(tree, "file", file=table(tree, "\n".join(["path,client", *lines]))).clients == list(names)
    assert len(parts_of(tree)) == 3


# --- parts --------------------------------------------------------------------------------------------------------


def test_a_change_makes_that_clients_part_alone_anew(tree):
    before, prints, copies = opened(tree), opened(tree).fingerprints(), parts_of(tree)
    picture(tree / "b" / "no" / "new.png", 999)
    after = opened(tree)
    changed = {name for name, value in after.fingerprints().items() if prints[name] != value}
    assert changed == {"1"}
    assert len(parts_of(tree) - copies) == 1
    for client in (0, 2):
        same = [data.train.images[data.slices[client]] for data in (before, after)]
        assert (same[0] == same[1]).all()


def test_another_client_changes_nobodys_images(tree):
    prints, copies = opened(tree).fingerprints(), parts_of(tree)
    hospitals(tree, ("aa",), ("maybe", "no"))
    data = opened(tree)
    assert data.clients == ["a", "aa", "b", "c"]
    assert data.class_names == ["maybe", "no", "yes"]
    moved = dict(zip("0123", (prints["0"], data.fingerprints()["1"], prints["1"], prints["2"]), strict=True))
    assert data.fingerprints() == {**moved, "held-out": ""}
    assert copies < parts_of(tree)
    assert opened(tree, names=("a", "b", "c")).fingerprints() == prints


def test_who_hosts_one_client_touches_no_others_images(tree):
    opened(tree)
    data = opened(tree)
    for name in ("a", "c"):
        client = data.clients.index(name)
        for file in (
            source_of("folder", **place(tree), limit=0, test_limit=0)
            .folder(name, of_folders(tree).images[name])
            .glob("*.npy")
        ):
            file.unlink()
        assert data.parts[client].count("train") == 10
    own = data.slices[1]
    assert data.train.images[own].shape == (10, 8, 8, 3)
    assert data.train.labels[own].tolist() == [0] * 5 + [1] * 5
    with pytest.raises(UserError, match=r"train_images\.npy is missing or damaged"):
        _ = data.train.images[:]


def test_a_limit_holds_for_each_client(tree):
    data = load("folder", **place(tree), limit=4, test_limit=1)
    assert [np.bincount(data.train.labels[own]).tolist() for own in data.slices] == [[2, 2]] * 3


def test_labels_and_images_of_several_clients_are_in_one_order(tree):
    data = opened(tree)
    images, labels, others, files, _ = data.belongings([2, 0], data.slices)
    assert (sum(map(len, labels)), len(others), len(files)) == (24, 12, 24)
    for place, file in enumerate(files):
        with Image.open(file) as image:
            assert (images[place] == np.asarray(image)).all()
        assert data.class_names[np.concatenate(labels)[place]] == file.parent.name


def test_rows_that_lie_in_several_files_are_read_like_those_of_one():
    pieces = [np.arange(6).reshape(3, 2), np.empty((0, 2), int), np.arange(6, 10).reshape(2, 2)]
    whole = np.concatenate(pieces)
    joined = Joined([len(piece) for piece in pieces], pieces.__getitem__, (2,), int)
    assert (joined.shape, len(joined), joined.ndim) == (whole.shape, 5, 2)
    for chosen in (np.array([4, 0, 3, 0]), np.array([], int), slice(1, 4), np.arange(5) % 2 == 0, [3, 1], -1, 2):
        assert (joined[chosen] == whole[chosen]).all()
    assert (np.asarray(joined) == whole).all()


def test_taken_out_clients_stay_out_whatever_their_files_and_come_back_when_asked(tree):
    opened(tree)
    source = source_of("folder", **place(tree), limit=0, test_limit=0)
    assert source.take_out(["b"]) == {"b": 12}
    picture(tree / "b" / "no" / "new.png", 999)
    data = opened(tree)
    assert [len(own) for own in data.slices] == [10, 0, 10]
    assert (data.removed, data.fingerprints()["1"]) == (10, "")
    assert len(data.test.labels) == 4
    listed = (data.store / "files-to-delete.txt").read_text().splitlines()
    assert listed == [str(tree / "b" / name / f"{i}.png") for name in ("no", "yes") for i in range(6)]
    source.take_out(["c"])
    source_of("folder", **place(tree), limit=0, test_limit=0).take_back(["b"])
    assert [len(own) for own in opened(tree).slices] == [10, 11, 0]
    listed = (data.store / "files-to-delete.txt").read_text().splitlines()
    assert {Path(file).parent.parent.name for file in listed} == {"c"}  # those of b are needed again


def test_a_part_that_another_process_deletes_while_others_are_decoded_is_no_client_without_images(tree, monkeypatch):
    source = source_of("folder", **place(tree), limit=0, test_limit=0)
    write = type(source)._write

    def written(self, missing):
        write(self, missing)
        shutil.rmtree(self.folder("b", self._wanted()["b"]))

    monkeypatch.setattr(type(source), "_write", written)
    with pytest.raises(UserError, match="lost the decoded images of client b to another process"):
        source.open()


def test_a_class_that_one_client_alone_had_keeps_its_place_when_the_client_is_gone(tree):
    hospitals(tree, ("b",), ("alone",))
    assert opened(tree).class_names == ["alone", "no", "yes"]
    source_of("folder", **place(tree), limit=0, test_limit=0).take_out(["b"])
    shutil.rmtree(tree / "b")
    data = opened(tree, names=HOSPITALS)
    assert (data.class_names, data.train.labels[:].tolist()) == (["alone", "no", "yes"], ([1] * 5 + [2] * 5) * 2)


# --- names in settings --------------------------------------------------------------------------------------------


def settings(digits, tree, words=""):
    about = f"data.name=folder data.root={tree} data.image_size=8 partition.kind=folders"
    return compose(digits, [*about.split(), *split_words(words)])


def test_clients_follow_from_the_owners_and_may_be_named(home, digits, tree):
    config = settings(digits, tree, "forget.schedule={3:[b], 4:[2]} readmit=[c,0] rounds=9")
    assert (config.clients, config.partition.names) == (3, ["a", "b", "c"])
    assert config.forget.schedule == {3: [1], 4: [2]}
    assert config.readmit == [2, 0]
    keys = settings(digits, tree, f"forget.keys={{b: {'0' * 64}}}").forget.keys
    assert keys == {1: "0" * 64}


def test_a_number_of_clients_that_is_not_that_of_the_owners_is_refused(home, digits, tree):
    assert settings(digits, tree, "clients=3").clients == 3
    with pytest.raises(UserError, match=r"clients=4: the images have 3 owners \(a, b, c\)"):
        settings(digits, tree, "clients=4")
    shutil.rmtree(tree / "b"), shutil.rmtree(tree / "c")
    with pytest.raises(UserError, match="the images have 1 owner"):
        settings(digits, tree)


def test_a_run_may_have_some_of_the_owners_in_an_order_of_its_own(home, digits, tree):
    config = settings(digits, tree, "partition.names=[c,a]")
    data = build.open_dataset(config)
    assert (config.clients, data.clients) == (2, ["c", "a"])
    assert own_files(data)["c"][0] == "c/no/0.png"
    with pytest.raises(UserError, match="no client is called 'd'"):
        settings(digits, tree, "partition.names=[d,a]")
    with pytest.raises(UserError, match=r"partition\.names is for owners"):
        compose(digits, "partition.names=[a,c]")


def test_a_table_of_owners_needs_no_kind_and_bears_no_other(home, digits, tree):
    file = table(tree, "path,client\n" + "\n".join(f"{c}/no/{i}.png,{c}" for c in "ab" for i in range(6)))
    about = [f"data.root={tree}", "data.name=folder", f"partition.file={file}"]
    assert compose(digits, about).partition.kind == "file"
    with pytest.raises(UserError, match=r"partition\.kind=iid too: give one"):
        compose(digits, [*about, "partition.kind=iid"])


def test_owners_of_a_column_have_names_too(home, digits, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8)
    file = tmp_path / "images.npz"
    np.savez(file, images=images, labels=np.arange(24) % 2, clients=np.repeat(["x", "y"], 12))
    config = compose(digits, f"data.name=npz data.root={file} partition.kind=column forget.schedule={{2:[y]}}")
    slices = build.slices_of(config, build.open_dataset(config))
    assert (config.partition.names, config.forget.schedule) == (["x", "y"], {2: [1]})
    assert [len(own) for own in slices] == [10, 10]
    np.savez(file, images=images, labels=np.arange(24) % 2)
    with pytest.raises(UserError, match=r"data\.name=npz does not say whose its images are; an array called clients"):
        compose(digits, f"data.name=npz data.root={file} partition.kind=column")


def test_owners_of_a_column_stay_with_their_images_when_others_are_taken_out(home, digits, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (36, 8, 8), np.uint8)
    file = tmp_path / "images.npz"
    np.savez(file, images=images, labels=np.arange(36) // 3 % 2, clients=np.tile(["x", "y", "z"], 12))
    config = compose(digits, f"data.name=npz data.root={file} partition.kind=column")
    before = build.open_dataset(config)
    slices = build.slices_of(config, before)
    own, gone = before.train.images[slices[2]], np.isin(np.arange(len(before.train.labels)), slices[0])
    before.without(gone, {})
    left = [before.store / "train_images.npy", before.store / "train-2_labels.npy"]  # of a crash on the way
    for name in left:
        name.touch()
    after = build.open_dataset(config)
    after.tidy()
    assert not any(name.exists() for name in left)
    assert [len(owned) for owned in build.slices_of(config, after)] == [0, len(slices[1]), len(slices[2])]
    assert (after.train.images[build.slices_of(config, after)[2]] == own).all()


def test_without_owners_settings_are_written_as_they_were(home, digits):
    config = compose(digits, "clients=4")
    assert config.partition.model_dump() == {"kind": "dirichlet", "dirichlet_alpha": 0.6, "seed": 42}
    assert build.deal_of(config) == "b0f7752db622f977"


def test_owners_of_a_file_need_the_file(home, digits, tmp_path):
    with pytest.raises(UserError, match=r"partition\.kind=file reads a table .*: say partition\.file=clients\.csv"):
        compose(digits, f"partition=file data.name=folder data.root={tmp_path}")


def test_owners_of_folders_need_folders(home, digits):
    with pytest.raises(UserError, match=r"partition\.kind=folders is for image files: data\.name=folder, not digits"):
        compose(digits, "partition.kind=folders")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{6:[3]}", {"6": ["3"]}),
        ("{6: [hospital b, 1.10, 695e0514, true, 007]}", {"6": ["hospital b", "1.10", "695e0514", "true", "007"]}),
        ("""{6:["St. Mary, Ward 2", 'a=b', "${x}", 병원]}""", {"6": ["St. Mary, Ward 2", "a=b", "${x}", "병원"]}),
        ("'{1:[b]}'", {"1": ["b"]}),
        (r'{1:["a \"b\" \\ c"]}', {"1": ['a "b" \\ c']}),
        ("{}", {}),
    ],
)
def test_a_name_in_a_setting_stays_the_text_that_was_typed(value, expected):
    assert named_settings([f"forget.schedule={value}"]) == {"forget.schedule": expected}


def test_a_bracket_that_is_not_closed_is_refused():
    with pytest.raises(UserError, match="a bracket or a quote is missing"):
        named_settings(["readmit=[3"])


def test_words_within_brackets_do_not_begin_a_setting():
    text = """rounds=3 forget.schedule={3: ["a b=c", 'd ] e=f']} run=x y"""
    assert split_words(text) == ["rounds=3", """forget.schedule={3: ["a b=c", 'd ] e=f']}""", "run=x y"]


def test_names_win_where_clients_have_names():
    names = ["3", "hospital_b", "Smith, John", "e\u0301cole", "0"]
    assert numbers_of(["3"], names) == [0]
    assert numbers_of(["0"], names) == [4]
    assert numbers_of(["1"], names[1:4]) == [1]
    assert numbers_of(["Smith, John", "3,hospital_b"], names) == [2, 0, 1]
    assert numbers_of(["\u00e9cole"], names) == [3]
    with pytest.raises(UserError, match=r"no client is called 'hospital': did you mean hospital_b\?"):
        numbers_of(["hospital"], names)
    with pytest.raises(UserError, match="there are 3, hospital_b, 'Smith, John'"):
        numbers_of(["xyz"], names)
    assert named([0, 2], names) == "clients 3 and 'Smith, John'"
    assert named([1], ["a", "b\x1b[8m"]) == "client 'b\\x1b[8m'"


@pytest.mark.parametrize("name", ["1", "007", "-4", "1.0", "\uff12"])
def test_where_a_name_is_a_number_a_number_is_a_name_and_no_place(name):
    names = ["a", name, "b"]
    assert numbers_of([name, "b"], names) == [1, 2]
    for text in ("0", "2", "-1", "b,0"):
        with pytest.raises(UserError, match=f"a number is a name; there are a, {name}, b$"):
            numbers_of([text], names)
    assert class_numbers([name], names) == [1]
    with pytest.raises(UserError, match=f"class '0' is not one of a, {name}, b$"):
        class_numbers(["0"], names)


def test_names_with_digits_are_no_numbers():
    names = ["hospital_1", "2nd", "695e0514", "nan"]
    assert (numbers_of(["2", "0"], names), class_numbers(["3"], names)) == ([2, 0], [3])


@pytest.mark.parametrize(
    "words",
    [
        "forget.schedule={3:[0]}",
        "forget={schedule:{3:[0]}}",
        "readmit=[0]",
        "partition.names=[0,b]",
        f"forget.keys={{0:{'0' * 64}}}",
    ],
)
def test_no_setting_takes_a_place_for_a_name_that_is_a_number(home, digits, tree, words):
    os.rename(tree / "a", tree / "007")
    with pytest.raises(UserError, match=r"no client is called '0'.* there are 007, b, c"):
        settings(digits, tree, words)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_what_is_to_be_pasted_into_a_shell_means_the_same_there(name):
    names = ["a", name, "b"]
    echo = ["bash", "-c", "for word in {}; do printf '%s\\0' \"$word\"; done"]
    for text, expected in [
        (
            forget_command([1, 0], names, Path("/a home/runs/x")),
            ["fedunlearn", "forget", "--client", name, "--client", "a", "--run=x", "--home=/a home"],
        ),
        (for_shell(f"readmit={as_typed([1, 2], names)}"), [f"readmit={as_typed([1, 2], names)}"]),
    ]:
        assert text.isprintable()
        told = subprocess.run([*echo[:2], echo[2].format(text)], capture_output=True, check=True, text=True)
        assert told.stdout.split("\0")[:-1] == expected
    assert named_settings([f"readmit={as_typed([1, 2], names)}"]) == {"readmit": [name, "b"]}


def test_names_that_no_ledger_can_keep_are_refused(home, digits, tree):
    os.rename(tree / "b", tree / "b\nc")
    with pytest.raises(UserError, match="has the control character"):
        settings(digits, tree)
