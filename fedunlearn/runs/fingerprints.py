"""What is known of clients on machines of their own: the SHA-256 that each first tells, and its key, in `run.json`."""

from collections.abc import Mapping

from fedunlearn.runs.home import forgotten_in, owner, write_about
from fedunlearn.runs.ledger import FORGOTTEN
from fedunlearn.runs.run import Run


def fingerprints_of(run: Run) -> dict[int, str]:
    """Give the SHA-256 of the images of clients that have them on machines of their own, as far as it is known."""
    if not run.config.partition.is_on_nodes:
        return {}
    return {int(client): sha256 for client, sha256 in run.about()["data"].items() if client.isdecimal() and sha256}


def keep_fingerprints(run: Run, found: Mapping[int, str]) -> None:
    """Write down the SHA-256 of the images of clients of which none is known yet."""
    known = fingerprints_of(run)
    if new := {str(client): sha256 for client, sha256 in found.items() if client not in known}:
        about = run.about()
        write_about(run.folder, run.ledger, about | {"data": about["data"] | new})


def keys_of(run: Run) -> dict[int, str]:
    """Give the ids of the keys of clients' machines: those of the settings, else those that were last seen."""
    if not run.config.partition.is_on_nodes:
        return {}
    return run.config.partition.keys or {int(client): key for client, key in run.about().get("keys", {}).items()}


def keep_keys(run: Run, found: Mapping[int, str]) -> None:
    """Write down the keys of the machines that clients came from, where the settings name none.

    By it a client is known again once it was forgotten: then the key that was written down stays.
    """
    if not run.config.partition.is_on_nodes:
        return
    known, forgotten = keys_of(run), run.ledger.clients_in(FORGOTTEN)
    keys = known | {
        client: key for client, key in found.items() if key and not (client in forgotten and client in known)
    }
    if keys != known and not run.config.partition.keys:
        write_about(run.folder, run.ledger, run.about() | {"keys": {str(client): key for client, key in keys.items()}})


def forgotten_for_good(run: Run) -> dict[str, str]:
    """Give the SHA-256 of images, and the keys, that must not come back, each with who has forgotten them.

    These are what this run has forgotten, and what others of the state folder have forgotten for good. Nothing counts
    where one machine has all images: there a run is refused before it starts.
    """
    if not run.config.partition.is_on_nodes:
        return {}
    images, keys, values = fingerprints_of(run), keys_of(run), run.config.model_dump(include={"data", "partition"})

    def known(client: int) -> set[str]:
        return {images.get(client, ""), keys.get(client, "")} - {""}

    taken_back = {name for client in run.config.readmit for name in known(client) | {owner(values, client)}}
    others = forgotten_in(run.home, but=run.name, taken_back=taken_back).names
    forgotten = run.ledger.clients_in(FORGOTTEN)
    of_others = {keys[client] for client in keys.keys() - set(forgotten)}  # a machine may have several clients
    own = {name: f"{run.named([client])}, by this run" for client in forgotten for name in known(client) - of_others}
    return others | own
