"""What one bad reply did: the run with it beside the undisturbed run from the same base."""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedunlearn.errors import UserError
from fedunlearn.federation.auditor import Auditor
from fedunlearn.federation.server_data import ServerData
from fedunlearn.runs.ledger import State

MOST_LOST = 0.1  # of accuracy, beside the undisturbed run
STILL_THERE = 0.5  # of what the undisturbed request takes off the forget client's accuracy, and more
WORST_FIRST = (
    "run ends",
    "harmful",
    "false figures",
    "neutralised",
    "innocents named",
    "nobody named",
    "liar named",
    "harmless",
)


@dataclass(frozen=True)
class Model:
    """How good a model is.

    Attributes:
        test: accuracy on held-out images.
        clients: accuracy on each client's images.
        finite: whether all weights are.
    """

    test: float
    clients: tuple[float, ...]
    finite: bool


@dataclass
class Found:
    """What there is to say of a run.

    Attributes:
        ended: the exception that ended it.
        named: clients whose replies were refused, or who were said to be in the way.
        state: of the request, if there is one.
        reason: why it was not applied.
        impossible: figures that no model has.
        model: that the run has in the end.
    """

    ended: str = ""
    named: set[int] = field(default_factory=set)
    state: str = ""
    reason: str = ""
    impossible: list[str] = field(default_factory=list)
    model: Model | None = None


class Examiner:
    """Measures models, each once, on all images: what it says no server could know."""

    def __init__(self, auditor: Auditor, server: ServerData) -> None:
        self._auditor, self._server = auditor, server
        self._known: dict[bytes, Model] = {}

    def model(self, params: Mapping[str, Tensor]) -> Model:
        """Measure a model."""
        key = b"".join(
            value.double().sum().numpy().tobytes() + value.numpy().tobytes()[:64] for value in params.values()
        )
        if key not in self._known:
            self._known[key] = self._measured(dict(params))
        return self._known[key]

    def _measured(self, params: dict[str, Tensor]) -> Model:
        finite = all(bool(value.isfinite().all()) for value in params.values() if value.is_floating_point())
        if not finite:
            return Model(0.0, (), finite)
        self._server.model.load_state_dict(params)
        predictions = self._server.predict(self._server.model)
        clients = range(len(self._auditor.class_counts()))
        own = tuple(self._auditor.evaluate(params, client).class_accuracy for client in clients)
        return Model(predictions.total.class_accuracy, own, finite)


def outcome(found: Found, undisturbed: Found, before: Model, *, without: Model | None, liar: int, forget: int) -> str:
    """Say in two words what a bad reply did; the thresholds are those of this module.

    Args:
        without: what becomes of the model where the liar does not reply at all. That is no harm of the lie.
    """
    if found.ended:
        return "run ends"
    assert found.model is not None
    assert undisturbed.model is not None
    fair = [undisturbed.model, *([without] if without else [])]
    if not found.model.finite or min(_lost(found.model, one, liar) for one in fair) > MOST_LOST:
        return "harmful"
    if found.impossible:
        return "false figures"
    if _is_neutralised(found, undisturbed, before, forget):
        return "neutralised"
    if found.named - {liar}:
        return "innocents named"
    if found.named:
        return "liar named"
    return "nobody named" if found.state != undisturbed.state else "harmless"


def _lost(model: Model, undisturbed: Model, liar: int) -> float:
    pairs = [(model.test, undisturbed.test)]
    others = [c for c in range(len(model.clients)) if c != liar]
    pairs.append((_mean([model.clients[c] for c in others]), _mean([undisturbed.clients[c] for c in others])))
    return max(was - is_ for is_, was in pairs)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _is_neutralised(found: Found, undisturbed: Found, before: Model, forget: int) -> bool:
    if not found.state == undisturbed.state == State.COMPLETED or found.model is None or undisturbed.model is None:
        return False
    known, is_known = before.clients[forget], found.model.clients[forget]
    taken = known - undisturbed.model.clients[forget]
    return taken > MOST_LOST and is_known > known - STILL_THERE * taken


# What a run says -----------------------------------------------------------------------------------------------------


def impossible_figures(value: Any, path: str = "") -> Iterator[str]:
    """List figures that are not finite, and accuracies outside of 0..1, in anything that JSON can hold."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from impossible_figures(entry, f"{path}.{name}")
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            yield from impossible_figures(entry, f"{path}[{place}]")
    elif isinstance(value, int | float) and not _is_possible(value, path):
        yield f"{path}={value}"


def _is_possible(value: float, path: str) -> bool:
    is_accuracy = path.endswith((".class", ".client_id", "accuracy"))
    return math.isfinite(value) and (not is_accuracy or 0 <= value <= 1)


class _Names(logging.Handler):
    """Collects whom log lines name."""

    def __init__(self, found: Found, nodes: Mapping[int, int]) -> None:
        super().__init__(logging.INFO)
        self._found, self._nodes = found, nodes

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if match := re.search(r"\(clients? ([\d, ]+)\) (is|are) left out", line):
            self._found.named |= {int(client) for client in match[1].split(",")}
        elif match := re.match(r"node (\d+)(, attempt| is left out)", line):
            self._found.named.add(self._nodes[int(match[1])])
        elif match := re.search(r"request .*client (\d+) (?!has)", line):
            self._found.named.add(int(match[1]))


@contextmanager
def watched(found: Found, nodes: Mapping[int, int]) -> Iterator[None]:
    """Note whom the log names meanwhile, and how a run ends."""
    logger, handler = logging.getLogger("fedunlearn"), _Names(found, nodes)
    others = logger.handlers[:]
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    try:
        yield
    except UserError as error:
        found.ended = f"UserError: {error}"
    except Exception as error:
        found.ended = f"{type(error).__name__}: {error}"
    finally:
        logger.handlers[:] = others
