"""Messages between machines carry the tensors of a record in one piece, since a SuperLink moves each array apart."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

FOLDED = "folded"
"""Name of the record that says what is in one piece; who is sent it answers in the same way."""

DTYPES = ("<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "|i1", "|u1", "|b1")


def fold(content: RecordDict) -> RecordDict:
    """Give the same content with the arrays of every record joined into one of bytes.

    Example:
        >>> folded = fold(RecordDict({"arrays": ArrayRecord([np.zeros((2, 3)), np.ones(4)])}))
        >>> len(folded["arrays"]), [array.numpy().shape for array in unfold(folded)["arrays"].values()]
        (1, [(2, 3), (4,)])
    """
    folded, about = RecordDict(), ConfigRecord()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = {key: np.ascontiguousarray(array.numpy()) for key, array in record.items()}
            shapes = {key: array.numpy().shape for key, array in record.items()}
            about[name] = json.dumps([[key, array.dtype.str, shapes[key]] for key, array in arrays.items()])
            pieces = [array.reshape(-1).view(np.uint8) for array in arrays.values()]
            folded[name] = ArrayRecord([np.concatenate([np.empty(0, np.uint8), *pieces])])
        else:
            folded[name] = record
    folded[FOLDED] = about
    return folded


def unfold(content: RecordDict) -> RecordDict:
    """Give what `fold` was given; content that was not folded stays as it is.

    Raises:
        ValueError: it does not say what is in it.
    """
    about = content.get(FOLDED)
    if about is None:
        return content
    if not isinstance(about, ConfigRecord):
        raise ValueError("it does not say what is in one piece")
    found = RecordDict()
    for name, record in content.items():
        if name in about and isinstance(record, ArrayRecord):
            found[name] = _unfolded(record, about[name])
        elif name != FOLDED:
            found[name] = record
    return found


def _unfolded(record: ArrayRecord, about: Any) -> ArrayRecord:
    try:
        (piece,) = record.to_numpy_ndarrays()
        return _arrays(dict(_parts(piece, json.loads(about))))
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"its tensors are not in the expected form ({error})") from error


def _arrays(parts: dict[str, np.ndarray]) -> ArrayRecord:
    import torch

    return ArrayRecord({key: torch.from_numpy(array) for key, array in parts.items()})


def _parts(piece: np.ndarray, about: list[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Cut a piece of bytes into the arrays that it is said to have."""
    begin = 0
    for key, dtype, shape in about:
        if not isinstance(key, str) or dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{str(key)[:40]} is of no type that travels")
        end = begin + np.dtype(dtype).itemsize * math.prod(shape)
        if piece.dtype != np.uint8 or piece.ndim != 1 or end > len(piece):
            raise ValueError("they are shorter than they say")
        yield key, piece[begin:end].copy().view(dtype).reshape(shape)
        begin = end
    if begin != len(piece):
        raise ValueError("they are longer than they say")
