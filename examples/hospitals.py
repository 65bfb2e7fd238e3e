"""Five hospitals' folders of chest X-rays, made of one file of MedMNIST.

    python examples/hospitals.py pneumoniamnist.npz /tmp/hospitals
    fedunlearn run digits run=hospitals data.name=folder data.root=/tmp/hospitals partition.file=clients.csv

The images are those of one hospital, so that a draw says whose they are (`partition.dirichlet_partition`): some have
more healthy children than others. The file names no patients. Here every three images of a hospital and class are one.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fedunlearn.data.partition import dirichlet_partition

HOSPITALS = ("hospital_a", "hospital_b", "hospital_c", "hospital_d", "hospital_e")
CLASSES = ("normal", "pneumonia")
IMAGES_OF_A_PATIENT = 3


def main(words: Sequence[str] | None = None) -> None:
    """Write the folders, and beside them a table that names patients."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, help="pneumoniamnist.npz")
    p.add_argument("folder", type=Path, help="that is made")
    p.add_argument("--images", type=int, default=1500, help="for training, and a third of that for testing")
    p.add_argument("--seed", type=int, default=0, help="of the draw")
    options = p.parse_args(words)
    with np.load(options.file, allow_pickle=False) as found:
        train, test = ((found[f"{name}_images"], found[f"{name}_labels"].ravel()) for name in ("train", "test"))
    random = np.random.default_rng(options.seed)
    rows = []
    images, labels = chosen(*train, options.images, random)
    shares = dirichlet_partition(labels, len(HOSPITALS), dirichlet_alpha=1.0, seed=options.seed)
    for hospital, own in zip(HOSPITALS, shares, strict=True):
        for path, patient in written(images[own], labels[own], Path("train") / hospital, options.folder):
            rows.append((path, hospital, "train", f"{hospital}-{patient}"))
    images, labels = chosen(*test, options.images // 3, random)
    rows += [(path, "", "test", "") for path, _ in written(images, labels, Path("test"), options.folder)]
    with open(options.folder / "clients.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "client", "split", "patient"), *rows])


def chosen(images: np.ndarray, labels: np.ndarray, count: int, random: np.random.Generator) -> tuple:
    """Give some images and their labels, at random."""
    places = np.sort(random.permutation(len(images))[:count])
    return images[places], labels[places]


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


if __name__ == "__main__":
    main()
