"""The command `fedunlearn leave`: a client asks from its own machine to be forgotten."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from unicodedata import normalize

import typer

from fedunlearn.commands import Home, in_one_line
from fedunlearn.config import state_home
from fedunlearn.errors import UserError, printable
from fedunlearn.log import set_up

if TYPE_CHECKING:
    from fedunlearn.runs.taking_part import TakingPart

DIGITS = 12
"""Of a run's key, where a run is named."""
SHOWN = 16
"""Digits of a client's key in a message."""


@in_one_line
def leave(
    client: Annotated[str, typer.Option(help="The client that asks, by its name.")],
    key: Annotated[Path, typer.Option(help="Its private key: its SuperNode's, or the one that the run names.")],
    run: Annotated[
        str, typer.Option(help="First digits of the key of a run; by default all that the machine takes part in.")
    ] = "",
    days: Annotated[float, typer.Option(min=0, help="Until it expires.")] = 30,
    home: Home = "",
) -> int:
    """Ask from a client's own machine to be forgotten: its SuperNode's next reply carries what the key signs.

    `--home` is the state folder of the SuperNode, as its `--node-config` or $FEDUNLEARN_HOME says.
    """
    set_up()
    from fedunlearn.runs import taking_part
    from fedunlearn.runs.keys import id_of, load
    from fedunlearn.runs.signed import sign

    folder = state_home(home)
    wanted = chosen(taking_part.noted(folder), folder, client, run)
    for one, number in wanted:
        check_signer(one, number, id_of(load(key)))
    for one, number in wanted:
        asked = sign([number], run=one.run, key=key, days=days)
        taking_part.keep(folder, asked)
        print(f"client {printable(one.clients[number])} asks run {one.run[:DIGITS]} to be forgotten (since "
              f"{one.since[:10]} it takes part there), until {asked.expires_at[:16]} UTC")  # fmt: skip
    print(f"signed with the key {asked.key}")
    print("The SuperNode's next reply carries it, and a live run applies it at its next round boundary.")
    print("A run that is not live applies it when it is started again while the SuperNode is connected.")
    print("Until then the client's images are needed. Afterwards the machine gets no message for it: delete them.")
    return 0


def chosen(runs: list["TakingPart"], folder: Path, client: str, key: str) -> list[tuple["TakingPart", int]]:
    """Give the runs that a client asks, each with the client's number there.

    Args:
        runs: that the machine takes part in.
        folder: the machine's state folder, to be named.
        client: by its name.
        key: how the key of the only run begins; empty for all.

    Raises:
        UserError: there is none.
    """
    if not runs:
        raise UserError(
            f"this machine has taken part in no run ({folder}): give the state folder of its SuperNode as --home"
        )
    of_key = [one for one in runs if one.run.startswith(key.lower())]
    if not of_key or (key and len(of_key) > 1):
        known = ", ".join(one.run[:DIGITS] for one in runs)
        raise UserError(
            f"--run {printable(key[:80])} begins the keys of {len(of_key)} runs, not of one: there are {known}"
        )
    wanted = normalize("NFC", client.strip())
    found = [(one, n) for one in of_key for n, name in one.clients.items() if normalize("NFC", name) == wanted]
    if not found:
        names = ", ".join(sorted({printable(name) for one in of_key for name in one.clients.values()}))
        raise UserError(
            f"no client {printable(client[:80])!r} takes part from this machine: there is {names or 'none'}"
        )
    return found


def check_signer(one: "TakingPart", client: int, key: str) -> None:
    """Raise UserError where a run has said that it believes another key than the one that signs for a client.

    Args:
        one: what the machine knows of the run; nothing is said of a run that did not say whom it believes.
        client: that asks.
        key: id of the key that signs.
    """
    believed = one.signers.get(client, key)
    about = f"run {one.run[:DIGITS]}, for client {printable(one.clients[client])},"
    if not believed:
        raise UserError(
            f"{about} believes no key, as it has forget.signed without forget.keys or partition.keys: ask who runs it"
        )
    if believed != key:
        keys = f"believes the key {believed[:SHOWN]}…, and --key has {key[:SHOWN]}…"
        raise UserError(f"{about} {keys}: nothing was asked")
