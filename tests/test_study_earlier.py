"""Results of an earlier version, whose settings were fewer."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.study.dag import command, tasks
from fedunlearn.study.dag.earlier import adopt, agree
from fedunlearn.study.dag.tasks import Task, work_on
from fedunlearn.study.federated.study import FederatedStudy
from fedunlearn.study.pooled.study import PaperStudy

DEFAULTS = {"lr": 0.1, "model": {"width": 64, "name": "resnet18"}, "seeds": [0]}


def task(settings, *, name="retrained/0", work=lambda context: {"value": 1}, defaults=DEFAULTS):
    return Task(name, settings, (), work, 1.0, defaults)


def run(*plan, root):
    work_on(plan, root, over=lambda: False, rate=1.0, workers=1)


BEFORE = {"lr": 0.2, "model": {"width": 8}, "requests": [[0, [1]]]}
NOW = {"lr": 0.2, "model": {"width": 8, "name": "resnet18"}, "requests": ((0, (1,)),)}


def test_a_result_counts_where_what_it_lacked_is_at_its_default(tmp_path):
    run(task(BEFORE), root=tmp_path)
    now = task(NOW, work=lambda context: pytest.fail("made again"))
    assert adopt([now], tmp_path) == [now]
    assert now.result(tmp_path)["value"] == 1
    run(now, root=tmp_path)
    assert adopt([now], tmp_path) == []


@pytest.mark.parametrize(
    "settings",
    [
        NOW | {"lr": 0.3},
        NOW | {"model": {"width": 8, "name": "vit_tiny"}},
        NOW | {"forgotten": 3},  # which has no default
        {"lr": 0.2, "requests": [[0, [1]]]},
    ],
)
def test_it_does_not_where_anything_is_otherwise(tmp_path, settings):
    run(task(BEFORE), root=tmp_path)
    now = task(settings)
    assert adopt([now], tmp_path) == []
    assert not now.is_done(tmp_path)


def test_another_task_another_format_and_a_damaged_file_are_left_alone(tmp_path, monkeypatch):
    before = task(BEFORE)
    run(before, root=tmp_path)
    assert adopt([task(NOW, name="retrained/0-1")], tmp_path) == []
    file = before.folder(tmp_path) / "result.json"
    whole = file.read_text()
    file.write_text(whole[:-9])
    assert adopt([task(NOW)], tmp_path) == []
    file.write_text(whole)
    with monkeypatch.context() as patch:
        patch.setattr("fedunlearn.study.dag.earlier.FORMAT", tasks.FORMAT + 1)
        assert adopt([task(NOW)], tmp_path) == []
    assert len(adopt([task(NOW)], tmp_path)) == 1


def test_a_link_to_a_result_that_was_deleted_does_not_stand_in_the_way(tmp_path):
    before, now = task(BEFORE), task(NOW)
    run(before, root=tmp_path)
    adopt([now], tmp_path)
    shutil.rmtree(before.folder(tmp_path))
    assert adopt([now], tmp_path) == []
    run(now, root=tmp_path)
    assert now.is_done(tmp_path)


def test_what_has_been_begun_anew_is_not_replaced(tmp_path):
    run(task(BEFORE), root=tmp_path)
    now = task(NOW)
    now.folder(tmp_path).mkdir()
    assert adopt([now], tmp_path) == []


values = st.recursive(
    st.integers(0, 3) | st.booleans() | st.none(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner)
)


@given(values, values)
def test_settings_agree_with_themselves_and_without_defaults_with_nothing_else(one, other):
    assert agree(one, one, None)
    assert agree(one, other, None) == (one == other)


@pytest.mark.parametrize("other", ["learning.epochs=7", "loss.client_weight=0.5", "model.width=16"])
def test_what_is_made_of_models_of_other_settings_counts_no_more_than_these_models(tmp_path, other):
    words = ["dataset=digits", "data.limit=80", "clients=3", "study.order=[0]", "learning.epochs=1"]
    for made in PaperStudy(words).plan.tasks():
        made.folder(tmp_path).mkdir(parents=True)
        (made.folder(tmp_path) / "result.json").write_text(
            json.dumps({"settings": made.settings, "format": tasks.FORMAT})
        )
    assert adopt(PaperStudy([*words, other]).plan.tasks(), tmp_path) == []


def test_a_study_goes_on_in_the_folder_of_an_earlier_version(home, monkeypatch, caplog):
    words = "dataset=digits data.limit=80 clients=3 model.width=8 rounds=1 study.after=[0] study.strategies=[leave] "
    words += "study.order=[0] study.seeds=[0] study.scenarios=[single] study.stages=[train,retrain] study.workers=1 "
    words += f"train.client_head_steps=1 study.home={home}"
    assert command.run_study(FederatedStudy(words.split())) == 0
    (root,) = (home / "studies").iterdir()
    made = {file.parent.name for file in root.glob("tasks/*/result.json")}
    for file in (root / "study.json", *root.glob("tasks/*/result.json")):
        content = json.loads(file.read_text())
        about = content.get("settings", content)
        del about["model"]["name"]
        file.write_text(json.dumps(content))
    for name in made:
        (root / "tasks" / name).rename(root / "tasks" / f"{name.rpartition('-')[0]}-0123456789")
    monkeypatch.setattr(command, "work_on", lambda *a, **k: pytest.fail("made again"))
    with caplog.at_level("INFO"):
        assert command.run_study(FederatedStudy(words.split())) == 0
    assert f"{len(made)} tasks are done: an earlier version made them with these settings" in caplog.messages
