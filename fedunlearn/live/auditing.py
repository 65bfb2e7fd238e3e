"""A run beside models that are retrained without the clients that it has forgotten."""

import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedunlearn.config import Config
from fedunlearn.errors import UserError
from fedunlearn.live.background import Background, Lines, followed, screen
from fedunlearn.live.base import BUSY, Handle, RunState
from fedunlearn.live.cards import card
from fedunlearn.live.frames import frame, scores_of
from fedunlearn.live.words import words_of
from fedunlearn.runs.formats import duration
from fedunlearn.runs.home import OPERATIONAL, RETRAINED, file_first, is_finished
from fedunlearn.runs.ledger import FORGOTTEN
from fedunlearn.runs.run import Run
from fedunlearn.runs.verdicts import Level, Verdict

if TYPE_CHECKING:
    from pandas import DataFrame

OURS = "this run"
IMAGES = 2000  # of retain clients that membership inference is trained on, at most


@dataclass(frozen=True)
class Audit:
    """What a comparison with retrained models found.

    Attributes:
        run: name of the run.
        verdicts: one a request that was applied, about the last round.
        table: a row a model, this run's first: accuracies, memorisation gap, and membership inference (MIA) accuracy.
        retrained: names of the retrained runs, which `fedunlearn.open_run` opens.
    """

    run: str
    verdicts: tuple[Verdict, ...]
    table: "DataFrame"
    retrained: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The verdict in a few words, such as `Like the retrained model`; of several the one to look at first."""
        return self._first.title

    @property
    def text(self) -> str:
        """The same in sentences, with the numbers."""
        return " ".join(verdict.text for verdict in self.verdicts)

    @property
    def _first(self) -> Verdict:
        return min(self.verdicts, key=lambda verdict: verdict.level == Level.GOOD)

    def __repr__(self) -> str:
        return f"Audit({self.verdict}: {self.text})\n{self.table.round(3).to_string()}"

    def _repr_html_(self) -> str:
        table = self.table.to_html(float_format=lambda value: f"{value:.3f}", border=0)
        title = f"Run {self.run} beside {_models(len(self.retrained))}"
        return card(title, self.verdict, [("", self.text)], level=self._first.level, table=table)


def audit(live: Handle, retrained: int) -> Audit:
    """Do what `fedunlearn.LiveRun.audit` promises."""
    if retrained < 1:
        raise UserError(f"retrained={retrained} is too few: there is nothing to compare with")
    if live.state in BUSY:
        raise UserError(f"run {live.name} is {live.state}: wait() for it, and audit it then")
    if live.state != RunState.FINISHED:
        raise UserError(f"run {live.name} is {live.state} after round {live.round}: rounds are missing")
    with live.opened() as ours:
        forgotten = ours.ledger.clients_in(FORGOTTEN)
        if not forgotten:
            raise UserError(f"run {live.name} has forgotten nobody: there is nothing to audit")
        check_images(ours, forgotten)
        plans = [plan_of(ours, forgotten, number) for number in range(1, retrained + 1)]
        handles = [Handle(_name_of(ours, plan), live.home, live.resources) for plan in plans]
        missing = [pair for pair in zip(handles, plans, strict=True) if not _is_done(pair[0])]
        if missing:
            _say(announcement(ours, forgotten, len(missing)))
        for number, (handle, plan) in enumerate(missing, start=1):
            without_portions(ours, handle)
            train(handle, plan, f"retrained model {number} of {len(missing)}: ")
        with _all_opened(handles) as others:
            return compared(ours, others, forgotten)


def plan_of(run: Run, forgotten: Sequence[int], number: int) -> Config:
    """Give the settings of a retrained model: the run's, with another seed, and without the forgotten clients.

    Portions of clients are no settings (`runs.home.file_first`).
    """
    config, whole = run.config, [client for client in forgotten if client < run.config.clients]
    forget = config.forget.model_copy(
        update={"schedule": {0: whole} if whole else {}, "purge": "never", "signed": False, "keys": {}}
    )
    others = {"run": "", "home": "", "fork": "", "seed": config.seed + number, "strategy": "leave", "unlearn": {}}
    return config.model_copy(update={**others, "forget": forget})


def without_portions(run: Run, retrained: Handle) -> None:
    """Ask a retrained run that has not begun for what the run has forgotten, in its order, if there are portions."""
    portions, clients = run.ledger.portions(FORGOTTEN), run.config.clients
    if not portions or (retrained.folder / "run.json").exists():
        return
    for request in run.ledger.requests():
        if request.state in FORGOTTEN:
            for portion in map(portions.__getitem__, request.along):
                file_first(retrained.folder, [portion.client], portion.selection, clients=clients)
            all_clients = request.detail.get("all_clients", False)
            file_first(retrained.folder, request.owners, request.selection, clients=clients, all_clients=all_clients)


def check_images(run: Run, forgotten: Sequence[int]) -> None:
    """Raise UserError where nobody can measure what a model knows of forgotten clients any more."""
    from fedunlearn.federation.auditor import needed_auditor

    auditor = needed_auditor(run.config_here())
    portions, examples = run.ledger.portions(FORGOTTEN), run.ledger.examples()
    had_some = [number for number in forgotten if examples.get(number, 1)]
    gone = [number for number in had_some if not auditor.has_images(number, portions)]
    if gone:
        raise UserError(
            f"the images of {run.named(gone)} are gone (forget.purge): what a model knows of them cannot be measured"
        )


def announcement(run: Run, forgotten: Sequence[int], count: int) -> str:
    """Say what an audit is about to train, and about how long that takes, by the run's own seconds a round."""
    rounds = run.config.rounds
    each = [row["seconds"] for row in run.metrics() if row["kind"] == "round" and "seconds" in row]
    cost = f", about {duration(count * rounds * statistics.median(each))} of training in all" if each else ""
    return (
        f"{_models(count)} to train without {run.named(forgotten)}, {rounds} rounds each{cost}. "
        "They are kept: an audit that is interrupted goes on, and the next one finds them."
    )


def train(handle: Handle, plan: Config, title: str) -> None:
    """Train a retrained model, go on with it, or wait for the process of an earlier audit that does."""
    process = None
    if handle.state not in BUSY:
        app = "digits" if plan.scale == "auto" else "cifar10"  # all settings are named: an app says which scales it has
        words = words_of(by_names(settings_of(plan)) | {"run": handle.name, "home": handle.home})
        process = Background.started(["run", app, *words, *handle.resources.options()], handle.log)
    followed(
        lambda: process.is_working if process else handle.state in BUSY,
        Lines(handle.log, process.begins if process else 0, title),
        interrupted=f"run {handle.name} goes on in the background: the same audit finds it",
    )
    if not _is_done(handle):
        reason = process.reason() if process else f"it is {handle.state}"
        raise UserError(f"run {handle.name} failed: {reason} (log: {handle.log})")


def settings_of(plan: Config) -> dict[str, Any]:
    """Give every setting of a retrained model by name, without those that say which run it is or change no result."""
    return plan.model_dump(
        exclude={"run", "home", "fork", *OPERATIONAL} | ({"scale"} if plan.scale == "auto" else set())
    )


def by_names(values: dict[str, Any]) -> dict[str, Any]:
    """Give settings with clients called as people call them, who may have names that are numbers.

    Args:
        values: settings as a run keeps them, where clients are numbers.
    """
    names = values["partition"].get("names")
    if not names:
        return values
    schedule = {round_: [names[c] for c in clients] for round_, clients in values["forget"]["schedule"].items()}
    readmit = [names[client] for client in values["readmit"]]
    return values | {"forget": values["forget"] | {"schedule": schedule}, "readmit": readmit}


def compared(ours: Run, retrained: Sequence[Run], forgotten: Sequence[int]) -> Audit:
    """Compare a run with retrained ones, all of them finished."""
    from fedunlearn.runs.report import comparison

    verdicts = comparison(ours, retrained)
    if not verdicts:
        raise UserError(f"run {ours.name} was not measured after its last request: there is nothing to compare")
    names = [OURS, *(f"retrained, seed {other.config.seed}" for other in retrained)]
    runs = [ours, *retrained]
    attacks = mia_accuracies(runs, forgotten)
    rows = [
        {"model": name, **scores_of(_latest(run)), "mia_accuracy": attack}
        for name, run, attack in zip(names, runs, attacks, strict=True)
    ]
    return Audit(ours.name, tuple(verdicts), frame(rows, index="model"), tuple(other.name for other in retrained))


def mia_accuracies(runs: Sequence[Run], forgotten: Sequence[int]) -> list[float]:
    """Give each model's membership inference accuracy, 0..1: forgotten clients' images against retain clients'.

    It is NaN where there are too few images.
    """
    from fedunlearn.audit.membership_inference import logistic_mia
    from fedunlearn.federation.auditor import needed_auditor

    auditor, portions = needed_auditor(runs[0].config_here()), runs[0].ledger.portions(FORGOTTEN)
    retain = [client for client in range(runs[0].config.clients) if client not in forgotten]
    found = []
    for run in runs:
        params = run.model().state_dict()
        both = [auditor.predictions(params, clients, most=IMAGES, portions=portions) for clients in (retain, forgotten)]
        probs = [predictions.features() for predictions in both]
        try:
            found.append(logistic_mia(*(each.nan_to_num().numpy() for each in probs)) / 100)
        except ValueError:
            found.append(float("nan"))
    return found


def _latest(run: Run) -> dict[str, Any]:
    """The scores of a run's present model: of its last round, or of a request that was completed after that."""
    found: dict[str, Any] = {}
    last = -1
    for row in run.metrics():
        if row["kind"] == "forget" and row["completed_round"] >= last:
            found, last = row["after"], row["completed_round"]
        elif row["kind"] == "round" and "test" in row and row["round"] > last:
            found, last = row, row["round"]
    return found


def _name_of(run: Run, plan: Config) -> str:
    """Name a retrained run by its settings and its data, so that it is found again."""
    forgotten = {str(client) for client in plan.forget.schedule.get(0, [])}
    data = {name: sha256 for name, sha256 in run.about()["data"].items() if name not in forgotten}
    portions = {number: portion.content() for number, portion in run.ledger.portions(FORGOTTEN).items()}
    content = json.dumps([settings_of(plan), data, *([portions] if portions else [])], sort_keys=True)
    return f"{RETRAINED}{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _is_done(handle: Handle) -> bool:
    return (handle.folder / "run.json").exists() and is_finished(handle.folder)


@contextmanager
def _all_opened(handles: Sequence[Handle]) -> Iterator[list[Run]]:
    with ExitStack() as stack:
        yield [stack.enter_context(handle.opened()) for handle in handles]


def _models(count: int) -> str:
    return f"{count} retrained model{'s' * (count > 1)}"


def _say(text: str) -> None:
    print(text, file=screen(), flush=True)
