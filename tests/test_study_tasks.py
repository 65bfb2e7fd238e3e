import json
import time

import pytest
import torch

from fedunlearn.errors import UserError
from fedunlearn.runs.formats import duration
from fedunlearn.runs.lock import LockedError, lock
from fedunlearn.study.dag import tasks
from fedunlearn.study.dag.tasks import PARTIAL, Left, Task, check_needs, work_on


def task(name, work, needs=(), settings=None):
    return Task(name, settings or {}, tuple(needs), work, 1.0)


def run(plan, root, seconds=60.0):
    deadline = time.monotonic() + seconds
    return work_on(plan, root, over=lambda: time.monotonic() > deadline, rate=1.0, workers=1)


def sum_of(*needs):
    return lambda context: {"value": 1 + sum(context.result(need)["value"] for need in needs)}


def counting(context):
    """Counts to five, a save and a tick each."""
    state, rows = context.partial() or ({"done": torch.zeros(())}, [])
    for number in range(len(rows), 5):
        state["done"] += 1
        rows.append(number)
        context.save_partial(state, rows)
        context.tick(number + 1, 5, "number")
    return {"value": int(state["done"]), "rows": rows}


def test_what_is_needed_comes_first_and_nothing_is_done_twice(tmp_path):
    first = task("first", sum_of())
    second = task("second", sum_of(first), [first])
    third = task("third", sum_of(first, second), [first, second])
    assert run([third, second, first], tmp_path)
    assert [s.result(tmp_path)["value"] for s in (first, second, third)] == [1, 2, 4]
    again = [task(s.name, lambda context: pytest.fail("done twice"), s.needs) for s in (first, second, third)]
    assert run(again, tmp_path)


def test_the_key_depends_on_settings_and_on_what_is_needed():
    keys = {
        task("a", None).key,
        task("a", None, settings={"lr": 1}).key,
        task("a", None, [task("b", None)]).key,
        task("a", None, [task("b", None, settings={"lr": 1})]).key,
    }
    assert len(keys) == 4
    assert task("a", None, settings={"x": 1, "y": 2}).key == task("a", None, settings={"y": 2, "x": 1}).key


def test_out_of_time_it_stops_after_a_unit_and_continues_there(tmp_path):
    work = task("count", counting)
    ends = [run([work], tmp_path, seconds=-1) for _ in range(5)]  # saves and stops after each number
    assert ends == [False, False, False, False, True]
    result = work.result(tmp_path)
    assert (result["value"], result["rows"]) == (5, [0, 1, 2, 3, 4])
    assert result["seconds"] > 0
    assert not (work.folder(tmp_path) / PARTIAL).exists()


def test_a_failure_leaves_the_rest_as_it_is(tmp_path):
    good = task("good", sum_of())
    bad = task("bad", lambda context: 1 / 0, [good])
    with pytest.raises(ZeroDivisionError):
        run([good, bad], tmp_path)
    assert good.is_done(tmp_path)
    assert not bad.is_done(tmp_path)
    assert run([task("bad", sum_of(good), [good])], tmp_path)


def test_what_another_process_holds_is_left_to_it(tmp_path):
    free, held = task("free", sum_of()), task("held", lambda context: pytest.fail("taken from who has it"))
    with lock(held.folder(tmp_path)):
        assert not run([held, free], tmp_path, seconds=0.5)
    assert free.is_done(tmp_path)


def test_a_need_that_nobody_was_asked_for_is_named(tmp_path):
    first = task("train/first", sum_of())
    with pytest.raises(UserError, match=r"second needs train/first, which was not asked for and is not there yet"):
        check_needs([task("second", sum_of(first), [first])], tmp_path)
    check_needs([task("second", sum_of(first), [first]), first], tmp_path)
    run([first], tmp_path)
    check_needs([task("second", sum_of(first), [first])], tmp_path)


@pytest.mark.parametrize("name", ["result.json", PARTIAL])
def test_a_file_that_was_cut_short_is_named_and_nothing_else_lost(tmp_path, name):
    work = task("count", counting)
    run([work], tmp_path, seconds=100 if name == "result.json" else -1)
    file = work.folder(tmp_path) / name
    file.write_bytes(file.read_bytes()[:-9])
    look = work.result if name == "result.json" else lambda root: run([work], root)
    with pytest.raises(UserError, match=f"{name} was cut short .*delete it, and the same command") as caught:
        look(tmp_path)
    assert "\n" not in str(caught.value)
    file.unlink()
    assert run([work], tmp_path)
    assert work.result(tmp_path)["value"] == 5


def test_nested_tensors_and_rows_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "SAVE_EVERY", 0.0)
    seen = []

    def work(context):
        context.save_partial({"a": {"b": torch.arange(3)}}, [{"x": 0.5}])
        seen.append(context.partial())
        return {}

    run([task("nested", work)], tmp_path)
    (state, rows), *_ = seen
    assert state["a.b"].tolist() == [0, 1, 2]
    assert rows == [{"x": 0.5}]


def test_the_time_left_is_measured_on_what_was_done(tmp_path):
    plan = [task(name, sum_of()) for name in "abc"]
    left = Left(plan, tmp_path, 100.0, 2)
    assert left.in_words() == "0 of 3 tasks done, about 2 min 30 s left in all"
    assert (
        left.in_words(0.5, cost=0.25, seconds=10) == "0 of 3 tasks done, about 50 s left in all"
    )  # 2.5 at 40 s, two at work
    run(plan[:1], tmp_path)
    file = plan[0].folder(tmp_path) / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 3600}))
    assert left.in_words() == "1 of 3 tasks done, about 1 h 0 min left in all"
    run(plan[:2], tmp_path)
    assert "2 of 3 tasks done, about 30 min" in left.in_words(), "the last task is one process's"
    assert duration(75.4) == "1 min 15 s"


def test_what_an_earlier_start_did_counts_only_until_something_is_done_here(tmp_path):
    def do(work, seconds):
        run([work], tmp_path)
        file = work.folder(tmp_path) / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": seconds}))

    plan = [task(name, sum_of()) for name in "abcd"]
    do(plan[0], 3600)
    left = Left(plan, tmp_path, 1.0, 1)
    assert left.in_words() == "1 of 4 tasks done, about 3 h 0 min left in all"
    do(plan[1], 60)
    assert left.in_words() == "2 of 4 tasks done, about 2 min 0 s left in all"


def test_units_of_an_earlier_task_do_not_count_as_done(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(tasks, "LOG_EVERY", 0.0)
    monkeypatch.setattr(Left, "in_words", lambda left, done=0.0, **of: said.append((done, of.get("cost"))) or "")

    def work(context):
        for number in (61, 62, 63):
            context.tick(number, 64, "round", begun=60)
        return {}

    run([task("later", work), task("at once", lambda context: context.tick(60, 60, "round", begun=60) or {})], tmp_path)
    assert said[:3] == [(0.25, 0.25), (0.5, 0.5), (0.75, 0.75)]


def test_a_lock_of_another_folder_is_an_error_and_not_somebody_elses_work(tmp_path):
    def work(context):
        raise LockedError("the images are locked by process 1", tmp_path / "data")

    with pytest.raises(LockedError, match="the images are locked"):
        run([task("a", work)], tmp_path)
