"""The tasks of a federated study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedunlearn.federation.strategy import source_of, strategy_class
from fedunlearn.runs.files import sha256_of
from fedunlearn.study.dag.settings import PIPELINES, Pipeline, defaults_of
from fedunlearn.study.dag.tasks import Task, TaskContext
from fedunlearn.study.federated.runs import FederatedRun, Start, federate
from fedunlearn.study.federated.settings import STAGES, FederatedSettings, identity_of, keepers
from fedunlearn.study.pooled.workspace import Workspace

NOTHING_ELSE = "leave"  # the strategy of runs in which nothing is done about a request but pruning


@dataclass(frozen=True)
class Case:
    """Requests that come while training goes on: clients by rounds after the first request, which comes at `round`."""

    scenario: str
    round: int
    requests: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def name(self) -> str:
        """Part of tasks' names: `at60/0`, `at60/0+1` at once, `at60/0,1,2` one after another."""
        return f"at{self.round}/" + ",".join("+".join(map(str, clients)) for _, clients in self.requests)

    def schedule(self) -> dict[int, list[int]]:
        """Give the clients of the requests by round."""
        return {self.round + offset: list(clients) for offset, clients in self.requests}

    def forgotten(self, offset: int) -> tuple[int, ...]:
        """Give the clients that are forgotten by then, in the order of the requests."""
        return tuple(client for at, clients in self.requests if at <= offset for client in clients)

    @property
    def last(self) -> int:
        """Rounds between the first and the last request."""
        return self.requests[-1][0]


class Plan:
    """The tasks of a federated study; each method gives the task that makes what it is named after."""

    def __init__(self, settings: FederatedSettings, workspace: Workspace) -> None:
        self.settings, self.workspace = settings, workspace
        self.images = len(workspace.dataset.train.labels)

    def tasks(self, stages: Sequence[str] = STAGES) -> list[Task]:
        """Give all tasks of the stages; needs come before what needs them."""
        tasks: list[Task] = []
        for pipeline, seed in self.each():
            if "train" in stages:
                tasks.append(self.base(pipeline, seed))
            for case in self.cases():
                if "retrain" in stages:
                    seeds = [seed, *self.settings.study.retrained_seeds]
                    tasks += [self.retrained(pipeline, case.forgotten(at), s) for s in seeds for at, _ in case.requests]
                if "forget" in stages:
                    tasks += [self.forget(name, pipeline, case, seed) for name in self.settings.study.strategies]
        return list({task.key: task for task in tasks}.values())

    def cases(self) -> list[Case]:
        """Give what is asked for, in the order of the settings' scenarios."""
        study, end = self.settings.study, self.settings.rounds
        first, two = (0, tuple(study.order[:1])), (0, tuple(study.order[:2]))
        chain = tuple((study.apart * place, (client,)) for place, client in enumerate(study.order))
        made = {
            "single": [Case("single", end, (first,))],
            "request_times": [Case("request_times", round_, (first,)) for round_ in self.request_rounds()[:-1]],
            "sequential": [Case("sequential", end, chain)],
            "together": [Case("together", end, (two,))],
            "everyone": [Case("everyone", end, ((0, (client,)),)) for client in range(self.settings.clients)],
        }
        return [case for scenario in study.scenarios for case in made[scenario]]

    def request_rounds(self) -> list[int]:
        """Give the rounds after which a first request may come, the last among them."""
        end = self.settings.rounds
        return sorted({max(1, round(time * end)) for time in self.settings.study.request_times} | {end})

    def each(self) -> list[tuple[Pipeline, int]]:
        """Give pipelines and seeds."""
        chosen: list[Pipeline] = [pipeline for pipeline in PIPELINES if pipeline in self.settings.study.pipelines]
        return [(pipeline, seed) for seed in self.settings.study.seeds for pipeline in chosen]

    def base(self, pipeline: Pipeline, seed: int) -> Task:
        """Give the task of the run of all clients.

        A strategy that takes something along from it is the one that it is trained under.
        """
        strategy = [*keepers(self.settings), NOTHING_ELSE][0]
        kept = self.request_rounds()
        config = self.settings.config(pipeline, strategy, seed)
        planned = FederatedRun(config, self.settings.rounds, requests={}, kept=kept)
        settings = {"kept": kept, "strategy": strategy, **self._of_strategy(strategy)}
        return self._task(f"base/{pipeline}/seed{seed}", settings, planned, self.settings.rounds)

    def retrained(self, pipeline: Pipeline, forgotten: tuple[int, ...], seed: int) -> Task:
        """Give the task of the run in which the clients never take part."""
        measured = self._measured(forgotten)
        config = self.settings.config(pipeline, NOTHING_ELSE, seed)
        planned = FederatedRun(config, measured[-1], requests={0: forgotten}, measured=measured)
        name = f"retrained/{pipeline}/{'-'.join(map(str, forgotten))}/seed{seed}"
        return self._task(name, {"forgotten": forgotten, "measured": measured}, planned, measured[-1])

    def forget(self, strategy: str, pipeline: Pipeline, case: Case, seed: int) -> Task:
        """Give the task of a strategy's run, from the base on."""
        after = self.settings.study.after
        measured = sorted({case.round + offset + k for offset, _ in case.requests for k in after})
        rounds, base = case.round + case.last + max(after), self.base(pipeline, seed)
        config = self.settings.config(pipeline, strategy, seed)
        start = Start(base, case.round)
        planned = FederatedRun(config, rounds, requests=case.schedule(), measured=measured, start=start)
        settings = {**self._of_strategy(strategy), "requests": case.requests, "measured": measured}
        name = f"forget/{strategy}/{pipeline}/{case.name}/seed{seed}"
        return self._task(name, settings, planned, rounds - case.round)

    def _of_strategy(self, strategy: str) -> dict[str, Any]:
        """Give what a run depends on because of its strategy; of one that is not installed, its source too."""
        settings: dict[str, Any] = {
            "unlearn": self.settings.of_strategy(strategy).model_dump(),
            "mirror": self.settings.data.mirror,
        }
        source = source_of(strategy)
        return settings | ({"source": sha256_of(source)} if source else {})

    def _measured(self, forgotten: tuple[int, ...]) -> list[int]:
        """Give the rounds at which this retrained model may be compared with something, whatever the scenarios."""
        study, end = self.settings.study, self.settings.rounds
        begun = {end}
        if forgotten == tuple(study.order[:1]):
            begun |= set(self.request_rounds())
        elif forgotten == tuple(study.order[: len(forgotten)]):
            begun.add(end + study.apart * (len(forgotten) - 1))
        return sorted({round_ + k for round_ in begun for k in study.after})

    def _task(self, name: str, settings: Mapping[str, Any], planned: FederatedRun, rounds: int) -> Task:
        def work(context: TaskContext) -> dict[str, Any]:
            return federate(self.workspace, context, planned)

        about = {**identity_of(self.settings), "data": self.workspace.dataset.fingerprint, **settings}
        needs = (planned.start.base,) if planned.start else ()
        defaults = defaults_of(FederatedSettings) | {
            "unlearn": defaults_of(strategy_class(planned.config.strategy).Settings)
        }
        return Task(name, about, needs, work, rounds * self.images, defaults)
