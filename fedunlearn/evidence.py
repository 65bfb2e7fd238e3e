"""Commands about evidence: `fedunlearn verify` and `fedunlearn keys`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedunlearn.commands import Home, RunName, in_one_line, opened
from fedunlearn.errors import UserError

keys_cli = typer.Typer(help="Make keys, and sign receipts with them.", no_args_is_help=True)

KeyFile = Annotated[Path, typer.Option("--key", help="A private key, as `keys new` writes it.")]


@in_one_line
def verify(
    receipt: Annotated[Path | None, typer.Argument(help="A receipt, as runs/demo/receipts/r1.json.")] = None,
    key: Annotated[str, typer.Option(help="Id of the key that must have signed it, got in another way.")] = "",
    log: Annotated[Path | None, typer.Option(help="The run's ledger.sqlite, or its heads/<run>.json.")] = None,
    run: RunName = "",
    home: Home = "",
) -> int:
    """Check a receipt, offline; or without one a run: its ledger, settings, model and receipts."""
    from fedunlearn.runs.verifying import InvalidError, problems, verified

    if receipt is None:
        with opened(run, home) as found:
            wrong = list(problems(found))
            head = found.ledger.head()
        for problem in wrong:
            print(f"wrong: {problem}")
        if not wrong:
            print(f"run {found.name} is as it was written: {head.size} events, signed with key {head.key}")
        return int(bool(wrong))
    try:
        data = receipt.read_bytes()
    except OSError as error:
        raise UserError(f"{receipt} cannot be read: {error}") from error
    try:
        said = verified(data, key=key, log=log)
    except InvalidError as error:
        print(f"{receipt} is NOT valid: {error}")
        return 1
    clients = ", ".join(map(str, said.clients))
    print(f"{receipt} is valid: request {said.request} of run {said.run}, clients {clients}: {said.state}")
    print(f"received {said.received_at}, due {said.due_at}, ended {said.ended_at}")
    for one in said.figures:
        print(f"class accuracy, {one.of}: {one.before} -> {one.after} (measured by {one.measured_by})")
    print(
        f"signed with key {said.head.key}" + ("" if key else ": compare it with the one that you know, or give --key")
    )
    for sentence in said.does_not_prove:
        print(f"not proved: {sentence}")
    return 0


@keys_cli.command()
@in_one_line
def new(file: Annotated[Path, typer.Argument(help="Where it is written, as client3.pem.")]) -> int:
    """Make an Ed25519 key, and print its id: the public key."""
    from fedunlearn.runs import keys

    print(keys.new_key(file))
    return 0


@keys_cli.command("id")
@in_one_line
def id_(file: Annotated[Path, typer.Argument(help="A private key.")]) -> int:
    """Print a key's id."""
    from fedunlearn.runs import keys

    print(keys.id_of(keys.load(file)))
    return 0


@keys_cli.command()
@in_one_line
def ask(
    file: Annotated[Path, typer.Argument(help="Where the signed request is written.")],
    client: Annotated[list[int], typer.Option(help="Whom it is about; may be given several times.")],
    key: KeyFile,
    run_key: Annotated[str, typer.Option(help="Id of the run's key, as `fedunlearn verify` prints it.")],
    action: Annotated[str, typer.Option(help="forget, or 'cancel r1'.")] = "forget",
    days: Annotated[float, typer.Option(min=0, help="In which it can be filed.")] = 30,
) -> int:
    """Sign a request where the client's key is: `fedunlearn forget --signed FILE` files it where the run is."""
    from dataclasses import asdict

    from fedunlearn.runs import signed

    asked = signed.sign(client, run=run_key, key=key, action=action, days=days)
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
    signed = receipt.with_suffix(f".{keys.id_of(keys.load(key))[:8]}.json")
    write_atomically(signed, receipts.as_file(receipts.sign(envelope_of(data), key)))
    print(signed)
    return 0
