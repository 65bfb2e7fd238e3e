"""Read CSV files as spreadsheets write them: with commas, semicolons or tabs, and with or without a byte order mark."""

import csv
import io
from pathlib import Path
from unicodedata import normalize

SEPARATORS = ",;\t"


class NoTableError(ValueError):
    """A file cannot be read as rows of values: its text says why."""


def read_rows(file: Path) -> list[tuple[int, list[str]]]:
    """Read the rows of a CSV file in UTF-8, the names of its columns first.

    What separates values is what separates the names of the columns. A value has no blanks around it, and composed
    characters, so that one name is one text. Rows without any value are left out.

    Args:
        file: to read.

    Returns:
        Each row with the number of its last line.

    Raises:
        NoTableError: it is not in UTF-8, or a quote is not closed.
        OSError: it cannot be opened.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as opened:
        ...     _ = Path(opened.name).write_text("path; client\\n;\\na.png; St. Mary, Ward 2\\n")
        ...     read_rows(Path(opened.name))
        [(1, ['path', 'client']), (3, ['a.png', 'St. Mary, Ward 2'])]
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NoTableError("it is not in UTF-8") from error
    first = next(iter(text.splitlines()), "")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(SEPARATORS, key=first.count), strict=True)
    try:
        rows = [(reader.line_num, [normalize("NFC", value.strip()) for value in row]) for row in reader]
    except csv.Error as error:
        raise NoTableError(f"line {reader.line_num}: {error}; is a quote not closed?") from error
    return [(number, row) for number, row in rows if any(row)]
