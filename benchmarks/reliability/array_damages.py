"""What may be wrong with the arrays of a reply: damages by name."""

import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from fedunlearn.federation.messages import STATISTICS

Damage = Callable[[Message], Message | Error | RecordDict | None]
RANDOM = np.random.default_rng(0)


class NotHereError(Exception):
    """The reply has no such part."""


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


def of_arrays(record: str) -> dict[str, Damage]:
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
        if values.ndim != 2 or len(values) != 3 or (values.dtype != np.float32 and values.dtype != np.float64):
            raise NotHereError
        return np.stack(change(*values)).astype(values.dtype)

    def damage(reply: Message) -> Any:
        if "train" in reply.metadata.message_type:
            raise NotHereError
        return _array("arrays", rows)(reply)

    return damage


def of_statistics(reply: Message) -> dict[str, Damage]:
    """Give what may be wrong with what each client sends apart: class counts, or embedding statistics."""
    if "statistics" not in reply.content:
        return {}
    whole = next(iter(reply.content["statistics"].values())).numpy().dtype == np.int64  # type: ignore[union-attr]
    return of_arrays("statistics") | {"statistics of another": _renamed("statistics")} | dict(_values(whole))


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
