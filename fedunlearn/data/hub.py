"""Read data sets as Hugging Face stores them: parquet files, saved data sets, and folders of images."""

import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedunlearn.data.arrow import batches_of, schema_of, values_of
from fedunlearn.data.decoded import Decoded, Split, those
from fedunlearn.data.formats import about_of, classes, names_of, split_off
from fedunlearn.data.images import Content, ImageReader, Reading, class_name, find_images
from fedunlearn.data.separated import read_rows
from fedunlearn.errors import UserError, printable

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
"""Words in names of files and folders that say which split they are of."""

METADATA = ("metadata.csv", "metadata.jsonl")
LABELS = ("label", "labels", "class", "target")

IMAGES = 16
"""That are read together of a parquet file."""

log = logging.getLogger("fedunlearn")


class Part(NamedTuple):
    """One split of a data set, before its images are read.

    Attributes:
        images: gives what some are read from, by their places in ascending order.
        labels: numbers or texts, [N].
        clients: names, or none.
        names: of the classes that numbers stand for, if they are known.
    """

    images: Callable[[np.ndarray], Iterator[Any]]
    labels: np.ndarray
    clients: list[str]
    names: list[str] | None


def decode_hub(
    source: Path,
    reading: Reading,
    *,
    label: str = "",
    client: str = "",
    limit: int = 0,
    test_limit: int = 0,
    skip_bad: bool = False,
) -> Decoded:
    """Read a data set of images in one of Hugging Face's formats, from this machine alone.

    Images are read as those of files are, and no others than `limit` keeps. Test images are those of a split called
    test, else of one called validation, else every sixth image of a class.

    Args:
        source: a parquet file, or a folder: of parquet files, of what `save_to_disk` wrote, of images with a
            `metadata.csv` or `metadata.jsonl`, or of a folder of images a class.
        reading: how images are read.
        label, client: the column of the class, and that of the client; an empty label takes the only feature that is
            one, or a column called label, labels, class or target.
        limit, test_limit: keep that many images, as `datasets.load` does.
        skip_bad: whether to go on without images that cannot be read.

    Raises:
        UserError: nothing of it can be read, or pyarrow is missing where it is needed.
    """
    parts = _parts(source, label, client)
    if "train" not in parts:
        raise UserError(f"{printable(str(source))} has no split for training: there are {', '.join(parts) or 'none'}")
    held_out = next((name for name in ("test", "validation") if name in parts), "")
    if held_out and parts[held_out].names != parts["train"].names:
        raise UserError(f"{printable(str(source))}: {held_out} and train number their classes differently")
    if held_out == "test" and "validation" in parts:
        log.info("%s: its validation images are left out", printable(source.name))
    chosen = [parts["train"], *([parts[held_out]] if held_out else [])]
    labels, class_names = classes([part.labels for part in chosen], chosen[0].names, source)
    places = [Split(np.arange(len(own)), own) for own in labels]
    held = places[1] if held_out else Split(places[0].images[:0], labels[0][:0])
    found = Decoded(places[0], held, class_names, about_of(source), [], *(part.clients for part in chosen))
    kept = (found if held_out else split_off(found)).first(limit, test_limit)
    reader = ImageReader(reading, total=len(kept.train.labels) + len(kept.test.labels))
    train, clients = _read(chosen[0], kept.train, kept.clients, reader)
    test, test_clients = _read(chosen[-1], kept.test, kept.test_clients, reader)
    reader.conclude(skip_bad=skip_bad)
    return kept._replace(train=train, test=test, clients=clients, test_clients=test_clients)


def _read(part: Part, kept: Split, owners: list[str], reader: ImageReader) -> tuple[Split, list[str]]:
    """Read the images at some places; gives those that can be read, and whose they are."""
    images, is_good = reader.read(part.images(kept.images), len(kept.labels))
    return Split(images, kept.labels[is_good]), those(owners, is_good)


def _parts(source: Path, label: str, client: str) -> dict[str, Part]:
    """Find the splits of a data set, whatever it is stored as."""
    if source.is_file():
        return {"train": _of_tables([source], source.parent, label, client)}
    for ending in ("parquet", "arrow"):
        files = sorted(file for file in source.rglob(f"*.{ending}") if not _is_passed_over(file.relative_to(source)))
        if files:
            by_split: dict[str, list[Path]] = {}
            for file in files:
                by_split.setdefault(split_of(str(file.relative_to(source))), []).append(file)
            return {name: _of_tables(files, source, label, client) for name, files in by_split.items()}
    return _of_folders(source, label, client)


def _is_passed_over(file: Path) -> bool:
    """Say whether a file is hidden, or one of the `datasets` package's own copies of what it has computed."""
    return any(part.startswith(".") for part in file.parts) or (file.suffix == ".arrow" and file.match("cache-*"))


def split_of(name: str) -> str:
    """Say which split a file or folder is of; train, where its name does not say.

    Example:
        >>> split_of("data/test-00000-of-00001.parquet"), split_of("all.parquet")
        ('test', 'train')
    """
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, names in SPLITS.items() if any(word in names for word in words)), "train")


def _of_tables(files: list[Path], root: Path, label: str, client: str) -> Part:
    """Give the images and labels of parquet files or Arrow files."""
    schemas = [schema_of(file) for file in files]
    features = _features(schemas[0])
    label = label or _label_column(files[0], schemas[0].names, features)
    image = _image_column(files[0], schemas[0], features)
    names = (features.get(label) or {}).get("names")
    for file, schema in zip(files, schemas, strict=True):
        if missing := [name for name in filter(None, (image, label, client)) if name not in schema.names]:
            there = printable(", ".join(schema.names))
            raise UserError(f"{printable(str(file))} has no column {printable(missing[0])}: there are {there}")
        if (_features(schema).get(label) or {}).get("names") != names:
            raise UserError(f"{printable(str(file))} and {printable(files[0].name)} number their classes differently")
    labels = [value for file in files for value in values_of(file, label)]
    if any(isinstance(value, list | dict) for value in labels):
        raise UserError(f"{printable(str(files[0]))}: {printable(label)} has lists: an image has one label")
    missing = sum(value is None or (names is not None and value == -1) for value in labels)
    if missing:
        raise UserError(f"{printable(str(files[0]))}: {missing} images have no {printable(label)}: leave them out")
    owners = [value for file in files for value in values_of(file, client)] if client else []
    clients = names_of(owners, printable(client), files[0])
    return Part(partial(_cells, files, image, root), np.array(labels), clients, names)


def _cells(files: list[Path], column: str, root: Path, places: np.ndarray) -> Iterator[Any]:
    """Give what the images of some rows are read from; rows are counted through all files."""
    first, wanted = 0, deque(places.tolist())
    for file in files:
        row = 0
        for batch in batches_of(file, column, IMAGES):
            while wanted and wanted[0] < first + row + len(batch):
                cell = batch.column(0)[wanted[0] - first - row].as_py()
                yield _content(cell, f"{file.name}, row {wanted.popleft() - first + 1}", root)
            if not wanted:
                return
            row += len(batch)
        first += row


def _content(cell: Any, name: str, root: Path) -> Any:
    """Give what an image is read from: the bytes of its cell, or the file that it names."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    path = cell.get("path") if isinstance(cell, dict) else None
    if data is None and path:
        return _below(root, root / path)
    return Content(f"{name} ({path})" if path else name, data or b"")


def _below(root: Path, file: Path) -> Path:
    """Give the path of a file that somebody has named, without `..` in it.

    Raises:
        UserError: it would lie outside of a folder.
    """
    file = Path(os.path.normpath(file))
    if not file.is_relative_to(root):
        raise UserError(f"{printable(str(file))} is outside of data.root={printable(str(root))}")
    return file


def _features(schema: Any) -> dict[str, Any]:
    """Give what the `datasets` package has written of the columns."""
    stored = (schema.metadata or {}).get(b"huggingface", b"{}")
    return json.loads(stored).get("info", {}).get("features", {})


def _label_column(file: Path, columns: list[str], features: dict[str, Any]) -> str:
    of_classes = [name for name, feature in features.items() if _type_of(feature) == "ClassLabel"]
    found = of_classes or [name for name in LABELS if name in columns]
    if len(found) != 1:
        there = printable(", ".join(found or columns))
        raise UserError(f"{printable(str(file))}: data.label=... says which column is the class; there are {there}")
    return found[0]


def _image_column(file: Path, schema: Any, features: dict[str, Any]) -> str:
    found = [name for name, feature in features.items() if _type_of(feature) == "Image"]
    for field in schema:
        is_image = str(field.type).startswith("struct<bytes") or str(field.type) in ("binary", "large_binary")
        if not found and is_image:
            found = [field.name]
    if not found:
        raise UserError(
            f"{printable(str(file))} has no column of images; of a table without images, data.name=table makes rows"
        )
    return found[0]


def _type_of(feature: Any) -> str:
    return feature.get("_type", "") if isinstance(feature, dict) else ""


def _of_folders(root: Path, label: str, client: str) -> dict[str, Part]:
    """Give the images of folders, with the labels that a metadata file or the folders' names give."""
    rows = list(_metadata(root))
    by_split: dict[str, list[tuple[Path, str, str]]] = {}
    seen: set[Path] = set()
    if rows:
        columns = list(dict.fromkeys(name for _, row in rows for name in row if name != "file_name"))
        column = label or _label_column(root, columns, {})
        for folder, row in rows:
            if missing := [name for name in filter(None, ("file_name", column, client)) if row.get(name) in (None, "")]:
                raise UserError(f"{printable(str(folder))}: a row of its metadata has no {printable(missing[0])}")
            file = _below(root, folder / str(row["file_name"]))
            if file in seen:
                raise UserError(f"{printable(str(file))} has two rows of metadata: whose is it?")
            seen.add(file)
            split = split_of(str(file.parent.relative_to(root)))
            by_split.setdefault(split, []).append((file, str(row[column]), str(row[client]) if client else ""))
    elif client:
        raise UserError(f"data.client={client} names a column, and {printable(str(root))} has no metadata file")
    else:
        for file in find_images(root).files:
            split = split_of(file.parts[0]) if len(file.parts) > 2 else "train"
            by_split.setdefault(split, []).append((root / file, class_name(file.parent.name), ""))
    return {
        split: Part(
            _of([row[0] for row in rows]), np.array([row[1] for row in rows]), [r[2] for r in rows if client], None
        )
        for split, rows in by_split.items()
    }


def _of(files: list[Path]) -> Callable[[np.ndarray], Iterator[Path]]:
    return lambda places: (files[place] for place in places)


def _metadata(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give every row of the metadata files below a folder, each with the folder that it is in."""
    for file in sorted(file for name in METADATA for file in root.rglob(name)):
        try:
            rows = _separated(file) if file.suffix == ".csv" else _json_lines(file)
        except ValueError as error:
            raise UserError(f"{printable(str(file))} cannot be read ({printable(str(error))})") from error
        yield from ((file.parent, row) for row in rows)


def _separated(file: Path) -> list[dict[str, Any]]:
    (_, header), *rows = read_rows(file) or [(0, [])]
    return [dict(zip(header, row, strict=False)) for _, row in rows]


def _json_lines(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no row of values by name")
    return rows
