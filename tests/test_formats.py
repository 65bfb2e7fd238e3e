import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedunlearn.data import datasets
from fedunlearn.data.batches import batches, scale
from fedunlearn.data.datasets import Choices
from fedunlearn.data.decoded import Split
from fedunlearn.data.hub import split_of
from fedunlearn.data.search import Wanted
from fedunlearn.data.store import Dataset
from fedunlearn.errors import UserError
from fedunlearn.nn.augment import augmented, draws
from fedunlearn.nn.mlp import mlp

RANDOM = np.random.default_rng(0)
PNEUMONIA = Path(__file__).parent.parent.parent / "shared" / "data" / "pneumoniamnist.npz"


def images(count, *shape, dtype=np.uint8):
    return RANDOM.integers(0, 256, (count, *shape)).astype(dtype)


def load(name, root, tmp_path, choices=Choices(), **options):  # noqa: B008
    return datasets.load(name, root=str(root), cache=tmp_path / "cache", choices=choices, **options)


def decoded(name, root, tmp_path, choices=Choices()):  # noqa: B008
    """What is read of a file, with the clients that a store does not show."""
    about = {"limit": 0, "test_limit": 0, "image_size": 8}
    return datasets.source_of(name, root=str(root), cache=tmp_path, choices=choices, **about).decode()


# MedMNIST ----------------------------------------------------------------------------------------------------------


def medmnist(path, *shape, labels=None, **more):
    arrays = {f"{part}_images": images(12, *shape) for part in ("train", "val", "test")}
    labels = (np.arange(12) % 2)[:, None] if labels is None else labels
    np.savez(path, **arrays, **{f"{part}_labels": labels for part in ("train", "val", "test")}, **more)
    return arrays


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3)])
def test_medmnist_files_keep_their_images_and_take_their_classes_from_the_name(tmp_path, caplog, shape):
    caplog.set_level(logging.INFO, logger="fedunlearn")
    arrays = medmnist(tmp_path / "breastmnist_28.npz", *shape)
    data = load("medmnist", tmp_path / "breastmnist_28.npz", tmp_path)
    assert data.class_names == ["malignant", "normal, benign"]
    assert (data.train.images.squeeze() == arrays["train_images"]).all()
    assert (data.test.images.squeeze() == arrays["test_images"]).all()
    assert data.train.labels.tolist() == [0, 1] * 6
    assert "12 validation images are left out" in caplog.text


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((28, 28), np.zeros((12, 14), int), r"labels of shape \[12, 14\]"),
        ((28, 28, 28), None, r"images of shape \[12, 28, 28, 28\]"),
    ],
    ids=["several labels", "volumes"],
)
def test_what_medmnist_has_beyond_that_is_refused_with_a_reason(tmp_path, shape, labels, message):
    medmnist(tmp_path / "x.npz", *shape, labels=labels)
    with pytest.raises(UserError, match=message):
        load("medmnist", tmp_path / "x.npz", tmp_path)


@pytest.mark.skipif(not PNEUMONIA.exists(), reason=f"{PNEUMONIA} is not here")
def test_pneumoniamnist_has_its_official_sizes(tmp_path):
    data = load("medmnist", PNEUMONIA, tmp_path, limit=300)
    whole = decoded("medmnist", PNEUMONIA, tmp_path)
    assert data.class_names == ["normal", "pneumonia"]
    assert np.bincount(whole.train.labels).tolist() == [1214, 3494]
    assert np.bincount(whole.test.labels).tolist() == [234, 390]
    assert data.train.images.shape == (300, 28, 28, 1)


# arrays ------------------------------------------------------------------------------------------------------------


def test_arrays_of_numbers_and_names(tmp_path):
    own, labels, clients = images(14, 8, 8), np.array(["yes", "no"] * 7), np.array(["b", "a"] * 7)
    np.savez(tmp_path / "x.npz", images=own, labels=labels, clients=clients)
    found = decoded("npz", tmp_path / "x.npz", tmp_path)
    assert found.class_names == ["no", "yes"]
    assert (found.test.images[..., 0] == own[10:12]).all()  # the sixth of each class, which is of one client
    rest = [*range(10), 12, 13]
    assert (found.train.images[..., 0] == own[rest]).all()
    assert found.clients == clients[rest].tolist()


def test_removing_a_client_moves_no_image_of_others_to_the_test_set(tmp_path):
    own, clients = images(40, 8, 8), np.arange(40) % 3
    labels = np.arange(40) % 2
    np.savez(tmp_path / "all.npz", images=own, labels=labels, clients=clients)
    kept = clients != 1
    np.savez(tmp_path / "less.npz", images=own[kept], labels=labels[kept], clients=clients[kept])
    everybody, others = (decoded("npz", tmp_path / name, tmp_path) for name in ("all.npz", "less.npz"))
    of_others = np.array(everybody.clients) != "1"
    assert (everybody.train.images[of_others] == others.train.images).all()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((14, 8, 8), 0.5, np.float32), 128),
        (np.full((14, 8, 8), 20_000, np.uint16), 78),
        (np.full((14, 3, 8, 8), 7, np.int64), 7),
        (np.ones((14, 8, 8, 1), bool), 255),
    ],
    ids=["floats", "16 bits", "channels first", "bools"],
)
def test_arrays_are_scaled_as_files_are(tmp_path, array, expected):
    np.savez(tmp_path / "x.npz", images=array, labels=np.arange(14) % 2)
    found = decoded("npz", tmp_path / "x.npz", tmp_path).train.images
    assert (found == expected).all()
    assert found.shape[3] == (3 if array.shape[1] == 3 else 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_that_come_first_are_put_last_and_said(tmp_path, caplog, channels):
    caplog.set_level("INFO", "fedunlearn")
    own, labels = images(14, 8, 6, channels), np.arange(14) % 2
    found = []
    for name, array in (("first", own.transpose(0, 3, 1, 2)), ("last", own)):
        caplog.clear()
        np.savez(tmp_path / f"{name}.npz", images=array, labels=labels)
        found.append(decoded("npz", tmp_path / f"{name}.npz", tmp_path).train.images)
        said = f"first.npz: images of shape [14, {channels}, 8, 6] have their channels first, and are taken for 8 x 6"
        assert (f"{said} pixels of {channels} channels" in caplog.text) == (name == "first")
    assert (found[0] == found[1]).all()


GOOD = {"images": images(14, 8, 8), "labels": np.arange(14) % 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.full((14, 8, 8), -3.0)}, r"values -3\.\.-3 are not in 0\.\.1; data\.window="),
        ({"images": GOOD["images"][:13]}, "has 13 images and 14 labels"),
        ({"images": GOOD["images"][0]}, r"images of shape \[8, 8\]"),
        (
            {"images": np.zeros((14, 4, 8, 8))},
            r"shape \[14, 4, 8, 8\]: .*\[N, channels, H, W\].*; of RGBA, keep images",
        ),
        ({"images": np.zeros((14, 8, 8, 8))}, r"shape \[14, 8, 8, 8\]: .* of 1 or 3 channels can be read$"),
        ({"labels": np.array([{}] * 14)}, r"no readable .npz file.*dtype=str"),
        ({"labels": np.arange(14) / 3}, "no whole numbers"),
        ({"clients": np.arange(13)}, "clients of shape"),
        ({"class_names": np.array(["only"])}, "has the label 1, and names of 1 classes"),
        ({"test_images": GOOD["images"]}, "has no array test_labels: there are images, labels, test_images"),
        ({"labels": np.arange(14)}, "nothing for testing"),
    ],
)
def test_unusable_arrays_are_named(tmp_path, changes, message):
    np.savez(tmp_path / "x.npz", **(GOOD | changes))
    with pytest.raises(UserError, match=message):
        load("npz", tmp_path / "x.npz", tmp_path)


@pytest.mark.parametrize("content", [b"no archive", b""])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz is no readable \.npz file"):
        load("npz", tmp_path / "x.npz", tmp_path)


# Hugging Face ------------------------------------------------------------------------------------------------------


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["no", "yes"], "_type": "ClassLabel"}}


def hub_table(pixels, *, features=FEATURES, **changes):
    pa = pytest.importorskip("pyarrow")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(pixels)]
    columns = {"image": pa.array(cells, kind), "label": [i % 2 for i in range(len(pixels))]} | changes
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def as_parquet(table, folder, split):
    from pyarrow.parquet import write_table

    folder.mkdir(exist_ok=True)
    write_table(table, folder / f"{split}-00000-of-00001.parquet")


def as_saved_to_disk(table, folder, split):
    import pyarrow as pa

    (folder / split).mkdir(parents=True)
    file = folder / split / "data-00000-of-00001.arrow"
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_stream(opened, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("write", [as_parquet, as_saved_to_disk])
def test_tables_of_images_are_read_with_their_classes_and_clients(tmp_path, write):
    own = images(12, 8, 8, 3)
    for split in ("train", "test"):
        write(hub_table(own, site=[f"h{i % 3}" for i in range(12)]), tmp_path / "data", split)
        if write is as_saved_to_disk:  # what `map` has computed lies beside it
            shutil.copy(
                tmp_path / "data" / split / "data-00000-of-00001.arrow", tmp_path / "data" / split / "cache-1f.arrow"
            )
    found = decoded("hf", tmp_path / "data", tmp_path, Choices(client="site"))
    assert found.class_names == ["no", "yes"]
    assert (found.train.images == own).all()
    assert (found.test.images == own).all()
    assert found.clients == ["h0", "h1", "h2"] * 4


def test_a_limit_reads_no_other_images(tmp_path):
    table = hub_table(images(12, 8, 8, 3))
    broken = [
        {"bytes": b"no image", "path": "x.png"} if i > 3 else row for i, row in enumerate(table["image"].to_pylist())
    ]
    for split in ("train", "test"):
        as_parquet(table.set_column(0, "image", [broken]), tmp_path / "data", split)
    data = load("hf", tmp_path / "data", tmp_path, limit=4, test_limit=2, image_size=8)
    assert (len(data.train.labels), len(data.test.labels)) == (4, 2)
    with pytest.raises(UserError, match=r"16 of 24 files are not readable.*\n.*row 5 \(x\.png\): cannot identify"):
        load("hf", tmp_path / "data", tmp_path, image_size=8)


@pytest.mark.parametrize("write", [as_parquet, as_saved_to_disk])
def test_images_of_several_files_are_read_some_rows_at_a_time(tmp_path, write, monkeypatch):
    monkeypatch.setattr("fedunlearn.data.hub.IMAGES", 2)
    own, folder = images(15, 8, 8, 3), tmp_path / "data"
    for number, part in enumerate((own[:5], own[5:6], own[6:])):
        write(hub_table(part), folder if write is as_parquet else folder / "x", f"train-{number}")
    labels = [i % 2 for i in (*range(5), 0, *range(9))]
    write(hub_table(own[:2]), folder, "test")
    for limit, kept in ((0, range(15)), (12, (*range(10), 11, 13)), (6, (0, 1, 2, 3, 4, 7)), (2, (0, 1))):
        found = load("hf", folder, tmp_path, limit=limit, image_size=8).train
        assert (found.images == own[[*kept]]).all()
        assert found.labels.tolist() == [labels[place] for place in kept]


def test_a_file_that_cannot_be_read_is_named_with_its_row(tmp_path):
    table = hub_table(images(12, 8, 8, 3))
    broken = table["image"].to_pylist()
    broken[7] = {"bytes": b"no image", "path": None}
    as_parquet(table, tmp_path / "data", "train-1")
    as_parquet(table.set_column(0, "image", [broken]), tmp_path / "data", "train-2")
    with pytest.raises(UserError, match=r"train-2-00000-of-00001\.parquet, row 8 is not a readable image"):
        load("hf", tmp_path / "data", tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda own: hub_table(own, label=[-1] * 12), "12 images have no label"),
        (lambda own: hub_table(own, label=[[0, 1]] * 12), "label has lists: an image has one label"),
        (lambda own: hub_table(own, features={}).rename_columns(["image", "x"]), "data.label=... says which column"),
        (lambda own: hub_table(own).drop_columns("image"), "data.name=table"),
    ],
)
def test_unusable_tables_of_images_are_named(tmp_path, make, message):
    features = {k: v for k, v in FEATURES.items() if k != "image"}
    table = make(images(12, 8, 8, 3))
    if "image" not in table.column_names:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    as_parquet(table, tmp_path / "data", "train")
    with pytest.raises(UserError, match=message):
        load("hf", tmp_path / "data", tmp_path)


@pytest.mark.parametrize(("name", "message"), [("test", "test and train"), ("train-1", "train-00000-of-00001.parquet")])
def test_files_that_number_their_classes_differently_are_named(tmp_path, name, message):
    as_parquet(hub_table(images(12, 8, 8, 3)), tmp_path / "data", "train")
    features = {**FEATURES, "label": {"names": ["yes", "no"], "_type": "ClassLabel"}}
    as_parquet(hub_table(images(12, 8, 8, 3), features=features), tmp_path / "data", name)
    with pytest.raises(UserError, match=f"{message} number their classes differently"):
        load("hf", tmp_path / "data", tmp_path)


def test_a_class_that_is_in_the_test_file_alone_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("x,label\n" + "1,0\n2,1\n" * 12)
    (tmp_path / "data" / "test.csv").write_text("x,label\n1,0\n2,2\n")
    with pytest.raises(UserError, match="class 2 has examples for testing and none for training"):
        load("table", tmp_path / "data", tmp_path, Choices(label="label"))


def test_without_pyarrow_the_line_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    for name in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'fedunlearn\[hf\]'"):
        load("hf", tmp_path / "x.parquet", tmp_path)


@pytest.mark.parametrize("metadata", ["metadata.csv", "metadata.jsonl", ""])
def test_folders_of_images_with_and_without_metadata(tmp_path, metadata):
    own = images(12, 8, 8, 3)
    for split in ("train", "test"):
        rows = []
        for i, image in enumerate(own):
            folder = tmp_path / "data" / split / ("" if metadata else "ab"[i % 2])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:02}.png")
            rows.append({"file_name": f"{i:02}.png", "label": "ab"[i % 2]})
        if metadata.endswith("csv"):
            lines = ["file_name,label", *(",".join(row.values()) for row in rows)]
            (tmp_path / "data" / split / metadata).write_text("\n".join(lines))
        elif metadata:
            (tmp_path / "data" / split / metadata).write_text("\n".join(map(json.dumps, rows)))
    found = decoded("hf", tmp_path / "data", tmp_path)
    assert found.class_names == ["a", "b"]
    order = range(12) if metadata else [*range(0, 12, 2), *range(1, 12, 2)]
    assert (found.train.images == own[list(order)]).all()
    assert len(found.test.labels) == 12


def hub_folder(tmp_path, text, name="metadata.csv"):
    """Twelve images beside a metadata file."""
    (tmp_path / "data").mkdir()
    for i, image in enumerate(images(12, 8, 8, 3)):
        Image.fromarray(image).save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "data" / name).write_bytes(text.encode())
    return tmp_path / "data"


ROWS = [{"file_name": f"{i}.png", "label": "ab"[i % 2], "note": "one\u2028line"} for i in range(12)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("metadata.csv", "\n".join(["file_name;label;note", *(f'{i}.png;{"ab"[i % 2]};"1\n2"' for i in range(12))])),
    ],
)
def test_rows_of_metadata_end_where_they_end(tmp_path, name, text):
    found = decoded("hf", hub_folder(tmp_path, text, name), tmp_path)
    assert (found.class_names, len(found.train.labels), len(found.test.labels)) == (["a", "b"], 10, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,label\n0.png,a\n./0.png,b\n", "0.png has two rows of metadata"),
        ("metadata.csv", "file_name,label\n../other.png,a\n", "other.png is outside of data.root"),
        ("metadata.csv", "file_name,label\n/etc/hostname,a\n", "/etc/hostname is outside of data.root"),
        ("metadata.csv", 'file_name,label\n"0.png,a\n', "a quote not closed"),
        ("metadata.jsonl", "[1]\n", "a line is no row of values by name"),
    ],
)
def test_metadata_that_nobody_can_follow_is_named(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        load("hf", hub_folder(tmp_path, text, name), tmp_path)


@pytest.mark.parametrize("missing", [None, float("nan"), " "])
def test_images_without_a_client_are_nobodys_client(tmp_path, missing):
    pa, write_table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").write_table
    clients = [1.0, missing] if isinstance(missing, float) else ["a", missing]
    cells = [{"bytes": b"", "path": ""}] * 12
    write_table(pa.table({"image": cells, "label": [0, 1] * 6, "site": clients * 6}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="6 of 12 examples have no site"):
        load("hf", tmp_path / "x.parquet", tmp_path, Choices(client="site"))


@pytest.mark.parametrize(
    ("clients", "names"),
    [([1.0, 2.0], ["1", "2"]), ([b"a", b"b"], ["a", "b"]), (["\xe9", "e\u0301"], ["\xe9"]), (["x ", " x"], ["x"])],
)
def test_one_client_has_one_name(tmp_path, clients, names):
    about = {"images": images(24, 8, 8), "labels": np.arange(24) // 2 % 2, "clients": np.array(clients * 12)}
    np.savez(tmp_path / "x.npz", **about)
    assert sorted(set(decoded("npz", tmp_path / "x.npz", tmp_path).clients)) == names


@pytest.mark.parametrize(
    ("name", "split"),
    [("data/train-00000-of-00001.parquet", "train"), ("val.parquet", "validation"), ("contest.parquet", "train")],
)
def test_the_split_is_what_a_name_says(name, split):
    assert split_of(name) == split


# tables ------------------------------------------------------------------------------------------------------------

ROWS = [f"{20 + i},{'mf'[i % 2]},{i / 7!r},h{i % 2},{'yes' if i % 3 else 'no'}" for i in range(30)]
TABLE = "\n".join(["age,sex,dose,site,outcome", *ROWS])


def table_file(tmp_path, text=TABLE, name="x.csv"):
    (tmp_path / name).write_text(text, "utf-8")
    return tmp_path / name


def test_rows_of_a_table_keep_their_numbers_through_the_store(tmp_path):
    data = load("table", table_file(tmp_path), tmp_path, Choices(label="outcome", client="site"))
    assert data.class_names == ["no", "yes"]
    assert data.train.images.dtype == np.float32
    whole = {row[0, 0, 0]: row[0, 0] for row in [*data.train.images, *data.test.images]}
    assert len(whole) == 30
    for i in range(30):
        assert whole[20 + i].tolist() == [20 + i, i % 2, 1 - i % 2, np.float32(i / 7)]
    (batch, _, _) = next(batches(data.train, np.arange(3), 0, batch_size=3, device=torch.device("cpu")))
    assert (batch.numpy()[:, :, 0, 0] == data.train.images[:3, 0, 0]).all()


def test_a_semicolon_table_and_a_parquet_file_give_the_same(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    columns = [line.split(",") for line in TABLE.splitlines()]
    header, rows = columns[0], columns[1:]
    values = {name: [row[k] for row in rows] for k, name in enumerate(header)}
    values |= {"age": [int(v) for v in values["age"]], "dose": [float(v) for v in values["dose"]]}
    write_table(pa.table(values), tmp_path / "x.parquet")
    other = table_file(tmp_path, "\ufeff" + TABLE.replace(",", ";"), "y.csv")
    choices = Choices(label="outcome", client="site")
    found = [
        decoded("table", file, tmp_path, choices) for file in (table_file(tmp_path), other, tmp_path / "x.parquet")
    ]
    for same in found[1:]:
        assert (same.train.images == found[0].train.images).all()
        assert (same.clients, same.class_names) == (found[0].clients, found[0].class_names)


def test_missing_values_are_refused_or_their_rows_left_out(tmp_path, caplog):
    file = table_file(tmp_path, TABLE.replace("20,m", ",m").replace("21,f", "NaN,").replace("23,f", "inf,f"))
    with pytest.raises(UserError, match=r"missing in 3 of 30 rows \(age in 3, sex in 1\).*data\.skip_bad=true"):
        load("table", file, tmp_path, Choices(label="outcome"))
    data = load("table", file, tmp_path, Choices(label="outcome", skip_bad=True))
    assert len(data.train.labels) + len(data.test.labels) == 27
    assert "leaves these rows out" in caplog.text


NAMES = ["null", "NA", "None", "nan", "n/a", "?", "007", "1.10", "true", "inf", "ward", "x"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("role", ["site", "outcome", "habit"])
def test_a_name_in_a_table_is_the_text_that_was_typed(tmp_path, caplog, ending, role):
    columns = {"age": [str(20 + i) for i in range(96)], "site": ["a"] * 96, "outcome": ["x", "y"] * 48}
    columns |= {"habit": ["b"] * 96, role: NAMES * 8}
    if ending == "csv":
        rows = [",".join(row) for row in zip(*columns.values(), strict=True)]
        file = table_file(tmp_path, "\n".join([",".join(columns), *rows]))
    else:
        file = tmp_path / "x.parquet"
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table(columns), file)
    found = decoded("table", file, tmp_path, Choices(label="outcome", client="site"))
    assert len(found.train.labels) + len(found.test.labels) == 96
    if role == "habit":
        assert found.train.images.shape[-1] == 1 + len(NAMES)
        assert "column habit is none of numbers: ?, NA, None, inf, n/a, nan, null in it are texts" in caplog.text
    else:
        names = found.clients if role == "site" else found.class_names
        assert set(names) == set(NAMES)


@pytest.mark.parametrize("role", ["site", "outcome", "habit", "age"])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_an_empty_cell_is_missing_in_every_column(tmp_path, role, value):
    pa, write_table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").write_table
    columns = {name: [1.0, 2.0] * 6 for name in ("age", "site", "outcome", "habit")}
    columns[role] = [value, *columns[role][1:]]
    write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=rf"missing in 1 of 12 rows \({role} in 1\)"):
        load("table", tmp_path / "x.parquet", tmp_path, Choices(label="outcome", client="site"))


@pytest.mark.parametrize("word", ["NA", "null", "None", "?", "-inf", "N/A", "NaN", ""])
def test_a_word_for_no_value_is_missing_in_a_column_of_numbers(tmp_path, word):
    file = table_file(tmp_path, TABLE.replace("20,m", f"{word},m").replace("29,f", "<29,f"))
    with pytest.raises(UserError, match=r"missing in 1 of 30 rows \(age in 1\)"):
        load("table", file, tmp_path, Choices(label="outcome"))


def test_tables_of_spreadsheets_are_read(tmp_path):
    text = TABLE.replace(",", "\t ").replace("\n", " \r\n") + "\r\n\t\t\t\t\r\n"
    found, plain = (
        decoded("table", table_file(tmp_path, each, name), tmp_path, Choices(label="outcome"))
        for name, each in (("x.csv", text), ("y.csv", TABLE))
    )
    assert (found.train.images == plain.train.images).all()


@pytest.mark.parametrize("odd", ["<20", "20,5", "1e99"])
def test_a_number_that_makes_its_column_one_of_categories_is_named(tmp_path, caplog, odd):
    load("table", table_file(tmp_path, TABLE.replace("20,m", f'"{odd}",m')), tmp_path, Choices(label="outcome"))
    assert f"column age: {odd} is no number that fp32 holds" in caplog.text
    caplog.clear()
    load("table", table_file(tmp_path, TABLE, "y.csv"), tmp_path, Choices(label="outcome"))
    assert "is no number" not in caplog.text


@pytest.mark.parametrize(
    ("text", "choices", "message"),
    [
        (TABLE, Choices(), "data.label=... says which column is the class; there are age, sex"),
        (TABLE, Choices(label="out"), "has no column out: there are age"),
        (TABLE, Choices(label="outcome", columns=("agee",)), "has no column agee"),
        (TABLE + "\n1,2", Choices(label="outcome"), "line 32: 2 values in 5 columns"),
        (TABLE.replace("age,sex", "age,age"), Choices(label="outcome"), "a name of its own for every column"),
        (
            "\n".join(["id,outcome", *(f"p{i},{i % 2}" for i in range(200))]),
            Choices(label="outcome"),
            r"column id has 200 different texts, which are no categories: data\.columns=",
        ),
        (
            "\n".join(["lab,outcome", "<5,1", *(f"{i / 7:.3f},{i % 2}" for i in range(200))]),
            Choices(label="outcome"),
            r"column lab has 201 different texts.*: <5 in it is no number that fp32 holds; write a number, or leave",
        ),
        (
            "\n".join(["lab,outcome", *(f'"{i},5",{i % 2}' for i in range(200))]),
            Choices(label="outcome"),
            "column lab has 200 different texts.*: 0,5 in it is no number",
        ),
    ],
)
def test_unusable_tables_are_named(tmp_path, text, choices, message):
    with pytest.raises(UserError, match=message):
        load("table", table_file(tmp_path, text), tmp_path, choices)


def test_columns_can_be_chosen_and_labels_stay_text(tmp_path):
    text = "\n".join(["a,b,kind", *(f"{i},{i * i},{('007', '7')[i % 2]}" for i in range(20))])
    data = load("table", table_file(tmp_path, text), tmp_path, Choices(label="kind", columns=("b",)))
    assert data.class_names == ["007", "7"]
    assert data.train.images[3].tolist() == [[[9.0]]]


def test_rows_of_a_table_are_neither_shifted_nor_mirrored_nor_scaled():
    rows = torch.randn(6, 1, 1, 4)
    drawn = draws(6, torch.Generator().manual_seed(0), 2, True)
    assert augmented(rows, drawn, 2) is rows
    assert torch.equal(scale(rows)[:, :, 0, 0], rows[:, 0, 0])


def test_rows_of_a_table_are_found_by_their_bytes(tmp_path):
    rows = RANDOM.normal(size=(4, 1, 1, 6)).astype(np.float32)
    labels = np.zeros(4, int)
    np.save(tmp_path / "copy.npy", rows[2])
    found = Wanted(rows, labels, others=rows[3:] + 1).found_in(tmp_path / "copy.npy")
    assert found.images == {2}


def test_the_network_for_tables_learns_what_columns_of_other_sizes_say():
    torch.manual_seed(0)
    rows = torch.randn(256, 3, 1, 1) * torch.tensor([1e4, 1.0, 1e-3]).reshape(3, 1, 1)
    labels = ((rows[:, 0] / 1e4 + rows[:, 2] / 1e-3) > 0).long().flatten()
    network = torch.nn.Sequential(mlp(3, width=16), torch.nn.Linear(16, 2))
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(network(rows), labels)
        weights = list(network.parameters())
        with torch.no_grad():
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight -= 0.5 * gradient
    assert (network(rows).argmax(1) == labels).float().mean() > 0.95
    with pytest.raises(ValueError, match="at least 1"):
        mlp(0)


def test_uint8_batches_are_as_they_were():
    own = images(4, 6, 6, 3)
    (batch, _, _) = next(batches(Split(own, np.arange(4)), np.arange(4), 0, batch_size=4, device=torch.device("cpu")))
    assert torch.equal(batch, torch.from_numpy(own).permute(0, 3, 1, 2).float() / 127.5 - 1)


# in a federation ---------------------------------------------------------------------------------------------------


def test_a_client_of_a_table_is_forgotten_with_its_rows(federate, tmp_path):
    sites = ["A", "b, c", "1.10", "true"]
    rows = [f"{i % 7},{i % 5},{sites[i % 4]},{'yes' if i % 7 > 3 else 'no'}" for i in range(160)]
    file = table_file(tmp_path, "\n".join(["age,dose,site,ill", *(row.replace("b, c", '"b, c"') for row in rows)]))
    words = f"data.name=table data.root={file} data.label=ill data.client=site partition.kind=column data.limit=0"
    federate(f"{words} data.test_limit=0 strategy=leave rounds=1 forget.schedule={{1:[1.10]}}")
    (request,) = federate.requests()
    assert request.state == "COMPLETED"
    (store,) = (federate.home / "data").glob("table-*")
    left = Dataset(store).train.images[:, 0, 0]
    whole = decoded("table", file, tmp_path, Choices(label="ill", client="site"))
    own = np.array(whole.clients) == "1.10"
    assert own.sum() > 30
    assert (left == whole.train.images[~own][:, 0, 0]).all()
