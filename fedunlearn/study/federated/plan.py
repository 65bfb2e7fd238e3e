"""The steps of a federated study."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from fedunlearn.apps.registry import STRATEGIES, strategy_of
from fedunlearn.study.dag.steps import Step
from fedunlearn.study.federated.runs import Start, federate
from fedunlearn.study.federated.settings import Settings, what
from fedunlearn.study.pooled.laboratory import Laboratory
from fedunlearn.study.pooled.settings import PIPELINES


@dataclass(frozen=True)
class Case:
    """Requests that come while training goes on: clients by rounds after the first request, which comes at `round`."""

    scenario: str
    round: int
    requests: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def name(self) -> str:
        """Part of steps' names: `at60/0`, `at60/0+1` at once, `at60/0,1,2` one after another."""
        return f"at{self.round}/" + ",".join("+".join(map(str, clients)) for _, clients in self.requests)

    def schedule(self) -> dict[int, list[int]]:
        """Round -> clients."""
        return {self.round + offset: list(clients) for offset, clients in self.requests}

    def left(self, offset: int) -> tuple[int, ...]:
        """Who has left by then."""
        return tuple(client for at, clients in self.requests if at <= offset for client in clients)

    @property
    def last(self) -> int:
        """Rounds between the first and the last request."""
        return self.requests[-1][0]


class Plan:
    """The steps of a federated study; each method gives the step that makes what it is named after."""

    def __init__(self, settings: Settings, lab: Laboratory) -> None:
        self.settings, self.lab = settings, lab
        self.images = len(lab.dataset.train.labels)

    def steps(self) -> list[Step]:
        """All steps of the wanted stages whose names match `study.only`; needs come before what needs them."""
        study = self.settings.study
        return [step for step in self.everything(study.stages) if fnmatchcase(step.name, study.only)]

    def everything(self, stages: Sequence[str] = ("train", "gold", "forget")) -> list[Step]:
        """All steps of the stages."""
        steps: list[Step] = []
        for pipeline, seed in self.each():
            if "train" in stages:
                steps.append(self.base(pipeline, seed))
            for case in self.cases():
                if "gold" in stages:
                    steps += [self.gold(pipeline, left, seed) for left in self.prefixes(case)]
                if "forget" in stages:
                    steps += [self.forget(name, pipeline, case, seed) for name in self.settings.study.strategies]
        return list({step.key: step for step in steps}.values())

    def cases(self) -> list[Case]:
        """What is asked for, in the order of the settings' scenarios."""
        study, end = self.settings.study, self.settings.rounds
        first, two = (0, tuple(study.order[:1])), (0, tuple(study.order[:2]))
        chain = tuple((study.apart * place, (client,)) for place, client in enumerate(study.order))
        made = {
            "single": [Case("single", end, (first,))],
            "moments": [Case("moments", round_, (first,)) for round_ in self.moments()[:-1]],
            "sequential": [Case("sequential", end, chain)],
            "together": [Case("together", end, (two,))],
            "everyone": [Case("everyone", end, ((0, (client,)),)) for client in range(self.settings.clients)],
        }
        return [case for scenario in study.scenarios for case in made[scenario]]

    def moments(self) -> list[int]:
        """The rounds after which a first request may come, the last among them."""
        end = self.settings.rounds
        return sorted({max(1, round(share * end)) for share in self.settings.study.moments} | {end})

    def prefixes(self, case: Case) -> list[tuple[int, ...]]:
        """Everybody who has left after each of its requests."""
        return [case.left(offset) for offset, _ in case.requests]

    def each(self) -> list[tuple[str, int]]:
        """Pipelines and seeds."""
        chosen = [pipeline for pipeline in PIPELINES if pipeline in self.settings.study.pipelines]
        return [(pipeline, seed) for seed in self.settings.study.seeds for pipeline in chosen]

    def base(self, pipeline: str, seed: int) -> Step:
        """The run of all clients; it stores what FedEraser needs, where that takes part."""
        strategy = "federaser" if "federaser" in self.settings.study.strategies else "leave"
        work = partial(
            federate, pipeline=pipeline, strategy=strategy, seed=seed, rounds=self.settings.rounds, requests={},
            measured=[], kept=self.moments(),
        )  # fmt: skip
        every = self.settings.unlearn.every if strategy == "federaser" else 0
        settings = {"kept": self.moments(), "every": every}
        return self._step(f"base/{pipeline}/seed{seed}", settings, [], work, self.settings.rounds)

    def gold(self, pipeline: str, left: tuple[int, ...], seed: int) -> Step:
        """The run that those who left never took part in."""
        measured = self._measured(left)
        work = partial(
            federate,
            pipeline=pipeline,
            strategy="leave",
            seed=seed,
            rounds=measured[-1],
            requests={0: left},
            measured=measured,
        )
        name = f"gold/{pipeline}/{'-'.join(map(str, left))}/seed{seed}"
        return self._step(name, {"left": left, "measured": measured}, [], work, measured[-1])

    def forget(self, strategy: str, pipeline: str, case: Case, seed: int) -> Step:
        """A strategy's run from the base on."""
        after = self.settings.study.after
        measured = sorted({case.round + offset + k for offset, _ in case.requests for k in after})
        rounds, base = case.round + case.last + max(after), self.base(pipeline, seed)
        work = partial(
            federate, pipeline=pipeline, strategy=strategy, seed=seed, rounds=rounds, requests=case.schedule(),
            measured=measured, start=Start(base, case.round),
        )  # fmt: skip
        made = strategy_of(strategy)
        read = {name: getattr(self.settings.unlearn, name) for name in sorted(made.reads)}
        settings = {"unlearn": read, "requests": case.requests, "measured": measured}
        if strategy not in STRATEGIES:
            settings["source"] = hashlib.sha256(Path(inspect.getfile(made)).read_bytes()).hexdigest()
        name = f"forget/{strategy}/{pipeline}/{case.name}/seed{seed}"
        return self._step(name, settings, [base], work, rounds - case.round)

    def _measured(self, left: tuple[int, ...]) -> list[int]:
        """The rounds at which this gold model may be compared with something, whatever the scenarios."""
        study, end = self.settings.study, self.settings.rounds
        begun = {end}
        if left == tuple(study.order[:1]):
            begun |= set(self.moments())
        elif left == tuple(study.order[: len(left)]):
            begun.add(end + study.apart * (len(left) - 1))
        return sorted({round_ + k for round_ in begun for k in study.after})

    def _step(self, name: str, settings: Mapping, needs: list[Step], work: Callable, rounds: int) -> Step:
        about = {**what(self.settings), "data": self.lab.dataset.fingerprint, **settings}
        return Step(name, about, tuple(needs), partial(work, self.lab), rounds * self.images)
