"""What may be wrong with one reply: damages by name.

Each changes an honest reply in place, or gives an error, other content, or None for silence.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedunlearn.federation.messages import STATISTICS

Damage = Callable[[Message], Message | Error | RecordDict | None]
COLUMNS = ("examples", "loss", "class_correct", "client_correct")
RANDOM = np.random.default_rng(0)


class NotHereError(Exception):
    """The reply has no such part."""


def damages_of(reply: Message) -> dict[str, Damage]:
    """Give every damage that a reply can have, by name."""
    identifies = "nodes" in reply.content["metrics"]
    every = {**FORM, **METRICS, **(INTRODUCTIONS if identifies else {**COUNTS, **_arrays("arrays"), **_apart(reply)})}
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


def _examples(client: int, value: Any) -> Damage:
    def damage(reply: Message) -> Message:
        values: Any = list(reply.content["metrics"]["examples"])  # type: ignore[index, arg-type]
        new = value(values[client]) if callable(value) else value
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

# Arrays --------------------------------------------------------------------------------------------------------------

Change = Callable[[np.ndarray], Any]


def _array(record: str, change: Change, *, which: str = "") -> Damage:
    """Change all arrays of a record whose names end so, or the last one for `which="last"`."""

    def damage(reply: Message) -> Message:
        arrays: Any = reply.content.get(record)
        if not isinstance(arrays, ArrayRecord) or not arrays:
            raise NotHereError
        names = list(arrays)[-1:] if which == "last" else [name for name in arrays if name.endswith(which)]
        if not names:
            raise NotHereError
        for name in names:
            changed = change(arrays[name].numpy().copy())
            arrays[name] = changed if isinstance(changed, Array) else Array(np.asarray(changed))
        return reply

    return damage


def _raw(change: Callable[[bytes], bytes]) -> Change:
    return lambda values: Array(str(values.dtype), values.shape, "numpy.ndarray", change(Array(values).data))


def _renamed(record: str) -> Damage:
    def damage(reply: Message) -> Message:
        arrays: Any = reply.content.get(record)
        if not arrays:
            raise NotHereError
        arrays["else"] = arrays.pop(next(iter(arrays)))
        return reply

    return damage


def _weights(change: Change) -> Damage:
    """Change the floating-point values of an update, but for BatchNorm's statistics."""

    def damage(reply: Message) -> Message:
        arrays: Any = reply.content.get("arrays")
        if not isinstance(arrays, ArrayRecord) or not arrays:
            raise NotHereError
        for name in list(arrays):
            values = arrays[name].numpy().copy()
            if not name.endswith(STATISTICS):
                arrays[name] = Array(_in_kind(values, change))
        return reply

    return damage


def _in_kind(values: np.ndarray, change: Change) -> np.ndarray:
    """Change values that may travel as the bits of bf16."""
    if values.dtype != np.int16:
        return change(values).astype(values.dtype)
    wide = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return (change(wide).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)


VALUES: Mapping[str, Change] = {
    "x 2": lambda v: 2 * v,
    "x 10": lambda v: 10 * v,
    "x 100": lambda v: 100 * v,
    "x 250": lambda v: 250 * v,
    "x 1000": lambda v: 1000 * v,
    "x -1": lambda v: -v,
    "x -10": lambda v: -10 * v,
    "x 0": lambda v: 0 * v,
    "x 1e-30": lambda v: 1e-30 * v,
    "1e6": lambda v: np.full_like(v, 1e6),
    "1e30": lambda v: np.full_like(v, 1e30),
    "3.4e38": lambda v: np.full_like(v, 3.3e38),
    "noise": lambda v: RANDOM.standard_normal(v.shape) * (10 * v.std() + 1e-6),
    "ones": lambda v: np.ones_like(v),
    "below zero": lambda v: -np.abs(v) - 1,
}


def _arrays(record: str) -> dict[str, Damage]:
    """Give what may be wrong with a record of arrays."""
    form: dict[str, Change] = {
        "NaN": lambda v: _in_kind(v, lambda w: w * np.nan) if v.dtype != np.int64 else v.astype(float) * np.nan,
        "infinite": lambda v: _in_kind(v, lambda w: w + np.inf) if v.dtype != np.int64 else v + np.inf,
        "as int8": lambda v: v.astype(np.int8),
        "as int16": lambda v: v.astype(np.int16) if v.dtype != np.int16 else v.astype(np.uint16),
        "as uint8": lambda v: v.astype(np.uint8),
        "as float64": lambda v: v.astype(np.float64),
        "as complex": lambda v: v.astype(np.complex64),
        "as words": lambda v: np.full(v.shape, "one"),
        "of another shape": lambda v: v[:-1],
        "of one axis more": lambda v: v[None],
        "as a scalar": lambda v: np.asarray(v.sum()),
        "without values": lambda v: v[:0],
        "without bytes": _raw(lambda data: b""),
        "of half the bytes": _raw(lambda data: data[: len(data) // 2]),
        "of garbage": _raw(lambda data: b"\x93NUMPY garbage"),
        "as a pickle": _raw(lambda data: pickle.dumps([1.0] * 10)),
        "as text": _raw(lambda data: b"ten numbers, honestly"),
    }
    found = {f"{record} {name}": _array(record, change, which="last") for name, change in form.items()}
    found |= {f"no {record}": _without(record), f"{record} renamed": _renamed(record)}
    if record == "arrays":
        found |= {f"value {name}": _weights(change) for name, change in VALUES.items()}
        for name, change in {"-1e6": lambda v: v - 1e6, "1e6": lambda v: v + 1e6, "x 100": lambda v: v * 100}.items():
            found[f"value running_var {name}"] = _array(record, change, which="running_var")
            found[f"value running_mean {name}"] = _array(record, change, which="running_mean")
        found |= {f"value moments {name}": _moments(change) for name, change in MOMENTS.items()}
    return found


def _without(record: str) -> Damage:
    def damage(reply: Message) -> Message:
        if record not in reply.content:
            raise NotHereError
        del reply.content[record]
        return reply

    return damage


# Statistics ----------------------------------------------------------------------------------------------------------


def _scaled(by: float) -> Callable[..., tuple[np.ndarray, ...]]:
    return lambda count, total, squares: (count, by * total, by * by * squares)


MOMENTS: Mapping[str, Callable[..., tuple[np.ndarray, ...]]] = {
    "of images x 3": _scaled(3),
    "of images x 15": _scaled(15),
    "of images x 1000": _scaled(1000),
    "of images x -1": _scaled(-1),
    "of images x 0": _scaled(0),
    "of shifted images": lambda n, t, s: (n, t + 100 * n, s + 200 * t + 10_000 * n),
    "without squares": lambda n, t, s: (n, t, 0 * s),
    "of negative squares": lambda n, t, s: (n, t, -s),
    "of huge squares": lambda n, t, s: (n, t, 100 * s),
    "of no images": lambda n, t, s: (0 * n, t, s),
    "of half images": lambda n, t, s: (n * 0.3, t, s),
    "of more images": lambda n, t, s: (n * 1000, t * 1000, s * 1000),
}


def _moments(change: Callable[..., tuple[np.ndarray, ...]]) -> Damage:
    """Change count, sum and sum of squares of BatchNorm statistics, [3, channels] a layer."""

    def rows(values: np.ndarray) -> np.ndarray:
        if values.ndim != 2 or len(values) != 3 or values.dtype != np.float32 and values.dtype != np.float64:
            raise NotHereError
        return np.stack(change(*values)).astype(values.dtype)

    def damage(reply: Message) -> Message:
        if "train" in reply.metadata.message_type:
            raise NotHereError
        return _array("arrays", rows)(reply)

    return damage


def _apart(reply: Message) -> dict[str, Damage]:
    """Give what may be wrong with what each client sends apart: class counts, or embedding statistics."""
    if "statistics" not in reply.content:
        return {}
    whole = next(iter(reply.content["statistics"].values())).numpy().dtype == np.int64  # type: ignore[union-attr]
    return _arrays("statistics") | {"statistics of another": _renamed("statistics")} | dict(_values(whole))


def _values(whole: bool) -> Iterator[tuple[str, Damage]]:
    if whole:
        for name, change in CLASSES.items():
            yield f"value classes {name}", _array("statistics", change)
        return
    for name, change in MOMENTS.items():
        yield f"value embeddings {name}", _array("statistics", lambda v, change=change: _embeddings(v, change))
    yield "plausible embeddings of other classes", _array("statistics", lambda v: np.roll(v, 1, 0))


CLASSES: Mapping[str, Change] = {
    "below zero": lambda v: v - 1,
    "x 2": lambda v: 2 * v,
    "of nobody": lambda v: 0 * v,
    "that wrap": lambda v: v * 0 + 2**62,
    "with halves": lambda v: v / 2,
    "rolled": lambda v: np.roll(v, 1),
    "of one class": lambda v: np.eye(len(v), dtype=v.dtype)[0] * v.sum(),
    "of the rarest class": lambda v: np.eye(len(v), dtype=v.dtype)[int(v.argmin())] * v.sum(),
}


def _embeddings(rows: np.ndarray, change: Callable[..., tuple[np.ndarray, ...]]) -> np.ndarray:
    width = (rows.shape[1] - 1) // 2
    parts = change(rows[:, :1], rows[:, 1 : 1 + width], rows[:, 1 + width :])
    return np.concatenate(parts, 1).astype(rows.dtype)
