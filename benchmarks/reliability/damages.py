"""What may be wrong with one reply: damages by name.

Each changes an honest reply in place, or gives an error, other content, or None for silence.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from benchmarks.reliability.array_damages import Damage, NotHereError, of_arrays, of_statistics

COLUMNS = ("examples", "loss", "class_correct", "client_correct")


def damages_of(reply: Message) -> dict[str, Damage]:
    """Give every damage that a reply can have, by name."""
    identifies = "nodes" in reply.content["metrics"]
    every = {
        **FORM,
        **METRICS,
        **(INTRODUCTIONS if identifies else {**COUNTS, **of_arrays("arrays"), **of_statistics(reply)}),
    }
    return {name: damage for name, damage in every.items() if _is_possible(damage, reply)}


def copied(content: RecordDict) -> RecordDict:
    """Copy the records of a reply, so that one of them can be damaged."""
    return RecordDict({name: type(record)(dict(record.items())) for name, record in content.items()})  # type: ignore


def is_believable(name: str) -> bool:
    """Say whether a damage leaves a reply in the expected form, so that only what it says is wrong."""
    return name.startswith(("value ", "plausible ", "silence", "error of one line"))


def _is_possible(damage: Damage, reply: Message) -> bool:
    try:
        damage(Message(copied(reply.content), reply_to=reply))
    except NotHereError:
        return False
    return True


# Errors and parts ----------------------------------------------------------------------------------------------------


def _error(reason: Any) -> Damage:
    return lambda reply: Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)


def _part(name: str, record: Any) -> Damage:
    def damage(reply: Message) -> Message:
        if name in reply.content:
            del reply.content[name]
        if record is not None:
            reply.content[name] = record
        return reply

    return damage


FORM: dict[str, Damage] = {
    "error of one line": _error("out of memory"),
    "error of blanks": _error(" \n "),
    "error without a reason": _error(None),
    "silence": lambda reply: None,
    "no parts": lambda reply: RecordDict(),
    "no metrics": _part("metrics", None),
    "metrics without fields": _part("metrics", MetricRecord({})),
    "metrics as text": _part("metrics", ConfigRecord({"client": "1"})),
    "metrics as arrays": _part("metrics", ArrayRecord({"client": Array(np.ones(1))})),
    "foreign text": _part("more", ConfigRecord({"a": "b"})),
    "foreign arrays": _part("more", ArrayRecord({"a": Array(np.ones(1))})),
    "no work": _part("work", None),
    "work without fields": _part("work", MetricRecord({})),
    "work as text": _part("work", ConfigRecord({"seconds": "1"})),
    "arrays as metrics": _part("arrays", MetricRecord({"a": 1.0})),
    "unwanted statistics": _part("statistics", ArrayRecord({"77": Array(np.ones(3, np.float32))})),
}

# Numbers -------------------------------------------------------------------------------------------------------------


def _metric(record: str, name: str, value: Any) -> Damage:
    def damage(reply: Message) -> Message:
        reply.content[record][name] = value  # type: ignore[index]
        return reply

    return damage


def _counted(column: str, value: Any) -> Damage:
    def damage(reply: Message) -> Message:
        values: Any = reply.content["metrics"][column]  # type: ignore[index]
        new = value(reply.content["metrics"]) if callable(value) else value
        reply.content["metrics"][column] = [type(new)(v) for v in [new, *values[1:]]]  # type: ignore[index]
        return reply

    return damage


NUMBERS = {"0": 0, "-5": -5, "a half": 0.5, "NaN": float("nan"), "infinity": float("inf"), "1e9": 10**9, "1e18": 10**18}
METRICS = {
    **{f"seconds {name}": _metric("work", "seconds", value) for name, value in NUMBERS.items() if name != "0"},
    "work of 1e308": _metric("work", "work", 1e308),
    "seconds as a list": _metric("work", "seconds", [1.0, 2.0]),
    "memory infinite": _metric("work", "mebibytes", float("inf")),
    "half a worker": _metric("work", "worker", 0.5),
    "clients of another node": _metric("metrics", "client", [0]),
    "client that is not there": _metric("metrics", "client", [77]),
    "client -1": _metric("metrics", "client", [-1]),
    "one client twice": _metric("metrics", "client", [1, 1]),
    "another client too": _metric("metrics", "client", [0, 1]),
    "no client": _metric("metrics", "client", []),
    "half a client": _metric("metrics", "client", [1.5]),
    "client as a number": _metric("metrics", "client", 1),
    "columns of two lengths": _metric("metrics", "loss", [1.0, 2.0]),
    "examples as a number": _metric("metrics", "examples", 5),
}
COUNTS = {
    **{f"{column} {name}": _counted(column, value) for column in COLUMNS for name, value in NUMBERS.items()},
    **{f"weight {name}": _metric("metrics", "weight", value) for name, value in NUMBERS.items()},
    "value weight 1": _metric("metrics", "weight", 1.0),
    "loss 1e300": _counted("loss", 1e300),
    "value loss 1e29": _counted("loss", 1e29),
    "more hits than examples": _counted("class_correct", lambda m: m["examples"][0] + 1),
    "plausible nothing right": _counted("class_correct", 0),
    "plausible everything right": _counted("class_correct", lambda m: m["examples"][0]),
    "plausible no loss": _counted("loss", 0.0),
}


def _all_examples(change: Callable[[int], Any]) -> Damage:
    def damage(reply: Message) -> Message:
        values: Any = reply.content["metrics"]["examples"]  # type: ignore[index]
        reply.content["metrics"]["examples"] = [change(value) for value in values]  # type: ignore[index]
        return reply

    return damage


def _only(*clients: int) -> Damage:
    def damage(reply: Message) -> Message:
        metrics: Any = reply.content["metrics"]
        for column in ("client", *COLUMNS):
            metrics[column] = [metrics[column][client] for client in clients]
        return reply

    return damage


def _examples(client: int, value: int | float | Callable[[int], Any]) -> Damage:
    def damage(reply: Message) -> Message:
        values: Any = list(reply.content["metrics"]["examples"])  # type: ignore[index, arg-type]
        new = value if isinstance(value, int | float) else value(values[client])
        reply.content["metrics"]["examples"] = [  # type: ignore[index]
            new if place == client else type(new)(v) for place, v in enumerate(values)
        ]
        return reply

    return damage


INTRODUCTIONS = {
    **{f"examples {name}": _examples(1, value) for name, value in NUMBERS.items()},
    **{f"nodes {name}": _metric("metrics", "nodes", value) for name, value in NUMBERS.items()},
    "nodes 1e6": _metric("metrics", "nodes", 10**6),
    "one node": _metric("metrics", "nodes", 1),
    "two nodes": _metric("metrics", "nodes", 2),
    "GPUs as a list": _metric("metrics", "gpu", [1, 0]),
    "one example": _examples(1, 1),
    "ten times the examples": _all_examples(lambda value: 10 * value),
    "no examples at all": _all_examples(lambda value: 0),
    "one example more": _examples(1, lambda value: value + 1),
    "plausible hosts one client": _only(1),
    "plausible hosts another's client": _only(0),
    "plausible hosts two": _only(0, 1),
    "hosts one twice": _only(1, 1),
}
