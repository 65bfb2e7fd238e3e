"""What all commands have in common: options, errors in one line, an open run."""

import errno
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fedunlearn.errors import UserError
from fedunlearn.runs.home import open_run
from fedunlearn.runs.run import Run
from fedunlearn.schema import check_text

Home = Annotated[str, typer.Option("--home", help="State folder; by default $FEDUNLEARN_HOME, else ~/.fedunlearn.")]
RunName = Annotated[str, typer.Option("--run", help="The run; by default the live one, else the newest finished one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

FAILING_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR)


def in_one_line(command: Callable[..., int]) -> Callable[..., NoReturn]:
    """Exit with the command's status; an error that a person can put right is one line on stderr and status 2.

    Those are every UserError, a file that was named and cannot be read or written, and a disk that fails.
    """

    @wraps(command)
    def guarded(*arguments: Any, **options: Any) -> NoReturn:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does with what a terminal cannot show
        try:
            check_typed(options.values())
            status = command(*arguments, **options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except OSError as error:
            if file := named_file(error, options.values()):
                print(f"error: {file} cannot be used ({error.strerror})", file=sys.stderr)
            elif error.errno not in FAILING_STORAGE:
                raise
            else:
                print(f"error: {error}: what is committed is whole, the same command goes on from it", file=sys.stderr)
            status = 2
        raise typer.Exit(status)

    return guarded


def named_file(error: OSError, values: Iterable[Any]) -> Path | None:
    """Give the file that an error is about, or a folder above it, where somebody has named it to the command."""
    about = Path(str(error.filename))
    named = [path for path in values if isinstance(path, Path)]
    return next((about for path in named if about in (path, *path.parents)), None)


def check_typed(values: Iterable[Any]) -> None:
    """Raise UserError where something was typed that is no text."""
    for value in values:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(text)


@contextmanager
def opened(name: str, home: str) -> Iterator[Run]:
    """Open a run, and close its ledger afterwards."""
    found = open_run(name or None, home=home)
    try:
        yield found
    finally:
        found.ledger.close()


def read_names(file: Path) -> list[str]:
    """Read the names of images, one a line; empty lines do not count.

    Raises:
        UserError: there are none, or the file cannot be read.
    """
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--examples {file} cannot be read ({error})") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"--examples {file} names no image")
    return names
