"""Read parquet files, and those of Arrow, some rows at a time: the images in one may be more than the memory holds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedunlearn.errors import UserError, printable

ROWS, BUFFER = 16, 1 << 20
"""Of a parquet file, rows that are read together, and bytes of a column."""


def schema_of(file: Path) -> Any:
    """Give the columns of a file, and what is written about them, as a `pyarrow.Schema`.

    Args:
        file: a stream of Arrow's where its name ends in `.arrow`, else parquet.

    Raises:
        UserError: it is damaged, or pyarrow is not installed.
    """
    with _opened(file) as opened:
        return opened.schema if _is_stream(file) else opened.schema_arrow


def values_of(file: Path, column: str) -> list[Any]:
    """Read all values of a column; the errors are those of `schema_of`."""
    return [value for batch in batches_of(file, [column]) for value in batch.column(column).to_pylist()]


def batches_of(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Read some columns, in `pyarrow.RecordBatch`es one after the other; the errors are those of `schema_of`."""
    with _opened(file) as opened:
        if _is_stream(file):
            yield from (batch.select(columns) for batch in opened)
        else:
            yield from opened.iter_batches(ROWS, columns=columns, use_threads=False)


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
