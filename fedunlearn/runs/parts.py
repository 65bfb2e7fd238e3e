"""Removes clients' parts of decoded copies whose owners are known, where no run of the state folder needs them."""

import json
from collections.abc import Collection, Iterable, Mapping
from logging import getLogger
from pathlib import Path

from fedunlearn.data.owned import MARKER, SPLITS, OwnedSource
from fedunlearn.data.removal import remove_folder
from fedunlearn.data.store import REMOVED_FILES, undamaged
from fedunlearn.runs.run import Run

log = getLogger("fedunlearn")


def take_out(source: OwnedSource, run: Run, clients: Collection[int], sharing: Iterable[Run]) -> tuple[int, list[str]]:
    """Delete the parts of clients that nobody needs.

    Args:
        source: of the run's images.
        run: that does without the clients from now on.
        clients: by number in it.
        sharing: all runs that use the copy.

    Returns:
        How many of the clients' images were deleted, and who needs the others.
    """
    needed = _needed(run, clients, sharing)
    names = [source.clients[client] for client in clients]
    gone = source.take_out(name for name in names if name not in needed)
    say_left_files(source.store)
    needed_by = dict.fromkeys(user for name in names for user in needed.get(name, []))
    return sum(gone.values()), [f"run {user}" for user in needed_by]


def unneeded(run: Run, clients: Collection[int], sharing: Iterable[Run]) -> list[str]:
    """Name those of some clients whose images no run needs."""
    needed = _needed(run, clients, sharing)
    return [name for client in clients if (name := run.config.partition.names[client]) not in needed]


def has_part(source: OwnedSource, client: int) -> bool:
    """Say whether the copy has images of a client."""
    part = source.opened().parts[client]
    return any(map(part.count, SPLITS))


def say_left_files(store: Path) -> None:
    """Warn where the source still has files of clients that were taken out of a copy."""
    if (listed := store / REMOVED_FILES).exists() and listed.stat().st_size:
        log.warning("the source still has files of these clients: delete those that %s names", listed)


def delete_stale(
    data: Path, stores: Collection[Path], unsure: Collection[Path], sources: Iterable[object], deleted: list[str]
) -> set[Path]:
    """Delete copies that no run uses, and in the others the parts that no run's images are in any more.

    Args:
        data: the folder of decoded copies.
        stores: the copies that runs use.
        unsure: folders of images that runs are of whose copy is not found, as while somebody changes a folder.
        sources: of the images of all runs that have owners.
        deleted: gets the names of what is deleted.

    Returns:
        The folders that copies are still of.
    """
    owned = [source for source in sources if isinstance(source, OwnedSource)]
    roots: set[Path] = set()
    for marker in sorted(data.glob(f"*/{MARKER}")):
        store = marker.parent.resolve()
        with undamaged(marker):
            root = Path(json.loads(marker.read_text())["source"]).resolve()
        if store not in stores and root.exists() and root not in unsure:  # else its run may come back
            remove_folder(store)
            deleted.append(store.name)
            continue
        roots.add(root)
        here = [source for source in owned if source.store.resolve() == store]
        if here:
            kept = {key for source in here for key in source.part_names()}
            deleted += [f"{store.name}/{name}" for name in here[0].delete_all_but(kept)]
    return roots


def _needed(run: Run, clients: Collection[int], sharing: Iterable[Run]) -> Mapping[str, list[str]]:
    """By client's name, the runs that need its images."""
    needed: dict[str, list[str]] = {}
    for other in sharing:
        without = other.ledger.purged_clients()
        without |= set(clients) if other.folder == run.folder else set()
        for client, name in enumerate(other.config.partition.names):
            if client not in without:
                needed.setdefault(name, []).append(other.name)
    return needed
