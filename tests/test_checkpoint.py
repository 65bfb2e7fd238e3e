import errno
import os

import pytest
import torch

from fedunlearn.errors import UserError
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.runs import checkpoint
from fedunlearn.runs.files import delete_unfinished, write_atomically
from fedunlearn.unlearning.pruning import prune_clients


def test_round_trip_keeps_every_bit_and_the_pruning(tmp_path):
    model, other = TwoHeadResNet18(3, 4, width=8), TwoHeadResNet18(3, 4, width=8)
    prune_clients(model, [2])
    sha256 = checkpoint.save(tmp_path / "deep" / "model.safetensors", model.state_dict())
    checkpoint.load(tmp_path / "deep" / "model.safetensors", other, sha256=sha256)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert other.pruned.tolist() == [False, False, True, False]


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_checkpoint_cut_short_is_named(tmp_path, size):
    model, path = TwoHeadResNet18(3, 4, width=8), tmp_path / "model.safetensors"
    checkpoint.save(path, model.state_dict())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="was cut short"):
        checkpoint.load(path, model)


def test_a_missing_changed_or_foreign_checkpoint_is_named(tmp_path):
    model, path = TwoHeadResNet18(3, 4, width=8), tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path, model)
    sha256 = checkpoint.save(path, model.state_dict())
    with pytest.raises(UserError, match=r"class_head.hidden.bias is \(16,\) there, \(32,\) in this run's model"):
        checkpoint.load(path, TwoHeadResNet18(3, 4, width=16), sha256=sha256)
    checkpoint.save(path, TwoHeadResNet18(3, 4, width=8).state_dict())
    with pytest.raises(UserError, match="cut short or changed since it was written"):
        checkpoint.load(path, model, sha256=sha256)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_lies_beside_the_model_comes_back_and_must_be_expected(tmp_path):
    model, path = TwoHeadResNet18(3, 4, width=8), tmp_path / "model.safetensors"
    momentum = {"momentum.a": torch.arange(3.0)}
    checkpoint.save(path, model.state_dict() | momentum)
    for beside in (("momentum.",), None):
        rest = checkpoint.load(path, model, beside=beside)
        assert list(rest) == ["momentum.a"]
        assert torch.equal(rest["momentum.a"], momentum["momentum.a"])
    with pytest.raises(UserError, match=r"momentum.a is \(3,\) there, absent in this run's model"):
        checkpoint.load(path, model)


def test_words_about_the_tensors_are_kept(tmp_path):
    sha256 = checkpoint.save(tmp_path / "file", {"a": torch.ones(2)}, {"round": "3"})
    tensors, about = checkpoint.read_tensors(tmp_path / "file", sha256=sha256)
    assert (tensors["a"].tolist(), about) == ([1, 1], {"round": "3"})


def test_a_temporary_file_that_somebody_deletes_meanwhile_is_written_again(tmp_path, monkeypatch):
    replace, deleted = os.replace, []

    def tidied_before(temporary, path):
        if not deleted:
            deleted.append(temporary)
            delete_unfinished(tmp_path)
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", tidied_before)
    write_atomically(tmp_path / "file", b"new")
    assert deleted
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"new")]


def test_of_a_folder_that_runs_share_only_the_files_of_one_of_them_are_deleted(tmp_path):
    for name in (".new-a.json-x1_y2z3w", ".new-a.json-b.json-x1_y2z3w", ".new-ab.json-x1_y2z3w", "a.json"):
        (tmp_path / name).touch()
    delete_unfinished(tmp_path, "a.json")
    assert {file.name for file in tmp_path.iterdir()} == {
        ".new-a.json-b.json-x1_y2z3w",
        ".new-ab.json-x1_y2z3w",
        "a.json",
    }


def test_where_a_write_fails_the_error_names_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'file'}'"):
        write_atomically(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())
