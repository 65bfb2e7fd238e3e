"""The settings of a federated study."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fedunlearn import config
from fedunlearn.config import (
    INF,
    SCALES,
    Config,
    Data,
    Forget,
    Loss,
    Model,
    Partition,
    Train,
    Unlearn,
    check_clients,
    choice,
    number,
    plain,
)
from fedunlearn.errors import UserError
from fedunlearn.study.pooled.settings import DATASETS, PIPELINES, check_lists, composed, several
from fedunlearn.study.pooled.training import Recipe

STAGES = ("train", "gold", "forget", "report")
STRATEGIES = tuple(name for name in config.STRATEGIES if name != "retrain")  # retraining is gold, and measured as such
TRACE = 5  # rounds between evaluations, and points of a curve
SCENARIOS = ("single", "moments", "sequential", "together", "everyone")


@dataclass
class Scope:
    """Which part of the study, and where."""

    name: str = plain("", "of the study's folder; empty: data set, scale and 'federated'")
    home: str = plain("", "state folder; empty takes $FEDUNLEARN_HOME or ~/.fedunlearn")
    stages: list[str] = several(list(STAGES), "what to do", STAGES)
    only: str = plain("*", "pattern of step names, such as forget/subset/*/seed0: do no others")
    pipelines: list[str] = several(["ce_dl"], "which", PIPELINES)
    strategies: list[str] = several(list(STRATEGIES), "which", (*STRATEGIES, config.OWN))
    scenarios: list[str] = several(
        ["single"], "requests: the first client of `order`; also at each of `moments`; one after another, or the first "
        "two at once; or each client", SCENARIOS,
    )  # fmt: skip
    order: list[int] = several([0, 1, 2], "clients in the order of their requests")
    moments: list[float] = several([0.25, 0.5, 0.75], "shares of the rounds after which a request comes, beside all")
    apart: int = number(10, 1, 10**6, "rounds between sequential requests")
    after: list[int] = several([0, 1, 3, 10, 30], "rounds after a request at which it is measured")
    seeds: list[int] = several([0], "repetitions: of weights, shuffling, augmentation")
    workers: int = number(0, 0, 1024, "processes at work; 0: one on a GPU, else one for every `train.threads` cores")
    minutes: float = number(INF, 0, INF, "after which to stop, at the end of a round; continue by running again")


@dataclass
class Settings:
    """Everything a federated study depends on."""

    federated: bool = True
    dataset: str = choice("cifar10", DATASETS, "whose preset to take; data.name can differ")
    scale: str = choice("auto", SCALES, "the paper's size, or one for two cores; auto is laptop without a GPU")
    clients: int = number(10, 2, 10**6, "clients")
    rounds: int = number(200, 1, 10**6, "of training; then comes the request, or the first of several in turn")
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    loss: Loss = field(default_factory=Loss)
    unlearn: Unlearn = field(default_factory=Unlearn)
    study: Scope = field(default_factory=Scope)

    @property
    def learning(self) -> Train:
        """What the laboratory calls so: precision and threads."""
        return self.train

    @property
    def targets(self) -> list[int]:
        """The clients that are forgotten, and attacked."""
        return list(range(self.clients)) if "everyone" in self.study.scenarios else self.study.order

    def recipe(self, pipeline: str) -> Recipe:
        """Pooled training that costs as much, to see how fast a machine is."""
        train, loss = asdict(self.train), asdict(self.loss)
        names = {f.name for f in fields(Recipe)} & train.keys()
        warmup = loss.pop("warmup")
        return Recipe(**{name: train[name] for name in names} | {"warmup": warmup, "loss": loss})

    def config(self, pipeline: str, strategy: str, seed: int) -> Config:
        """Of a federation's run."""
        loss = asdict(self.loss) | ({"disentangle_weight": 0.0} if pipeline == "ce" else {})
        model = asdict(self.model) | {"client_head": pipeline != "no_mtl"}
        return Config(
            home=self.study.home,
            strategy=strategy,
            seed=seed,
            clients=self.clients,
            rounds=self.rounds,
            evaluate_every=TRACE,
            data=self.data,
            partition=self.partition,
            model=Model(**model),
            train=self.train,
            loss=Loss(**loss),
            unlearn=self.unlearn,
            forget=Forget(),
        )


def load(words: Iterable[str]) -> Settings:
    """The federated preset of a data set and scale, with settings such as `rounds=20` on top.

    Raises:
        UserError: an unknown name, a value of the wrong type or out of range.
    """
    return check(composed(Settings, "fedunlearn.study.federated", words))


def check(chosen: Settings) -> Settings:
    """The settings themselves, where every value is in its range; UserError names the first that is not."""
    config.check_ranges(chosen)
    check_lists(chosen)
    study = chosen.study
    check_clients(study.order, chosen.clients)
    if len(set(study.order)) != len(study.order) or len(study.order) >= chosen.clients:
        raise UserError(f"study.order={study.order} names a client twice, or leaves none of {chosen.clients}")
    if not all(0 < moment <= 1 for moment in study.moments):
        raise UserError(f"study.moments={study.moments} are not shares in 0..1")
    if 0 not in study.after or min(study.after) < 0:
        raise UserError(f"study.after={study.after} are not rounds after a request, 0 among them")
    if chosen.unlearn.recovery_rounds:
        raise UserError("unlearn.recovery_rounds: a federated study measures `study.after` rounds after every request")
    if chosen.unlearn.head == "client" and "no_mtl" in study.pipelines:
        raise UserError("unlearn.head=client needs pipelines with a client head")
    return chosen


def what(settings: Settings) -> dict[str, Any]:
    """The settings that a run depends on, whatever is forgotten in it and how."""
    kept = ("clients", "rounds", "partition", "model", "train", "loss")
    return {name: value for name, value in asdict(settings).items() if name in kept}
