"""Read parquet files, and those of Arrow, some rows at a time: the images in one may be more than the memory holds."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedunlearn.errors import UserError, printable

ROWS, BUFFER = 1 << 16, 1 << 20
"""Of a parquet file, values that are read together, and bytes."""


def schema_of(file: Path) -> Any:
    """Give the columns of a file, and what is written about them, as a `pyarrow.Schema`.

    Args:
        file: a stream of Arrow's where its name ends in `.arrow`, else parquet.

    Raises:
        UserError: it is damaged, has two columns of a name, or pyarrow is not installed.
    """
    with _opened(file) as opened:
        schema = opened.schema if _is_stream(file) else opened.schema_arrow
    if twice := [name for name, times in Counter(schema.names).items() if times > 1]:
        raise UserError(f"{printable(str(file))} has two columns called {printable(twice[0])}")
    return schema


def values_of(file: Path, column: str) -> list[Any]:
    """Read all values of a column; the errors are those of `schema_of`."""
    return [value for batch in batches_of(file, column, ROWS) for value in batch.column(0).to_pylist()]


def batches_of(file: Path, column: str, rows: int) -> Iterator[Any]:
    """Read a column, in `pyarrow.RecordBatch`es of so many rows one after the other; a stream has its own batches.

    The errors are those of `schema_of`.
    """
    with _opened(file) as opened:
        if _is_stream(file):
            yield from (batch.select([column]) for batch in opened)
        else:
            yield from opened.iter_batches(rows, columns=[column], use_threads=False)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file.name} is read by the package pyarrow: pip install 'fedunlearn[hf]'") from error
    try:
        if _is_stream(file):
            with pyarrow.memory_map(str(file)) as opened:
                yield pyarrow.ipc.open_stream(opened)
        else:
            with pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as parquet:
                yield parquet
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{printable(str(file))} cannot be read ({printable(str(error))})") from error


def _is_stream(file: Path) -> bool:
    return file.suffix == ".arrow"
