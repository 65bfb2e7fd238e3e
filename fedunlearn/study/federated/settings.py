"""The settings of a federated study."""

import inspect
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from fedunlearn.build import loss_of
from fedunlearn.config import Config, Forget, Train
from fedunlearn.errors import UserError
from fedunlearn.federation.strategy import Strategy, settings_for, strategy_class, strategy_names, strategy_of
from fedunlearn.nn.networks import is_factory
from fedunlearn.runs.files import sha256_of
from fedunlearn.schema import nearest_of
from fedunlearn.study.dag.settings import Pipeline, Scope, StudySettings, check_scope, composed

Scenario = Literal["single", "request_times", "sequential", "together", "everyone"]
Stage = Literal["train", "retrain", "forget", "report"]

STAGES: tuple[Stage, ...] = ("train", "retrain", "forget", "report")
STRATEGIES = ("subset", "relabel", "gradients", "ssd", "leave", "ascent", "pga", "federaser", "negate")
RETRAINING = "retrain"  # a strategy that is no subject of a study: its models are what all others are compared with
TRACE = 5  # rounds between evaluations, and points of a curve


class FederatedScope(Scope):
    """Says which part of the study is done, and where."""

    stages: list[Stage] = Field(default=list(STAGES), description="what to do")
    only: str = Field(
        default="*",
        description="patterns of task names, such as forget/subset/*/seed0, with blanks between: do no others, "
        "and those of the first pattern first",
    )
    pipelines: list[Pipeline] = Field(default=["ce_dl"], description="which")
    strategies: list[str] = Field(default=list(STRATEGIES), description="which; installed ones, or module:Class")
    scenarios: list[Scenario] = Field(
        default=["single"],
        description="requests: the first client of `order`; also at each of `request_times`; one after another, or the "
        "first two at once; or each client",
    )
    request_times: list[float] = Field(
        default=[0.25, 0.5, 0.75], description="fractions of the rounds after which a request comes, beside all"
    )
    apart: int = Field(default=10, ge=1, le=10**6, description="rounds between sequential requests")
    after: list[int] = Field(default=[0, 1, 3, 10, 30], description="rounds after a request at which it is measured")
    seeds: list[int] = Field(default=[0], description="repetitions: of weights, shuffling, augmentation")
    retrained_seeds: list[int] = Field(
        default=[],
        description="further seeds of retrained models: how far two of them are apart stands beside distances",
    )


class FederatedSettings(StudySettings):
    """Holds everything that a federated study depends on."""

    rounds: int = Field(
        default=200, ge=1, le=10**6, description="of training; then comes the request, or the first of several in turn"
    )
    batch_norm_fraction: float = Field(
        default=Config.model_fields["batch_norm_fraction"].default,
        ge=0,
        le=1,
        description=Config.model_fields["batch_norm_fraction"].description,
    )
    train: Train = Train()
    unlearn: dict[str, dict[str, Any]] = Field(
        default={}, description="settings of the strategies, by strategy: unlearn.ssd.alpha=2"
    )
    study: FederatedScope = FederatedScope()

    @field_validator("unlearn", mode="before")
    @classmethod
    def _by_strategy(cls, values: Any) -> Any:
        if isinstance(values, dict) and not all(isinstance(value, dict) for value in values.values()):
            raise PydanticCustomError(
                "by_strategy", "settings of a strategy are named unlearn.STRATEGY.NAME, as unlearn.ssd.alpha=2"
            )
        return values

    @property
    def attacked(self) -> list[int]:
        """The clients that are forgotten in some scenario."""
        return list(range(self.clients)) if "everyone" in self.study.scenarios else self.study.order

    def of_strategy(self, strategy: str) -> BaseModel:
        """Give the settings of a strategy, with defaults for those that are not given.

        Raises:
            UserError: an unknown name, or a value out of range.
        """
        key = key_of(strategy)
        try:
            return settings_for(strategy, self.unlearn.get(key, {}))
        except UserError as error:
            raise UserError(str(error).replace("unlearn.", f"unlearn.{key}.")) from None

    def config(self, pipeline: Pipeline, strategy: str, seed: int) -> Config:
        """Give the settings of a federation's run."""
        loss = self.loss.model_copy(update={"disentangle_weight": 0.0} if pipeline == "ce" else {})
        model = self.model.model_copy(update={"client_head": pipeline != "no_mtl"})
        return Config(
            home=self.study.home,
            strategy=strategy,
            seed=seed,
            clients=self.clients,
            rounds=self.rounds,
            evaluate_every=TRACE,
            batch_norm_fraction=self.batch_norm_fraction,
            data=self.data,
            partition=self.partition,
            model=model,
            train=self.train,
            loss=loss,
            forget=Forget(gate=False),  # what a method does to a model is to be measured, whatever it is
            unlearn=self.of_strategy(strategy).model_dump(),
        )


def load(words: Iterable[str]) -> FederatedSettings:
    """Give the federated preset of a data set and scale, with settings such as `rounds=20` on top.

    Raises:
        UserError: an unknown name, a value of the wrong type or out of range.
    """
    return check(composed(FederatedSettings, "fedunlearn.study.federated", words))


def check(chosen: FederatedSettings) -> FederatedSettings:
    """Give the settings themselves, where their values agree with each other.

    Raises:
        UserError: naming the first that does not.
    """
    check_scope(chosen)
    study = chosen.study
    if not all(0 <= seed <= 10**6 for seed in study.retrained_seeds):
        raise UserError(f"study.retrained_seeds={study.retrained_seeds} are not numbers in 0..1,000,000")
    if not all(0 < time <= 1 for time in study.request_times):
        raise UserError(f"study.request_times={study.request_times} are not fractions in 0..1")
    if 0 not in study.after or min(study.after) < 0:
        raise UserError(f"study.after={study.after} are not rounds after a request, 0 among them")
    check_strategies(chosen)
    return chosen


def check_strategies(chosen: FederatedSettings) -> None:
    """Raise UserError for a strategy that there is not, and for settings of one that are wrong."""
    study = chosen.study
    installed = [name for name in strategy_names() if name != RETRAINING]
    installed.sort(key=lambda name: (STRATEGIES.index(name) if name in STRATEGIES else len(STRATEGIES), name))
    for name in study.strategies:
        if name not in installed and ":" not in name:
            raise UserError(f"study.strategies: {name} is not one of {', '.join(installed)}, module:Class")
    known = [*dict.fromkeys([*map(key_of, study.strategies), *installed])]
    for key in chosen.unlearn:
        if key not in known:
            nearest = nearest_of(f"unlearn.{key}", [f"unlearn.{name}" for name in known])
            raise UserError(f"unlearn.{key} names no strategy{nearest}")
    for name in study.strategies:
        for pipeline in study.pipelines:
            strategy_of(chosen.config(pipeline, name, 0))
            loss_of(chosen.config(pipeline, name, 0))
    if len(kept := keepers(chosen)) > 1:
        raise UserError(
            f"study.strategies: {kept[0]} and {kept[1]} both keep something of the base run, which is trained under "
            "one of them: choose one"
        )


def keepers(chosen: FederatedSettings) -> list[str]:
    """List the strategies that take something along from the base run beside its checkpoint."""
    return [name for name in chosen.study.strategies if strategy_class(name).carry_over is not Strategy.carry_over]


def key_of(strategy: str) -> str:
    """Say what `unlearn` calls a strategy: its name, or the class's name where it is `module:Class`."""
    return strategy.rpartition(":")[2]


def identity_of(chosen: FederatedSettings) -> dict[str, Any]:
    """Give what a run depends on, whatever is forgotten in it and how; of code of one's own, its source too."""
    shared = {"clients", "rounds", "batch_norm_fraction", "partition", "model", "train", "loss"}
    values = chosen.model_dump(include=shared)
    if chosen.train.loss:
        file = Path(inspect.getfile(loss_of(chosen.config("ce_dl", "leave", 0))))
        values["source_of_loss"] = sha256_of(file)
    if is_factory(chosen.model.name):
        file = Path(inspect.getfile(pkgutil.resolve_name(chosen.model.name)))
        values["source_of_model"] = sha256_of(file)
    return values
