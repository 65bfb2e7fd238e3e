"""Asking a run to forget clients: what is said and checked before, and who applies the request."""

from collections.abc import Mapping
from logging import getLogger
from typing import Any

from fedunlearn.apps.signals import stopped_by_signals
from fedunlearn.apps.simulate import Resources, simulate
from fedunlearn.data.selection import Selection
from fedunlearn.runs.door import CLOSING_SECONDS, RequestHandle
from fedunlearn.runs.home import check_data, tidy
from fedunlearn.runs.ledger import OPEN, Request
from fedunlearn.runs.lock import LockedError, lock
from fedunlearn.runs.run import Run, last_round
from fedunlearn.runs.signed import SignedRequest

log = getLogger("fedunlearn")

ON_NODES = "the run is not live, and its clients have machines of their own: the request is filed"

# what applies a request imports torch when it is called: who only files one must not wait for it


def announcement(found: Run, clients: list[int], how: Mapping[str, Any], selection: Selection | None = None) -> str:
    """Say which run is about to be asked to forget whom.

    Args:
        found: the run.
        clients: whose images are meant.
        how: settings that are others than the run's.
        selection: which of the images; all by default.
    """
    images = {} if selection else images_of(found)
    who = [found.named([c]) + (f" ({images[c]} images)" if c in images else "") for c in clients]
    if selection:
        who = ["all clients" if clients == found.meant([], selection) else found.named(clients)]
    state, config = "live" if found.is_live() else "idle", found.config.model_copy(update=how)
    what = f"{selection.in_words(found.class_names())} of " if selection else ""
    return (
        f"run {found.name} ({config.data.name}, strategy={config.strategy}, {state}, after round "
        f"{last_round(found.folder)} of {config.rounds}) is to forget {what}{', '.join(who)}"
    )


def images_of(found: Run) -> dict[int, int]:
    """Give the number of training images by client, as far as the run's metrics know it."""
    known: dict[int, int] = {}
    for row in found.metrics():
        for kind in ("retain_clients", "forgotten"):
            known |= {int(client): scores["examples"] for client, scores in row.get(kind, {}).items()}
    return known


def check_strategy(found: Run, how: Mapping[str, Any]) -> None:
    """Raise UserError where there is not the strategy that a run's request is to be applied with."""
    from fedunlearn.federation.strategy import strategy_of

    strategy_of(found.config.model_copy(update=how))


def check_servable(found: Run) -> None:
    """Raise UserError where a run that is not live could not serve a request: then none is filed."""
    from fedunlearn.federation.auditor import auditor_of
    from fedunlearn.federation.server_data import check_own_code

    found.check_checkpoint()
    check_strategy(found, {})
    check_own_code(found.config_here())
    if auditor := auditor_of(found.config_here()):
        check_data(found, auditor.fingerprints())


def ask(
    found: Run,
    clients: list[int],
    resources: Resources,
    *,
    wait: bool,
    limit: float,
    verbose: bool,
    by: str = "",
    right: str = "",
    signed: SignedRequest | None = None,
    how: Mapping[str, Any] | None = None,
    selection: Selection | None = None,
) -> list[Request]:
    """File a request, and see to it that somebody applies it.

    Args:
        wait: follow a live run's request to its end, for `limit` seconds at most.
        by: who asks.
        right: by what right.
        signed: what the clients' key has signed.
        how: settings that are others for this request.
        selection: which of the clients' images are meant; all by default.

    Returns:
        The new request and earlier ones that cover some of the clients, as they stand then.

    Raises:
        TimeoutError: the run has not applied the request, or does not let go; it stays filed.
    """
    handle = found.file(clients, by=by, right=right, signed=signed, how=how, selection=selection)
    with stopped_by_signals(filed):
        see_to(found, handle, resources, wait=wait, limit=limit, verbose=verbose)
    return handle.requests()


def accept(found: Run, request_id: str, by: str, resources: Resources, *, limit: float, verbose: bool) -> Request:
    """Have a request applied once more, and its model taken although the gate has refused it.

    Where the same person has accepted it already and it is still open, as after a signal, the request goes on.

    Args:
        by: who answers for that; the receipt says it.

    Raises:
        UserError: there is no such request, or it is not one that the gate has set aside.
        TimeoutError: as for `ask`.
    """
    request = found.ledger.request(request_id)
    check_strategy(found, request.detail.get("how", {}))
    if not found.is_live():
        check_servable(found)
    if request.state not in OPEN or request.detail.get("accepted_by") != by:
        found.ledger.accept(request_id, by)
    handle = found.handle([request_id])
    with stopped_by_signals(filed):
        see_to(found, handle, resources, wait=True, limit=limit, verbose=verbose)
    return found.ledger.request(request_id)


def filed() -> str:
    """Say what goes on where a signal ends a command that has filed a request."""
    return "the request stays filed, and the same command goes on with it"


def see_to(found: Run, handle: RequestHandle, resources: Resources, *, wait: bool, limit: float, verbose: bool) -> None:
    """See to it that somebody applies a request that is filed; the rest as for `ask`."""

    def follow() -> None:
        log.info("waiting until run %s has applied the request, for %g s at most (--wait-limit)", found.name, limit)
        handle.follow(lambda request: log.info("request %s: %s", request.id, request.state), limit=limit)

    closing = (
        f"run {found.name} is held by a process that takes no request: waiting for it, {CLOSING_SECONDS} s at most"
    )
    if not handle.is_open:
        after_a_crash(found)
    elif handle.is_taken(on_wait=lambda: log.info(closing)):
        if wait:
            follow()
        else:
            log.info("run %s takes the request at its next round boundary", found.name)
    elif found.config.partition.is_on_nodes:
        log.info("%s, and applied when the run is started again (`flwr run`, with run=%s)", ON_NODES, found.name)
    else:
        log.info("the request is applied here, on %d virtual nodes", resources.nodes)
        try:
            serve(found, resources, verbose=verbose)
        except LockedError as error:
            if error.folder != found.folder:
                raise
            follow()  # another command came first, and serves all open requests


def after_a_crash(found: Run) -> None:
    """Do what a process had still to do that was killed after the end of a request, where nobody holds the run."""
    from fedunlearn.apps.server_app import conclude

    try:
        with lock(found.folder):
            tidy(found)
            conclude(found)
    except LockedError as error:
        if error.folder != found.folder:
            raise


def serve(found: Run, resources: Resources, *, verbose: bool) -> None:
    """Apply the open requests of a run that nobody holds."""
    from fedunlearn.apps import server_app

    config = found.config_here().model_copy(update={"run": found.name})
    simulate(
        lambda grid: server_app.serve(grid, config),
        resources,
        way_on=filed,
        verbose=verbose,
    )
