"""Five hospitals' folders of chest X-rays, made of one file of MedMNIST.

    python examples/hospitals.py pneumoniamnist.npz /tmp/hospitals
    fedunlearn run digits run=hospitals rounds=40 data.name=folder data.root=/tmp/hospitals partition.file=clients.csv

The images are those of one hospital, so that a draw says whose they are (`partition.dirichlet_partition`): some have
more healthy children than others. The file names no patients: here every three images of a hospital and class are one.
What is held out comes from the file's training images too, since its test images are harder.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fedunlearn.data.datasets import Owners, load
from fedunlearn.data.partition import dirichlet_partition

HOSPITALS = ("hospital_a", "hospital_b", "hospital_c", "hospital_d", "hospital_e")
CLASSES = ("normal", "pneumonia")
IMAGES_OF_A_PATIENT = 3


def main(words: Sequence[str] | None = None) -> None:
    """Write the folders, and beside them a table that names patients."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, help="pneumoniamnist.npz")
    p.add_argument("folder", type=Path, help="that is made")
    p.add_argument("--images", type=int, default=300, help="for training, and a third of that for testing")
    p.add_argument("--seed", type=int, default=0, help="of the draw")
    options = p.parse_args(words)
    with np.load(options.file, allow_pickle=False) as found:
        images, labels = found["train_images"], found["train_labels"].ravel()
    order = np.random.default_rng(options.seed).permutation(len(images))[: options.images * 4 // 3]
    train, held_out = (np.sort(places) for places in np.split(order, [options.images]))
    rows = []
    shares = dirichlet_partition(labels[train], len(HOSPITALS), dirichlet_alpha=1.0, seed=options.seed)
    for hospital, own in zip(HOSPITALS, (train[share] for share in shares), strict=True):
        for path, patient in written(images[own], labels[own], Path("train") / hospital, options.folder):
            rows.append((path, hospital, "train", f"{hospital}-{patient}"))
    own = written(images[held_out], labels[held_out], Path("test"), options.folder)
    rows += [(path, "", "test", "") for path, _ in own]
    with open(options.folder / "clients.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "client", "split", "patient"), *rows])


def written(images: np.ndarray, labels: np.ndarray, place: Path, folder: Path) -> list[tuple[str, str]]:
    """Write images as `CLASS/NUMBER.png`; gives their paths within the folder, and their patients."""
    found = []
    for k, name in enumerate(CLASSES):
        (folder / place / name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images[labels == k]):
            path = place / name / f"{number:04d}.png"
            Image.fromarray(image).save(folder / path)
            found.append((path.as_posix(), f"{name[0]}{number // IMAGES_OF_A_PATIENT:03d}"))
    return found


def test_every_image_has_an_owner_or_is_held_out(tmp_path):
    """Make the folders of a file of noise, and let the data set be read as the command above does."""
    labels = np.arange(90) % 2
    images = np.random.default_rng(0).integers(256, size=(90, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", train_images=images, train_labels=labels[:, None])
    main([str(tmp_path / "noise.npz"), str(tmp_path / "made"), "--images", "60"])
    owners = Owners("file", "clients.csv")
    found = load("folder", cache=tmp_path / "cache", root=str(tmp_path / "made"), image_size=28, owners=owners)
    assert found.clients == list(HOSPITALS)
    assert [len(split.labels) for split in (found.train, found.test)] == [60, 20]
    assert found.patients is not None
    assert found.patients[0] == "hospital_a-n000"


if __name__ == "__main__":
    main()
