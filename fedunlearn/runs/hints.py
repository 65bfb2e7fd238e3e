"""Commands that messages tell people to type: each names its run, so that it does the same wherever it is pasted."""

from collections.abc import Sequence
from pathlib import Path

from fedunlearn.config import state_home
from fedunlearn.naming import as_command


def of_run(folder: Path) -> list[str]:
    """Give the options of a command that name a run by its folder; --home where that is not in the usual state folder.

    Example:
        >>> of_run(state_home() / "runs" / "demo"), of_run(Path("/srv/state/runs/demo"))
        (['--run=demo'], ['--run=demo', '--home=/srv/state'])
    """
    home = folder.parent.parent
    return [f"--run={folder.name}", *([] if home == state_home() else [f"--home={home}"])]


def forget_command(clients: Sequence[int], names: Sequence[str], folder: Path) -> str:
    """Write the command that asks a run, by its folder, for clients to be forgotten.

    Example:
        >>> print(forget_command([1, 0], ["St. Mary, Ward 2", "b"], state_home() / "runs" / "demo"))
        fedunlearn forget --client b --client 'St. Mary, Ward 2' --run=demo
    """
    own = [names[client] for client in clients] if names else [",".join(map(str, clients))]
    options = ([f"--client={name}"] if name.startswith("-") else ["--client", name] for name in own)
    return as_command("forget", *(word for option in options for word in option), *of_run(folder))
