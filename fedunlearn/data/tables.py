"""Read tables: a row becomes an image of one pixel, whose channels are the row's numbers, in fp32."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from fedunlearn.data.arrow import schema_of, values_of
from fedunlearn.data.decoded import Decoded, Split
from fedunlearn.data.formats import about_of, classes, split_off
from fedunlearn.data.separated import NoTableError, read_rows
from fedunlearn.errors import UserError, printable

MISSING = frozenset({"na", "n/a", "nan", "null", "none", "?", "inf", "infinity"})
"""What stands for no value in a column of numbers, in small letters and without a sign. Elsewhere these are texts."""
MOST_WORDS = 100
"""Different texts that a column of categories may have."""

LARGEST = float(np.finfo(np.float32).max)
"""That fp32 holds."""

log = logging.getLogger("fedunlearn")
Columns = dict[str, list[str]]


def decode_table(
    source: Path, *, label: str, client: str = "", columns: Sequence[str] = (), skip_bad: bool = False
) -> Decoded:
    """Read a table of numbers and categories.

    A column whose values are all numbers stays as it is, in fp32. Any other is one of categories: it becomes as many
    columns of 0 and 1 as it has texts, in their order. No number is scaled here, since that would need statistics of
    all clients: the first layer of `nn.mlp` normalises. Every sixth row of a class is for testing.

    An empty cell is missing. In a column of numbers so is a word such as NA or null. Classes, clients and categories
    are the texts that were typed: a hospital may be called null.

    Args:
        source: a CSV file (commas, semicolons or tabs) or a parquet file, or a folder with one of them called train
            and one called test.
        label: the column of the class.
        client: that of the row's client, if there is one.
        columns: to learn from; none takes all others.
        skip_bad: whether to leave out rows with a value missing.

    Returns:
        Rows as fp32 [N, 1, 1, features].

    Raises:
        UserError: there is no such file or column, a value is missing, or a column has too many different texts.
    """
    files = _files(source)
    tables = [_table(file, label, client, columns) for file in files]
    names = list(tables[0])
    if set(tables[-1]) != set(names):
        raise UserError(f"{printable(str(source))}: its tables for training and testing have different columns")
    features = [name for name in names if name not in (label, client)]
    numbers = {name for name in features if _is_of_numbers(name, [value for part in tables for value in part[name]])}
    parts = [_without_missing(file, table, numbers, skip_bad) for file, table in zip(files, tables, strict=True)]
    encoders = {name: _encoder(name, [value for part in parts for value in part[name]]) for name in features}
    rows = [_encoded(part, encoders) for part in parts]
    labels, class_names = classes([np.array(part[label]) for part in parts], None, source)
    log.info("%s: %d columns give %d numbers a row", printable(source.name), len(features), rows[0].shape[-1])
    splits = [Split(*pair) for pair in zip(rows, labels, strict=True)]
    owners = [part[client] for part in parts] if client else []
    if len(splits) == 2:
        return Decoded(splits[0], splits[1], class_names, about_of(source), [], *owners)
    empty = Split(rows[0][:0], labels[0][:0])
    return split_off(Decoded(splits[0], empty, class_names, about_of(source), [], *owners))


def _files(source: Path) -> list[Path]:
    """Give the one table, or those for training and for testing."""
    if source.is_file():
        return [source]
    found = [sorted(source.glob(f"{name}.*")) for name in ("train", "test")]
    if [len(files) for files in found] != [1, 1]:
        raise UserError(f"data.root={printable(str(source))} is no table, and has not one train.* and one test.*")
    return [files[0] for files in found]


def _table(file: Path, label: str, client: str, chosen: Sequence[str]) -> Columns:
    """Read the columns that are needed, every value as text."""
    everything = _parquet(file) if file.suffix.lower() in (".parquet", ".pq") else _comma_separated(file)
    if not label:
        there = printable(", ".join(everything))
        raise UserError(f"{printable(str(file))}: data.label=... says which column is the class; there are {there}")
    wanted = list(chosen) or [name for name in everything if name not in (label, client)]
    if not wanted:
        raise UserError(f"{printable(str(file))} has no column to learn from")
    for name in filter(None, (label, client, *wanted)):
        if name not in everything:
            there = printable(", ".join(everything))
            raise UserError(f"{printable(str(file))} has no column {printable(name)}: there are {there}")
    return {name: everything[name] for name in dict.fromkeys(filter(None, (label, client, *wanted)))}


def _comma_separated(file: Path) -> Columns:
    try:
        rows = read_rows(file)
    except NoTableError as error:
        raise UserError(f"{printable(str(file))} is no table in UTF-8 ({error})") from error
    header = rows[0][1] if rows else []
    if not header or len(set(header)) != len(header):
        raise UserError(f"{printable(str(file))} has no first line with a name of its own for every column")
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(f"{printable(str(file))}, line {number}: {len(row)} values in {len(header)} columns")
    return {name: [row[place] for _, row in rows[1:]] for place, name in enumerate(header)}


def _parquet(file: Path) -> Columns:
    columns = {name: values_of(file, name) for name in schema_of(file).names}
    return {name: ["" if value is None else _text(value) for value in values] for name, values in columns.items()}


def _text(value: Any) -> str:
    """Give what a CSV file would say; a float that is no number is an empty cell."""
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return normalize("NFC", str(value).strip())


def _is_of_numbers(name: str, values: Sequence[str]) -> bool:
    """Say whether a column is one of numbers, as far as it has values; the log names words for none in another one."""
    words = {value for value in values if _is_word_for_missing(value)}
    if _are_mostly_numbers([value for value in values if value and value not in words]):
        return True
    if words:
        shown = printable(", ".join(sorted(words)))
        log.warning("column %s is none of numbers: %s in it are texts, not missing values", printable(name), shown)
    return False


def _are_mostly_numbers(values: Sequence[str]) -> bool:
    """Say whether most texts are numbers; a comma may be their point."""
    return 2 * sum(_is_number(value.replace(",", ".", 1)) for value in values) > len(values)


def _without_missing(file: Path, columns: Columns, numbers: Collection[str], skip_bad: bool) -> Columns:
    """Give the rows that have every value.

    Args:
        file: that they are from.
        columns: by name.
        numbers: the columns in which words stand for a missing value.
        skip_bad: whether the others are to be left out.

    Raises:
        UserError: there are others, and they are not to be left out.
    """
    gaps = {
        name: [not value or (name in numbers and _is_word_for_missing(value)) for value in values]
        for name, values in columns.items()
    }
    is_bad = [any(row) for row in zip(*gaps.values(), strict=True)]
    if any(is_bad):
        counts = ", ".join(f"{printable(name)} in {sum(missing)}" for name, missing in gaps.items() if any(missing))
        text = f"{printable(str(file))}: values are missing in {sum(is_bad)} of {len(is_bad)} rows ({counts})"
        if not skip_bad:
            raise UserError(f"{text}: fill them, leave columns out (data.columns), or rows (data.skip_bad=true)")
        log.warning("%s: data.skip_bad=true leaves these rows out", text)
    kept = [place for place, bad in enumerate(is_bad) if not bad]
    if not kept:
        raise UserError(f"{printable(str(file))} has no row with all its values")
    return {name: [values[place] for place in kept] for name, values in columns.items()}


def _is_word_for_missing(value: str) -> bool:
    return value.lower().lstrip("+-") in MISSING


def _encoder(name: str, values: Sequence[str]) -> Callable[[Sequence[str]], np.ndarray]:
    """Give what turns a column's texts into numbers, [N, 1] or [N, categories].

    Raises:
        UserError: it has too many different texts to be one of categories.
    """
    if all(_is_number(value) for value in values):
        return lambda texts: np.array([[float(text)] for text in texts], np.float32)
    words = Counter(values)
    odd = next(word for word in values if not _is_number(word)) if _are_mostly_numbers(values) else ""
    if len(words) > MOST_WORDS:
        texts = f"column {printable(name)} has {len(words)} different texts, which are no categories"
        raise UserError(
            f"{texts}: {printable(odd)} in it is no number that fp32 holds; write a number, or leave the column out "
            "(data.columns=[...] names those to learn from)"
            if odd
            else f"{texts}: data.columns=[...] names the columns to learn from"
        )
    known = sorted(words)
    if odd:
        log.warning(
            "column %s: %s is no number that fp32 holds, so its %d different values are categories, and no numbers",
            printable(name), printable(odd), len(words),
        )  # fmt: skip
    return lambda texts: np.array([[text == word for word in known] for text in texts], np.float32)


def _is_number(text: str) -> bool:
    """Say whether a text is a number that fp32 holds.

    Example:
        >>> _is_number("1e3"), _is_number("1_000"), _is_number("1e99")
        (True, False, False)
    """
    try:
        return "_" not in text and math.isfinite(float(text)) and abs(float(text)) <= LARGEST
    except ValueError:
        return False


def _encoded(part: Columns, encoders: dict[str, Callable[[Sequence[str]], np.ndarray]]) -> np.ndarray:
    rows = np.concatenate([encode(part[name]) for name, encode in encoders.items()], axis=1)
    return rows[:, None, None, :]
