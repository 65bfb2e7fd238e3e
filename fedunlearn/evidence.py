"""Commands about evidence: `fedunlearn verify` and `fedunlearn keys`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedunlearn.commands import Home, RunName, in_one_line, opened, read_names
from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError, printable
from fedunlearn.naming import numbers_of
from fedunlearn.schema import KEY_ID

if TYPE_CHECKING:
    from fedunlearn.runs.run import Run
    from fedunlearn.runs.statement import Receipt

keys_cli = typer.Typer(help="Make keys, and sign receipts with them.", no_args_is_help=True)

KeyFile = Annotated[Path, typer.Option("--key", help="A private key, as `keys new` writes it, or a SuperNode's.")]


@in_one_line
def verify(
    receipt: Annotated[Path | None, typer.Argument(help="A receipt, as runs/demo/receipts/r1.json.")] = None,
    key: Annotated[str, typer.Option(help="Id of the key that must have signed; ask the operator for it.")] = "",
    log: Annotated[
        Path | None, typer.Option(help="Of a receipt: the run's ledger.sqlite. Of a run: a copy of heads/<run>.json.")
    ] = None,
    run: RunName = "",
    home: Home = "",
) -> int:
    """Check a receipt, offline; or without one a run: its ledger, settings, model and receipts.

    The exit status is 0 if all is well, 1 if not, 2 if a file cannot be read.
    """
    from fedunlearn.runs.verifying import InvalidError, problems, verified

    if key:
        check_id(key)
    if receipt is None:
        with opened(run, home) as found:
            return verify_run(found, list(problems(found, key=key, log=log)))
    if run:
        raise UserError("a receipt is checked without its run: give either the receipt or --run")
    try:
        data = receipt.read_bytes()
    except OSError as error:
        raise UserError(f"{receipt} cannot be read ({error.strerror})") from error
    try:
        said = verified(data, key=key, log=log)
    except InvalidError as error:
        print(f"{receipt} is NOT valid: {error}")
        return 1
    for line in in_words(said, f"{receipt} is valid"):
        print(printable(line))
    for signer in signers(data):
        who = "the run's key" if signer == said.head.key else "a countersigner's key"
        print(f"signed with {who} {signer}{', as you asked' if signer == key else ''}")
    if said.head.key != key:
        print("nobody has confirmed the run's key yet: ask the operator for its id, and give it as --key")
    for sentence in said.does_not_prove:
        print(f"not proved: {printable(sentence)}")
    return 0


def verify_run(found: "Run", wrong: list[str]) -> int:
    """Print what is wrong with a run."""
    for problem in wrong:
        print(f"wrong: {problem}")
    if not wrong:
        head = found.ledger.head()
        print(f"run {found.name}: ledger, settings, model and receipts are as they were written")
        print(f"{head.size} events, signed with the run's key {head.key}")
    return int(bool(wrong))


def in_words(said: "Receipt", title: str) -> Iterator[str]:
    """Say what a receipt says."""
    late = ", LATE" if said.is_late else ""
    yield f"{title}: request {said.request} of run {said.run}, {said.who}: {said.state}{late}"
    yield f"received {said.received_at[:19]}, due {said.due_at[:19]}, ended {said.ended_at[:19]} (UTC)"
    if said.asked_by:
        yield f"asked by {said.asked_by}{f', by right of {said.right}' if said.right else ''}"
    if said.reason:
        yield f"reason: {said.reason}"
    if said.accepted_by:
        yield f"taken by {said.accepted_by}, although the gate had refused it"
    if said.strategy:
        yield f"forgotten by strategy {said.strategy}, applied {(said.applied_at or '')[:19]}"
    for one in said.figures:
        before, after = number(one.before, one.before_error), number(one.after, one.after_error)
        yield f"class accuracy, {said.shown(one.of)}: {before} -> {after} (measured by {one.measured_by})"
    if said.later:
        later = ", ".join(f"{said.shown(of)} {value:.3f}" for of, value in said.later.figures.items())
        yield f"class accuracy after round {said.later.round}: {later}"


def number(value: float | None, error: float | None) -> str:
    """Write a figure with its standard error."""
    return "not measured" if value is None or error is None else f"{value:.3f} ± {error:.3f}"


def signers(data: bytes) -> list[str]:
    """List the ids of the keys that signed a receipt."""
    from fedunlearn.runs.verifying import envelope_of

    return list(envelope_of(data).signatures)


def check_id(key: str) -> None:
    """Raise UserError where a text is no id of a key."""
    if not re.fullmatch(KEY_ID, key):
        raise UserError(
            f"{key!r} is no id of a key: those 64 or more hexadecimal digits that `fedunlearn keys id` prints"
        )


@keys_cli.command()
@in_one_line
def new(file: Annotated[Path, typer.Argument(help="Where it is written, as client3.pem.")]) -> int:
    """Make an Ed25519 key, and print its id: the public key."""
    from fedunlearn.runs import keys

    print(keys.new_key(file))
    return 0


@keys_cli.command("id")
@in_one_line
def id_(file: Annotated[Path, typer.Argument(help="A key, public or private.")]) -> int:
    """Print a key's id."""
    from fedunlearn.runs import keys

    print(keys.id_in(file))
    return 0


@keys_cli.command()
@in_one_line
def ask(
    file: Annotated[Path, typer.Argument(help="Where the signed request is written.")],
    client: Annotated[
        list[str], typer.Option(help="Whom it is about, by number in the run, as 3 or 3,5; may be given several times.")
    ],
    key: KeyFile,
    run_key: Annotated[str, typer.Option(help="Id of the run's key, as `fedunlearn verify` prints it.")],
    action: Annotated[str, typer.Option(help="forget, or 'cancel r1'.")] = "forget",
    class_: Annotated[
        list[int] | None, typer.Option("--class", help="Number of the class that alone is meant.")
    ] = None,
    patient: Annotated[list[str] | None, typer.Option(help="Whose images alone are meant.")] = None,
    examples: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The images alone that this file names, one a line.")
    ] = None,
    days: Annotated[float, typer.Option(min=0, help="Until it expires.")] = 30,
) -> int:
    """Sign a request where the client's key is: `fedunlearn forget --signed FILE` files it where the run is."""
    from dataclasses import asdict

    from fedunlearn.runs import signed

    check_id(run_key)
    if not re.fullmatch(r"forget|cancel r\d+", action):
        raise UserError(f"--action {action!r} is neither forget nor 'cancel r1'")
    selection = Selection.by(class_ or [], patient or [], read_names(examples) if examples else [])
    if selection and action != signed.FORGET:
        raise UserError("--class, --patient and --examples say what is to be forgotten: leave --action out")
    action = signed.action_of(selection) if selection else action
    asked = signed.sign(numbers_of(client), run=run_key, key=key, action=action, days=days)
    file.write_text(json.dumps(asdict(asked), indent=2))
    print(f"{file} can be filed until {asked.expires_at}")
    return 0


@keys_cli.command()
@in_one_line
def sign(receipt: Annotated[Path, typer.Argument(help="A receipt.")], key: KeyFile) -> int:
    """Countersign a valid receipt, as the client that was forgotten may do; it is written to a new file."""
    from fedunlearn.runs import keys, receipts
    from fedunlearn.runs.files import write_atomically
    from fedunlearn.runs.verifying import envelope_of, verified

    data = receipt.read_bytes()
    verified(data)
    if keys.id_of(keys.load(key)) in signers(data):
        raise UserError(f"{receipt} is signed with this key already")
    signed = receipt.with_suffix(f".{keys.id_of(keys.load(key))[:8]}.json")
    write_atomically(signed, receipts.as_file(receipts.sign(envelope_of(data), key)))
    print(signed)
    return 0
