"""Tensors of a message in one piece, as they travel between machines."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedunlearn.federation import ordered_grid
from fedunlearn.federation.folding import FOLDED, fold, unfold
from local_grid import LocalGrid, equal

ARRAYS = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(3), np.zeros((0, 2), np.int16), np.array([True])]


def content():
    return RecordDict({"arrays": ArrayRecord(ARRAYS), "empty": ArrayRecord([]), "task": ConfigRecord({"name": "a"})})


def test_what_is_folded_unfolds_to_the_same():
    found = unfold(fold(content()))
    assert {*found} == {"arrays", "empty", "task"}
    for array, again in zip(ARRAYS, found["arrays"].to_numpy_ndarrays(), strict=True):
        assert (array.dtype, array.shape) == (again.dtype, again.shape)
        assert (array == again).all()
    assert [*found["arrays"]] == [*content()["arrays"]]
    assert len(fold(content())["arrays"]) == 1


@pytest.mark.parametrize(
    "about",
    [
        "",
        "null",
        "[1]",
        "[[1, '<f4', [2]]]",
        '[["0", "|O", [1]]]',
        '[["0", "<f4", [99]]]',
        '[["0", "<f4", [-1]]]',
        "[]",
    ],
)
def test_what_does_not_say_what_is_in_it_is_refused(about):
    folded = fold(content())
    folded[FOLDED]["arrays"] = about
    with pytest.raises(ValueError, match="its tensors are not in the expected form"):
        unfold(folded)


def test_a_run_has_the_same_bits_in_one_piece(federate, monkeypatch):
    federate("rounds=1 run=apart")
    monkeypatch.setattr(ordered_grid, "HttpGrid", LocalGrid)
    monkeypatch.setattr(ordered_grid, "REMOTE_PAUSE", 0.001)
    grid, sizes = LocalGrid(2), set()

    def deliver(message):
        sizes.update(len(record) for record in message.content.array_records.values())
        reply = grid.call(message)
        sizes.update(len(record) for record in reply.content.array_records.values())
        return reply

    grid.deliver = deliver
    federate("rounds=1", grid=grid)
    assert sizes == {1}
    assert equal(federate.state(), federate.state("apart"))
