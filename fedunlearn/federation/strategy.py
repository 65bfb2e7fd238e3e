"""What an unlearning strategy is: one class in one file, with what it does on the server and on the clients."""

import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import rfc8785
from pydantic import BaseModel

from fedunlearn.config import Config
from fedunlearn.config import Settings as CheckedSettings
from fedunlearn.errors import UserError
from fedunlearn.federation.handle import Federation, ForgetSet
from fedunlearn.federation.replies import Results
from fedunlearn.federation.tasks import BUILT_IN, tasks_of
from fedunlearn.naming import for_shell
from fedunlearn.runs.run import Run
from fedunlearn.schema import check_names, name_of, nearest_of, setting_names, validated

ENTRY_POINTS = "fedunlearn.strategies"


class Strategy:
    """An unlearning strategy: it changes the federation's state so that the model has forgotten some clients.

    A subclass gives `forget`, and as far as it needs them: `Settings` of its own (they are `unlearn.*` while this
    strategy is chosen), and client tasks, which run where the data is. Pruning of the forgotten clients' neurons, the
    commit, the receipt and the rounds before and after are the run's business.

    Attributes:
        settings: checked.
        label: what tables and pictures call the strategy; by default the class's name.
        colour: in pictures, any that matplotlib knows.
        marker: in pictures, any that matplotlib knows.

    Example:
        >>> class LeaveAndContinue(Strategy):
        ...     def forget(self, federation, forget):
        ...         return {}
    """

    label: ClassVar[str] = ""
    colour: ClassVar[str] = "#444444"
    marker: ClassVar[str] = "o"

    class Settings(CheckedSettings):
        """Settings of the strategy."""

    def __init__(self, settings: BaseModel | None = None) -> None:
        self.settings: Any = self.Settings() if settings is None else settings

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.label = cls.__dict__.get("label") or cls.__name__
        for name, task in tasks_of(cls).items():
            if name in BUILT_IN and task is not BUILT_IN[name]:
                raise TypeError(f"{cls.__name__}.{name}: a built-in client task has this name, take another")

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Change the federation's state into one that has forgotten the clients in `forget`.

        Returns:
            What the receipt should say, as JSON can hold it and under names of its own.

        Raises:
            NotNowError: it cannot be done now; the state is restored, and the request tried again.
        """
        raise NotImplementedError

    def check(self, config: Config) -> None:
        """Raise UserError where the settings do not fit those of the run; by default they always do."""

    def one_reply_each(self, round_: int) -> bool:
        """Say whether every client is to answer a round of training alone, so that `after_reply` sees its update."""
        return False

    def after_reply(self, federation: Federation, run: Run, round_: int, results: Results) -> None:
        """Keep what the strategy needs of one reply in a round of training; by default nothing."""

    def after_refusal(self, run: Run, round_: int, results: Results) -> None:
        """Drop what was kept of a reply that is found, later in its round, to destroy the model."""

    def after_request(self, run: Run) -> None:
        """Delete what only the model before the last request needed; called at every start too, after a crash."""

    def stored_bytes(self, run: Run) -> int:
        """Count the bytes that the strategy keeps for requests to come, beside the server's state."""
        return 0

    def carry_over(self, base: Run, run: Run, round_: int) -> None:
        """Take along from another run what the strategy keeps, where a run goes on from that run's `round_`."""


def strategy_names() -> list[str]:
    """List the names of the strategies that are installed."""
    return sorted(_installed())


@cache
def strategy_class(name: str) -> type[Strategy]:
    """Find an installed strategy by name, or one of somebody's own, named as `module:Class`.

    Raises:
        UserError: there is none, it cannot be imported, or it is no complete `Strategy`.
    """
    installed = _installed()
    if name not in installed and ":" not in name:
        raise UserError(f"strategy={name} is not installed{nearest_of(name, installed)}")
    try:
        found = pkgutil.resolve_name(installed.get(name, name))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, SyntaxError) else error
        raise UserError(f"strategy {name}: {reason} (is its folder in PYTHONPATH?)") from error
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise UserError(f"strategy {name} is no subclass of fedunlearn.Strategy")
    if found.forget is Strategy.forget:
        raise UserError(f"strategy {name} has no method forget(self, federation, forget)")
    return found


def settings_for(name: str, values: dict[str, Any]) -> BaseModel:
    """Check the settings of a strategy, with defaults for those that are not given.

    Raises:
        UserError: an unknown name, with the nearest that there is, or a value out of range.
    """
    schema = strategy_class(name).Settings
    for setting in values:
        if setting not in schema.model_fields:
            nearest = nearest_of(f"unlearn.{setting}", [f"unlearn.{known}" for known in setting_names(schema)])
            raise UserError(f"unlearn.{setting} is no setting of strategy={name}{nearest}")
    return validated(schema, values, prefix="unlearn.")


def strategy_of(config: Config) -> Strategy:
    """Make the strategy of a run.

    Raises:
        UserError: there is no such strategy, or its settings are wrong or do not fit the run's.
    """
    strategy = strategy_class(config.strategy)(settings_for(config.strategy, config.unlearn))
    strategy.check(config)
    return strategy


def chosen(config: Config, words: Sequence[str]) -> dict[str, Any]:
    """Give the strategy of one request and all of its settings, where they are others than the run's.

    Args:
        config: of the run.
        words: `strategy=ssd`, `unlearn.alpha=8` and the like. What they do not name is as in the run, or the default of
            another strategy.

    Returns:
        `strategy` and `unlearn`, as they change the run's settings; nothing without words.

    Raises:
        UserError: a word names no setting, or not one of these, or its value is wrong.
    """
    if not words:
        return {}
    check_names(words, Config)
    values: dict[str, Any] = {}
    for word in words:
        name = name_of(word)
        if name != "strategy" and not name.startswith("unlearn."):
            raise UserError(f"{word}: a request has a strategy and settings of it (unlearn.*); all else is the run's")
        if name in values:
            raise UserError(f"{name} is named twice: a request has one value of it")
        values[name] = _value_of(word)
    if values.get("strategy", "") is None:
        raise UserError("strategy=null names no strategy")
    strategy = str(values.pop("strategy", config.strategy))
    given = {name.removeprefix("unlearn."): value for name, value in values.items()}
    kept = _changed(config) if strategy == config.strategy else {}
    how = completed(config.model_copy(update={"strategy": strategy, "unlearn": kept | given}))
    check_writable(how.unlearn)
    return {"strategy": how.strategy, "unlearn": how.unlearn}


def _changed(config: Config) -> dict[str, Any]:
    """Give the settings of a run's strategy that are not the defaults."""
    defaults = settings_for(config.strategy, {}).model_dump()
    return {name: value for name, value in config.unlearn.items() if value != defaults.get(name)}


def _value_of(word: str) -> Any:
    """Read the one value of a word such as `unlearn.alpha=8`, as Hydra reads it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    name, _, text = word.partition("=")
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        in_shell = for_shell(f'{name}="{text}"')
        hint = f": write it in quotes, as {name}='{text}' (in a shell {in_shell})"
        hint = hint if not text.isascii() and text[:1] not in "'\"" else ""
        raise UserError(f"{word}: {str(error).splitlines()[0]}{hint}") from None
    if override.is_sweep_override() or override.is_delete():
        raise UserError(f"{word}: a request has one value of a setting")
    return override.value()


def check_writable(unlearn: Mapping[str, Any]) -> None:
    """Raise UserError for the first setting of a strategy that a receipt cannot hold (RFC 8785)."""
    for name, value in unlearn.items():
        try:
            rfc8785.dumps(value)
        except (ValueError, RecursionError):
            limits = "numbers are finite there, and whole ones below 2**53"
            raise UserError(f"unlearn.{name}={value} cannot be written into a receipt: {limits}") from None


def completed(config: Config) -> Config:
    """Give the same settings with all of the strategy's written out."""
    return config.model_copy(update={"unlearn": strategy_of(config).settings.model_dump()})


@cache
def _installed() -> dict[str, str]:
    """The installed strategies' `module:Class` by name."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def source_of(name: str) -> Path | None:
    """Give the file of a strategy that is not installed, whose results change when it is edited."""
    return None if name in _installed() else Path(inspect.getfile(strategy_class(name)))
