"""SHA-256 of images that clients have on machines of their own: the first that each tells is kept, in `run.json`."""

from collections.abc import Mapping

from fedunlearn.runs.home import forgotten_in, write_about
from fedunlearn.runs.ledger import FORGOTTEN
from fedunlearn.runs.run import Run


def fingerprints_of(run: Run) -> dict[int, str]:
    """Give the SHA-256 of the clients' images, as far as it is known."""
    return {int(client): sha256 for client, sha256 in run.about()["data"].items() if client.isdecimal() and sha256}


def keep_fingerprints(run: Run, found: Mapping[int, str]) -> None:
    """Write down the SHA-256 of the images of clients of which none is known yet."""
    about, known = run.about(), fingerprints_of(run)
    if new := {str(client): sha256 for client, sha256 in found.items() if client not in known}:
        write_about(run.folder, run.ledger, about | {"data": about["data"] | new})


def gone_images(run: Run) -> dict[str, str]:
    """Give the SHA-256 of images that must not come back, each with who has forgotten them.

    These are what this run has forgotten, and what others of the state folder have forgotten for good. Nothing counts
    where one machine has all images: there a run is refused before it starts.
    """
    if not run.config.partition.is_on_nodes:
        return {}
    known = fingerprints_of(run)
    taken_back = {known.get(client, "") for client in run.config.readmit}
    others = {name: who for name, who in forgotten_in(run.home, but=run.name).names.items() if name not in taken_back}
    forgotten = [client for client in run.ledger.clients_in(FORGOTTEN) if client in known]
    return others | {known[client]: f"{run.named([client])}, by this run" for client in forgotten}
