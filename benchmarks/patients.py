"""Give images owners and patients: `python -m benchmarks.patients IMAGES CSV`, a file for `partition.file`.

The images lie as `train/CLASS/FILE` and `test/CLASS/FILE`. Clients are dealt as a run deals them (Dirichlet, 0.6). A
patient is ten images of a class that belong to one client, so who they are says nothing about the images.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from fedunlearn.data.partition import dirichlet_partition

OF_A_PATIENT = 10


def main() -> None:
    """Write a line an image."""
    p = argparse.ArgumentParser("python -m benchmarks.patients", description=__doc__)
    p.add_argument("images", type=Path)
    p.add_argument("csv", type=Path)
    p.add_argument("--clients", type=int, default=10)
    p.add_argument("--limit", type=int, default=500, help="images of a class for training")
    p.add_argument("--test-limit", type=int, default=200, help="images of a class for testing")
    options = p.parse_args()
    train, test = (
        [file for folder in sorted((options.images / split).iterdir()) for file in sorted(folder.iterdir())[:limit]]
        for split, limit in (("train", options.limit), ("test", options.test_limit))
    )
    labels = np.unique([file.parent.name for file in train], return_inverse=True)[1]
    with options.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "client", "class", "split", "patient"])
        for client, owned in enumerate(dirichlet_partition(labels, options.clients)):
            for place, index in enumerate(owned):
                image = train[index]
                patient = f"c{client}-{image.parent.name}-{place // OF_A_PATIENT}"
                writer.writerow([image.relative_to(options.images), f"c{client}", image.parent.name, "train", patient])
        for image in test:
            writer.writerow([image.relative_to(options.images), "", image.parent.name, "test", ""])


if __name__ == "__main__":
    main()
