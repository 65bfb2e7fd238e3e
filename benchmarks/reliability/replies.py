"""One bad reply of one client of four, in one message of one round or request: what becomes of the run.

Digits, 600 images, width 8, four clients on four nodes. One base run of 12 rounds is made. Every case goes on from it:
with one more round, or with a request for client 0 by each installed strategy. A request is tried once
(`forget.attempts=1`), with the budget that harm is measured by (`forget.budget=0.1`). Every message that the
undisturbed run sends to client 1 or to client 0 is a place for damage, found by recording it. A client task is tried
with all kinds of damage once. Other strategies, and other clients, get those that leave a reply in the expected form.

Nothing of a reply counts that is refused when it is read. So a case that is refused there has the outcome of an error
reply in the same place, which is run. All others are run.

Outcomes, beside the undisturbed run from the same base, the worst that applies:

- run ends: with an exception, though three honest clients are there.
- harmful: a weight is not finite, or accuracy on held-out images or on the honest clients' is lower by more than 0.1,
  also than where the liar is silent.
- false figures: NaN, infinity, or accuracies outside 0..1 in `metrics.jsonl` or in what the request says.
- neutralised: COMPLETED, and the accuracy of client 0 has lost less than half of what the undisturbed request takes.
- innocents named: the log names an honest client as the sender of something that was refused.
- nobody named: the request is set aside, and nobody is named.
- liar named: the reply is refused with its sender's name. The round or request goes on, or the request is set aside.
- harmless: none of these. A plausible lie about oneself is among them.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Message

from benchmarks import timing
from benchmarks.reliability.array_damages import Damage
from benchmarks.reliability.bench import TRAINING, Bench
from benchmarks.reliability.damages import damages_of, is_believable
from benchmarks.reliability.federation import CLIENTS, FORGET, LIAR, BadReplyGrid, Site, damaged
from benchmarks.reliability.outcomes import WORST_FIRST, Found, Model, outcome
from benchmarks.reliability.stock import has_counterpart, stock_found
from fedunlearn.federation import messages
from fedunlearn.federation.replies import Expected, introduction
from fedunlearn.federation.strategy import strategy_class, strategy_names
from fedunlearn.federation.tasks import ClientTask, tasks_of
from fedunlearn.log import set_up
from fedunlearn.runs.ledger import State

ERROR = "error of one line"
REPLAYING = ("federaser", "retrain")  # strategies that train whole runs again: only the last reply of a task is bad


class Case(NamedTuple):
    """One bad reply."""

    scenario: str
    site: Site
    damage: str

    @property
    def key(self) -> str:
        """Give it in words, under which its result is kept."""
        return f"{self.scenario} {self.site.task} {self.site.client} {self.site.number} {self.damage}"


def scenarios() -> list[str]:
    """List a round of training, and a request by each strategy that is installed."""
    return [TRAINING, "subset", *(name for name in strategy_names() if name != "subset")]


def beside_stock(bench: Bench, grid: BadReplyGrid, rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Count outcomes of bad replies to `train` in a round, ours beside those of stock FedAvg."""
    site = Site("train", LIAR, 0)
    damages = damages_of(grid.sent[site][1])
    undisturbed, found = stock_found(bench.examiner, grid, site, None), {}
    silent = stock_found(bench.examiner, grid, site, lambda reply: None)
    for name in filter(has_counterpart, damages):
        one = stock_found(bench.examiner, grid, site, damages[name])
        found[name] = outcome(one, undisturbed, bench.before, without=silent.model, liar=LIAR, forget=FORGET)
        print(f"stock FedAvg: {found[name]:12} {name}  {one.ended[:100]}", flush=True)
    ours = Counter(row["outcome"] for row in rows if row["damage"] in found and _is_at(row, site))
    return [
        ["stock FedAvg", len(found), *(Counter(found.values())[kind] for kind in WORST_FIRST[::-1])],
        ["fedunlearn", sum(ours.values()), *(ours[kind] for kind in WORST_FIRST[::-1])],
    ]


def _is_at(row: dict[str, Any], site: Site) -> bool:
    return (row["scenario"], row["task"], row["client"]) == (TRAINING, site.task, site.client)


def is_refused_at_reading(bench: Bench, task: ClientTask | None, message: Message, reply: Message | None) -> bool:
    """Say whether a reply is refused when it is read, so that nothing else of it counts."""
    if reply is None:
        return False
    try:
        if task is None:
            introduction(reply, CLIENTS)
        else:
            variances = messages.unpack(message, only="running_var")
            Expected(task, bench.model, "fp32", bench.examples, bench.pixels, variances).read(reply, message)
    except ValueError:
        return True
    return False


def cases(scenario: str, grid: BadReplyGrid, tried: set[str]) -> Iterator[tuple[Case, Damage]]:
    """Give the cases of a scenario; `tried` are tasks that have had every damage."""
    for site in _sites(scenario, grid.sent):
        everything = site.task not in tried
        tried.add(site.task)
        for name, damage in damages_of(grid.sent[site][1]).items():
            if everything or is_believable(name):
                yield Case(scenario, site, name), damage


def _sites(scenario: str, sent: Iterable[Site]) -> list[Site]:
    """Choose the first message of each task to the liar and to the forget client, and the last of some."""
    last = {(site.task, site.client): site for site in sent}
    wanted = [(task, client) for task, client in last if client == LIAR or (client == FORGET and scenario != TRAINING)]
    places = []
    for task, client in wanted:
        if scenario != TRAINING and task == "identify":
            continue
        first = Site(task, client, 0)
        ends = [last[task, client]] if scenario in REPLAYING else [first, last[task, client]]
        places += [site for site in dict.fromkeys(ends) if site.number == 0 or task == "evaluate" or len(ends) == 1]
    return places


def measure(home: Path, file: Path, wanted: list[str]) -> list[dict[str, Any]]:
    """Run all cases that `file` does not have yet, and give the rows of all."""
    set_up()
    bench, tried = Bench(home), set[str]()
    kept = {row["key"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    print(f"the base: {bench.before}", flush=True)
    rows = []
    for scenario in wanted:
        if scenario != TRAINING and not tried:
            tried |= {"train", "batch_norm_statistics", "evaluate"}  # another call tries them
        bench.forget_replies()
        grid = bench.grid()
        undisturbed = bench.found(scenario, grid)
        print(f"{scenario}, undisturbed: {undisturbed}", flush=True)
        silent: dict[Site, Model | None] = {}
        known = tasks_of(strategy_class("leave" if scenario == TRAINING else scenario))
        refused: dict[Site, dict[str, Any]] = {}  # by place, the row of an error reply, which is run
        for case, damage in cases(scenario, grid, tried):
            if case.key not in kept:
                message, honest = grid.sent[case.site]
                reply = damaged(message, honest, damage)
                if case.site in refused and is_refused_at_reading(bench, known.get(case.site.task), message, reply):
                    row = refused[case.site] | {"key": case.key, "damage": case.damage, "run": False}
                else:
                    if case.site not in silent:
                        silent[case.site] = bench.found(scenario, bench.grid(case.site, lambda reply: None)).model
                    row = _row(bench, case, damage, undisturbed, silent[case.site])
                with file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                kept[case.key] = row
                print(f"{row['run']!s:6} {row['outcome']:16} {case.key}  {row['why']}", flush=True)
            rows.append(kept[case.key])
            if case.damage == ERROR and rows[-1]["outcome"] == "liar named":
                refused[case.site] = rows[-1]
        if scenario == TRAINING:
            table = beside_stock(bench, grid, rows)
            timing.table("the replies to `train` that FedAvg has the like of", ("", "n", *WORST_FIRST[::-1]), table)
    return rows


def _row(bench: Bench, case: Case, damage: Damage, undisturbed: Found, silent: Model | None) -> dict[str, Any]:
    started = time.perf_counter()
    found = bench.found(case.scenario, bench.grid(case.site, damage))
    why = found.ended or "; ".join(found.impossible[:2]) or found.reason
    return {
        "key": case.key,
        "scenario": case.scenario,
        "task": case.site.task,
        "client": case.site.client,
        "damage": case.damage,
        "outcome": outcome(found, undisturbed, bench.before, without=silent, liar=case.site.client, forget=FORGET),
        "set_aside": found.state == State.QUARANTINED != undisturbed.state,
        "test": found.model.test if found.model else None,
        "clients": found.model.clients if found.model else None,
        "named": sorted(found.named),
        "why": why[:200],
        "run": True,
        "seconds": time.perf_counter() - started,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, a row for each message."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        role = "forget" if row["client"] == FORGET else "retain"
        groups.setdefault(f"{row['task']}, {role}", []).append(row)
    table = [_counted(name, found) for name, found in sorted(groups.items())] + [_counted("all", rows)]
    columns = ("message", "strategies", "n", *WORST_FIRST[::-1], "request set aside")
    run = sum(row["run"] for row in rows)
    timing.table(f"{len(rows)} bad replies, {run} of them run to the end", columns, table)
    never = {task for name in strategy_names() for task in tasks_of(strategy_class(name))} - {r["task"] for r in rows}
    print(f"client tasks that nobody was asked for: {', '.join(sorted(never)) or 'none'}")
    for row in rows:
        if row["outcome"] not in ("liar named", "harmless"):
            print(f"{row['outcome']:16} {row['key']}  {row['why']}")


def _counted(name: str, rows: list[dict[str, Any]]) -> list[Any]:
    by_outcome = Counter(row["outcome"] for row in rows)
    strategies = len({row["scenario"] for row in rows} - {TRAINING})
    aside = sum(row["set_aside"] for row in rows)
    return [name, strategies, len(rows), *(by_outcome[kind] for kind in WORST_FIRST[::-1]), aside]
