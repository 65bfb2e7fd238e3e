"""What a crash leaves of decoded images, and what finds it."""

import os
import socket

import numpy as np
import pytest

from fedunlearn.data import store
from fedunlearn.data.removal import GONE, remove_folder
from fedunlearn.data.store import UNFINISHED, new_folder, remove_leftovers


def test_folders_of_processes_that_are_gone_are_removed_and_no_others(tmp_path):
    here = f"{UNFINISHED}{socket.gethostname()}"
    gone = [f"{here}-{2**22 + 7}-x_1", f"{GONE}folder-ab-7"]  # no system gives so large a number
    kept = [f"{here}-{os.getpid()}-x_1", f"{UNFINISHED}another-machine-7-x_1", "folder-ab"]
    for place in (tmp_path, tmp_path / "folder-ab"):
        for name in [*gone, *kept]:
            (place / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "alias").symlink_to("folder-ab")
    assert sorted(remove_leftovers(tmp_path)) == sorted(2 * gone)
    (tmp_path / "alias").unlink()
    for place in (tmp_path, tmp_path / "folder-ab"):
        assert {folder.name for folder in place.iterdir()} == {*kept}


def test_a_copy_whose_deletion_is_cut_short_is_found(tmp_path, monkeypatch):
    with new_folder(tmp_path / "folder-ab") as folder:
        np.save(folder / "train_images.npy", np.zeros(3))
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "folder-ab")
    assert not (tmp_path / "folder-ab").exists()
    assert len(remove_leftovers(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


def test_another_name_of_a_copy_that_is_gone_is_in_nobodys_way(tmp_path):
    (tmp_path / "alias").symlink_to("gone")
    with new_folder(tmp_path / "alias") as folder:
        (folder / "file").write_text("here")
    assert (tmp_path / "alias" / "file").read_text() == "here"
    assert not (tmp_path / "alias").is_symlink()
