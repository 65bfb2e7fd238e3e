"""Commands about what stays behind: `fedunlearn purge` and `fedunlearn scan`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedunlearn.commands import AsJson, Home, RunName, in_one_line, opened
from fedunlearn.config import check_clients
from fedunlearn.errors import UserError
from fedunlearn.log import set_up

if TYPE_CHECKING:
    from fedunlearn.runs.run import Run

Clients = Annotated[
    list[str] | None,
    typer.Option("--client", help="A client by name, or by number where no name is one; several as 3,5."),
]


@in_one_line
def purge(
    client: Clients = None,
    run: RunName = "",
    metrics: Annotated[bool, typer.Option("--metrics", help="Remove its figures from metrics and report too.")] = False,
    home: Home = "",
) -> int:
    """Remove what is left of forgotten clients, and say what is left after that."""
    set_up()
    from fedunlearn.runs import purge as purging
    from fedunlearn.runs import receipts
    from fedunlearn.runs.lock import lock

    with opened(run, home) as found:
        clients = clients_named(found, client)
        with lock(found.folder):
            for request in purging.check_purgeable(found, clients):
                purged = purging.purge(found, request, figures=metrics or found.config.forget.purge_metrics)
                for line in purging.in_lines(*purged):
                    print(line)
            for receipt in receipts.write_all(found):
                print(f"receipt: {receipt}")
    return 0


@in_one_line
def scan(
    client: Clients = None,
    run: RunName = "",
    also: Annotated[list[Path] | None, typer.Option(help="A further file or folder to search.")] = None,
    as_json: AsJson = False,
    home: Home = "",
) -> int:
    """Search the state folder, Ray's sessions and Flower's databases for clients' images, by content.

    The exit status is 0 if nothing was found, 1 if something was or a file cannot be read, and 2 if nobody has the
    images to compare with or a path does not exist.
    """
    set_up()
    from fedunlearn.runs import scan as scanning

    with opened(run, home) as found:
        places = [*scanning.default_places(found.home), *scanning.existing(also or [])]
        clients = clients_named(found, client)
        with scanning.owned_by(found, clients) as owned:
            look_for = scanning.wanted(owned)
        rows = [row_of(path, one, found.home) for path, one in scanning.scan(look_for, places)]
        searched, whom = len(scanning.files_below(places)), found.named(clients)
    if as_json:
        not_told_apart = {"not_told_apart": look_for.unknown, "files_not_told_apart": look_for.unknown_files}
        print(json.dumps({"found": rows, "files": searched, **not_told_apart}, indent=2))
    else:
        for row in rows:
            print(f"{row['file']}: {row['what']} ({row['way_out']})")
        of = f"{len(owned.images.images)} images of {whom}"
        have = sum(row["has_some"] for row in rows)
        print(f"{have or 'no'} files of {searched} have any of the {of}")
        if unread := sum(bool(row["unread"]) for row in rows):
            print(f"{unread} files could not be read to the end: nobody knows what is in them")
        for line in scanning.not_told_apart(look_for):
            print(line)
    return int(bool(rows))


def row_of(path: Path, found: Any, home: Path) -> dict[str, Any]:
    """Say what was found in a file."""
    from fedunlearn.runs import scan as scanning

    return {
        "file": str(path),
        "what": scanning.in_words(found),
        "images": len(found.images),
        "has_some": bool(found.images or found.files or found.labels),
        "unread": found.unread,
        "way_out": scanning.why_left(path, found, home),
    }


def clients_named(found: "Run", named: list[str] | None) -> list[int]:
    """Give the numbers of the clients that a command names, without repetition.

    Raises:
        UserError: it names none, or one that there is not.
    """
    clients = found.numbers_of(named or [])
    if not clients:
        raise UserError("nobody is named: say whom with --client")
    check_clients(clients, found.config.clients)
    return clients
