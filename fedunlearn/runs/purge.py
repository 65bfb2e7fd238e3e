"""Removes what is left of forgotten clients: images that no run needs any more, files, and figures if that is wanted.

A run needs the images of all of its clients, until what is left of a client is removed there. So runs that share a
decoded copy may go on: an image is taken out of it when the last run does without.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedunlearn.build import slices_of, source_of
from fedunlearn.data import unpacked
from fedunlearn.data.decoded import those
from fedunlearn.data.folders import KINDS
from fedunlearn.data.owned import OwnedSource
from fedunlearn.data.removal import remove_folder
from fedunlearn.data.search import Found, Wanted
from fedunlearn.data.store import Dataset, about, remove_leftovers
from fedunlearn.errors import UserError
from fedunlearn.runs import checkpoint, parts, scan
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.hints import forget_command
from fedunlearn.runs.ledger import FORGOTTEN, Request, State
from fedunlearn.runs.parts import say_left_files
from fedunlearn.runs.run import Run
from fedunlearn.runs.sharing import (
    User,
    archive_of,
    data_lock,
    delete_unpacked,
    opened_runs,
    sharing,
    store_of,
    studies,
    users_of,
)
from fedunlearn.unlearning.pruning import PRUNED

BESIDE_IN_WORDS = {"momentum": "the server's momentum", "frozen": "the mark of frozen weights"}
PURGE = "purge"  # the kind of a row of metrics

log = getLogger("fedunlearn")


def purge_due(run: Run) -> None:
    """Remove what is left after every completed request, of which it was not removed yet or has come back."""
    done = {request.id for request in run.ledger.purged()}
    for request in run.ledger.requests():
        is_whole = not request.portions
        if request.state == State.COMPLETED and (
            request.id not in done or (is_whole and _has_images(run, request.clients))
        ):
            for line in in_lines(*purge(run, request, figures=run.config.forget.purge_metrics)):
                log.info("── %s", line)


def _has_images(run: Run, clients: Collection[int]) -> bool:
    """Say whether the run's decoded copy has images of clients that no run needs, as far as anybody knows."""
    store = store_of(run)
    if store is None:
        return False
    try:
        if isinstance(source := source_of(run.config_here()), OwnedSource):
            mine = [client for client in clients if parts.has_part(source, client)]
            return bool(parts.unneeded(run, mine, sharing(store, run.home)))
        unneeded = _unneeded(Dataset(store), _users(store, run, clients))
        return bool(unneeded[_own(store, run, clients)].any())
    except UserError as error:
        log.warning("no image is removed: %s", error)
        return False


def purge(run: Run, request: Request, *, figures: bool = False) -> tuple[list[str], list[dict[str, str]]]:
    """Remove what is left of the clients of a request that was applied, and write down what was found.

    Args:
        run: that nobody else holds.
        request: applied and completed.
        figures: whether their accuracies by round and class counts are removed too.

    Returns:
        What is gone, and what is left, each with `what` and `why`.
    """
    who = run.named(request.clients, most=len(request.clients))
    if request.portions:
        return _purge_portions(run, request, run.named(sorted(request.covered), most=len(request.covered)))
    with data_lock(run.home):
        removed = _remove(run, request, figures=figures)
    deleted, kept = _looked_up_in_model(run, request)
    deleted += _gone_in_words(removed, who, figures=figures)
    kept += _left_in_words(run, removed, who, figures=figures)
    run.ledger.keep_purge(request, deleted=deleted, kept=kept)
    return deleted, kept


def in_lines(deleted: Iterable[str], kept: Iterable[Mapping[str, str]]) -> list[str]:
    """Say in lines what `purge` has given."""
    return [f"gone: {what}" for what in deleted] + [f"left: {one['what']}, since: {one['why']}" for one in kept]


class Removed(NamedTuple):
    """What was removed of clients, and what was found after that.

    Attributes:
        images: of theirs, taken out of the decoded copy.
        needed_by: who needs the others.
        stale: names of copies that no run used.
        unpacked: files of an unpacked archive.
        updates: stored updates.
        kept_updates: those that could not be deleted, each with `what` and `why`.
        look_for: what was searched for; None where nobody has the images to compare with.
        found: files in which something was found.
    """

    images: int
    needed_by: list[str]
    stale: list[str]
    unpacked: int
    updates: int
    kept_updates: list[dict[str, str]]
    look_for: Wanted | None
    found: list[tuple[Path, Found]]


def _remove(run: Run, request: Request, *, figures: bool) -> Removed:
    """Remove what is left of a request's clients, and search for the rest; nobody else may touch `data/` meanwhile."""
    clients, data = request.clients, run.home / "data"
    try:
        with scan.owned_by(run, clients) as owned:
            look_for = scan.wanted(owned)
    except UserError as error:
        log.warning("no image is looked for: %s", error)
        owned, look_for = None, None
    try:
        images, needed_by = _take_out(run, clients)
    except UserError as error:  # nobody knows what a damaged run needs
        log.warning("no image is removed: %s", error)
        images, needed_by = 0, [f"somebody, perhaps: {error}"]
    try:
        stale = _delete_stale(run.home)
    except UserError as error:
        log.warning("no copy is deleted: %s", error)
        stale = []
    folder = archive_of(run)
    unpacked_files = delete_unpacked(folder, run.home) if folder else 0
    updates, kept_updates = _delete_files(run, clients)
    if owned and not figures:
        keep_class_counts(run, request, owned.class_counts)
    if figures:
        portions = [n for n, portion in run.ledger.portions().items() if portion.client in clients]
        delete_figures(run, [*clients, *portions])
    found = list(scan.scan(look_for, [data, run.folder])) if look_for else []
    return Removed(images, needed_by, stale, unpacked_files, updates, kept_updates, look_for, found)


def _gone_in_words(removed: Removed, who: str, *, figures: bool) -> list[str]:
    deleted = [
        *([] if removed.kept_updates and not removed.updates else [_updates_in_words(removed.updates, who)]),
        *([f"{removed.images} decoded images of {who}, with their labels"] if removed.images else []),
        *([f"files of {who} in the unpacked archive: {removed.unpacked} deleted"] if removed.unpacked else []),
        *([f"copies of images that no run uses: {', '.join(removed.stale)}"] if removed.stale else []),
        *([f"accuracies by round and class counts of {who}, in metrics and report"] if figures else []),
    ]
    if removed.look_for and not removed.found:
        apart = "; ".join(scan.not_told_apart(removed.look_for))
        said = f"images of {who}: none was found in data/ and in the run's folder"
        deleted.append(f"{said} ({apart})" if apart else said)
    return deleted


def _left_in_words(run: Run, removed: Removed, who: str, *, figures: bool) -> list[dict[str, str]]:
    kept, needed_by = [*removed.kept_updates], removed.needed_by
    for path, found in removed.found:
        what = f"{scan.in_words(found)} of {who} in {path.relative_to(run.home)}"
        is_own_copy = store_of(run) in path.resolve().parents
        reason = f"needed by {', '.join(needed_by)}" if needed_by and is_own_copy and not found.unread else ""
        kept.append({"what": what, "why": reason or scan.why_left(path, found, run.home)})
    if not removed.look_for:
        why = "nobody could look for them: there are none to compare with, in the decoded copy or at the source"
        if run.config.partition.is_on_nodes:
            why = "they and their decoded copy are on a machine of their own, whose owner can delete them"
        kept.append({"what": f"perhaps images of {who}", "why": why})
    if run.config.partition.kind == "column" and not _knows_whose_test_images(run):
        why = "the data, or a decoded copy made by an earlier version, does not say whose they are"
        kept.append({"what": f"perhaps test images of {who}", "why": why})
    if not figures:
        kept.append({"what": f"accuracies by round of {who}", "why": "audits compare with them (forget.purge_metrics)"})
    return kept


def _knows_whose_test_images(run: Run) -> bool:
    try:
        return bool(source_of(run.config_here()).opened().test_owners)
    except UserError:
        return False


def _updates_in_words(count: int, who: str) -> str:
    return f"stored updates of {who}: {f'{count} files deleted' if count else 'there are none'}"


def _root_of(run: Run) -> Path:
    """The folder of a run's images, whether it can be read or not."""
    return Path(run.config.data.root).expanduser().resolve()


def _own(store: Path, run: Run, clients: Collection[int]) -> np.ndarray:
    slices = slices_of(run.config_here(), Dataset(store))
    return np.concatenate([slices[client] for client in clients])


def _users(store: Path, run: Run, clients: Collection[int]) -> list[User]:
    """The runs that use a copy; `run` does without `clients` from now on."""
    users = users_of(store, run.home)
    return [user._replace(without=user.without | {*clients}) if user.name == run.name else user for user in users]


def _unneeded(dataset: Dataset, users: list[User]) -> np.ndarray:
    """Which images some run does without, and no run needs, bool [N]."""
    unneeded = np.zeros(len(dataset.train.labels), bool)
    for user in users:
        unneeded[user.rows(user.without)] = True
    for user in users:
        unneeded[user.needed] = False
    return unneeded


def _take_out(run: Run, clients: Collection[int]) -> tuple[int, list[str]]:
    """Write the run's copy anew without the images that nobody needs.

    Returns:
        How many of the clients' images were taken out, and who needs the others.
    """
    store = store_of(run)
    if store is None:
        return 0, []
    if run.config.partition.is_on_nodes:
        return 0, []
    source = source_of(run.config_here())
    dataset = source.opened()
    if studied_by := [f"study {name}" for name, data in studies(run.home) if data == dataset.fingerprint]:
        return 0, studied_by
    if isinstance(source, OwnedSource):
        return parts.take_out(source, run, clients, sharing(store, run.home))
    dataset.tidy()
    users = _users(store, run, clients)
    mine, unneeded = next(user for user in users if user.name == run.name), _unneeded(dataset, users)
    own = mine.rows(clients)
    needed_by = [f"run {user.name}" for user in users if len(np.intersect1d(user.needed, own))]
    gone = set().union(*(user.owners(user.without) for user in users)) - {*those(dataset.owners, ~unneeded)}
    if gone and dataset.tests_of(gone).all():
        needed_by.append("the server, which has no other test images")
        gone.clear()
    if unneeded.any() or dataset.tests_of(gone).any():
        dataset.without(unneeded, {user.deal: user.slices for user in users}, gone)
        say_left_files(store)
    return int(unneeded[own].sum() + dataset.tests_of(mine.owners(clients) & gone).sum()), needed_by


def _copies(data: Path) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """The decoded copies of a folder, each with what it says of itself; None where that is damaged."""
    for file in sorted(data.glob("*/meta.json")):
        if file.parent.is_symlink():
            continue
        try:
            yield file.parent, about(file.parent)
        except UserError as error:
            log.warning("%s stays, whatever it is: %s", file.parent.name, error)
            yield file.parent, None


def _delete_stale(home: Path) -> list[str]:
    """Delete decoded copies, and unpacked archives, that no run and no study uses any more; gives their names."""
    data = (home / "data").resolve()
    stores = {store for store in map(store_of, opened_runs(home)) if store}
    unsure = set(map(_root_of, (run for run in opened_runs(home) if run.config.data.root and not store_of(run))))
    studied = {fingerprint for _, fingerprint in studies(home)}
    is_archive_needed = any(map(_has_archive_alone, opened_runs(home)))
    sources, deleted = set(), remove_leftovers(data)
    for store, meta in _copies(data):
        if meta is None:
            is_archive_needed = True
            continue
        source = Path(meta.get("source", home)).resolve()
        is_unpacked = data in source.parents
        is_there = source.exists()  # else its run may come back
        is_used = store.resolve() in stores or source in unsure or meta["fingerprint"] in studied
        if is_used or not is_there or (is_unpacked and is_archive_needed):
            sources |= {source, *source.parents}
        else:
            remove_folder(store)
            deleted.append(store.name)
    if not studied:
        owned = (source_of(run.config_here()) for run in _with_parts(home))
        roots = parts.delete_stale(data, stores, unsure, owned, deleted)
        sources |= {folder for root in roots for folder in (root, *root.parents)}
    for folder in data.glob(f"{unpacked.PREFIX}*/"):
        if folder.resolve() not in sources and not folder.is_symlink() and not is_archive_needed:
            unpacked.remove(folder)
            deleted.append(folder.name)
    for link in data.iterdir():
        is_alias = link.is_symlink() and len(link.readlink().parts) == 1
        if is_alias and not link.exists():
            link.unlink()
    return deleted


def _with_parts(home: Path) -> Iterator[Run]:
    """The runs whose images have owners and are there."""
    return (run for run in opened_runs(home) if run.config.partition.kind in KINDS and store_of(run))


def _has_archive_alone(run: Run) -> bool:
    """Say whether a run is of an archive, and its decoded copy may have another name: the archive is elsewhere now."""
    data = run.config.data
    return data.name == "folder" and not Path(data.root).expanduser().is_dir() and store_of(run) is None


def _delete_files(run: Run, clients: Collection[int]) -> tuple[int, list[dict[str, str]]]:
    """Delete the run's files that are named after one of the clients, as stored updates are.

    Returns:
        How many, and those that could not be deleted. A folder of such a name is nobody's update.
    """
    deleted, kept = 0, []
    for file in [file for client in clients for file in run.folder.rglob(f"*client-{client}.*")]:
        if file.is_dir() and not file.is_symlink():
            continue
        try:
            file.unlink()
            deleted += 1
        except OSError as error:
            kept.append({"what": str(file.relative_to(run.home)), "why": f"it cannot be deleted: {error.strerror}"})
    return deleted, kept


def _purge_portions(run: Run, request: Request, who: str) -> tuple[list[str], list[dict[str, str]]]:
    """Write down what is left of some of a client's images; the client has to delete the files."""
    deleted, kept = _looked_up_in_model(run, request)
    why = "the rest of the client's is needed: delete the files, and the copy is made anew without them"
    kept.append({"what": f"the images: {who}, in the decoded copy and at the source", "why": why})
    kept.append({"what": f"accuracies by round: {who}", "why": "audits compare with them"})
    run.ledger.keep_purge(request, deleted=deleted, kept=kept)
    return deleted, kept


def _looked_up_in_model(run: Run, request: Request) -> tuple[list[str], list[dict[str, str]]]:
    """What is gone of the model before the request, and what is left, as the files show it."""
    current = run.ledger.current()
    assert current is not None
    here, deleted = run.folder / "checkpoints", []
    kept = [{"what": "the events of the ledger, and receipts", "why": "they show what was asked and what was done"}]
    kept.append({"what": "the SHA-256 of the images, in run.json", "why": "a new run knows by it whom not to train"})
    others = sorted(file.name for file in here.iterdir() if file.name != current.checkpoint)
    if others:
        kept.append({"what": f"models beside the current one: {', '.join(others)}", "why": "they could not be deleted"})
    else:
        deleted.append(f"earlier models: checkpoints/ has {current.checkpoint} alone")
    tensors, _ = checkpoint.read_tensors(here / current.checkpoint, sha256=current.sha256)
    pruned = tensors[PRUNED]
    whole = [client for client in request.clients if client not in request.portions]
    if len(pruned) and whole and all(bool(pruned[client]) for client in whole):
        deleted.append("the output neurons of the clients: the model marks them as pruned")
        kept.append({"what": "the mark of pruned neurons", "why": "the model's output has the place of every client"})
    names = {kind: [n.removeprefix(p) for n in tensors if n.startswith(p)] for kind, p in checkpoint.BESIDE.items()}
    if all(int(round_) >= request.detail["round"] for round_ in names.pop("predictions")):
        deleted.append("predictions on held-out images of models before the request: there are none")
    kept += [
        {"what": BESIDE_IN_WORDS.get(kind, kind), "why": "training goes on with it"} for kind in names if names[kind]
    ]
    return deleted, kept


def keep_class_counts(run: Run, request: Request, class_counts: Mapping[str, list[int]]) -> None:
    """Keep how many images of each class the clients had: reports have need of it when the images are gone."""
    run.record(PURGE, round=request.detail["round"], request=request.id, class_counts=dict(class_counts))


def known_class_counts(run: Run, class_counts: np.ndarray | None) -> np.ndarray | None:
    """Give class counts with those that were kept when images were removed, zeros where figures were removed too.

    Of portions of clients no image was removed.
    """
    if class_counts is None:
        return None
    counts = class_counts.copy()
    counts[sorted(run.ledger.purged_clients())] = 0
    for row in run.metrics():
        if row["kind"] == PURGE:
            for client, own in row["class_counts"].items():
                counts[int(client)] = own
    return counts


def delete_figures(run: Run, clients: Collection[int]) -> None:
    """Write the metrics anew without the clients' own figures, and delete the report, which is made of them."""
    file, names = run.folder / "metrics.jsonl", set(map(str, clients))
    rows = [row for row in run.metrics() if row["kind"] != PURGE or not names & row["class_counts"].keys()]
    lines = [json.dumps(_without_figures(row, names)) for row in rows]
    write_atomically(file, "".join(f"{line}\n" for line in lines).encode())
    shutil.rmtree(run.folder / "report", ignore_errors=True)


def _without_figures(row: Any, clients: set[str]) -> Any:
    if not isinstance(row, dict):
        return row
    left = {name: _without_figures(value, clients) for name, value in row.items()}
    for group in ("forgotten", "retain_clients"):
        if isinstance(left.get(group), dict):
            left[group] = {client: value for client, value in left[group].items() if client not in clients}
    return left


def check_purgeable(run: Run, clients: Collection[int]) -> list[Request]:
    """Give the requests by which clients were forgotten.

    Raises:
        UserError: one of them was not, or not completely yet; or together with a client that is not named.
    """
    requests = [r for r in run.ledger.requests() if r.state in FORGOTTEN and set(r.clients) & set(clients)]
    forgotten = {client for request in requests if request.state == State.COMPLETED for client in request.clients}
    if missing := sorted(set(clients) - forgotten):
        ask, are = forget_command(missing, run.config.partition.names, run.folder), "are" if len(missing) > 1 else "is"
        raise UserError(f"{run.named(missing)} {are} not forgotten in run {run.name}: {ask}")
    for request in requests:
        if others := sorted(set(request.clients) - set(clients)):
            together = f"request {request.id} was about {run.named(request.clients)} together"
            raise UserError(f"{together}: name {run.named(others)} too")
    return requests
