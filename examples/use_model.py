"""Use the model of a finished run: `python examples/use_model.py`, after `fedunlearn run digits rounds=8 run=demo`."""

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

import fedunlearn
from fedunlearn.cli import main


def predicted(run: fedunlearn.LiveRun, images: np.ndarray) -> list[str]:
    """Name the most probable class of each image, uint8 [N, H, W, channels]."""
    names = run.class_names()
    return [names[k] for k in run.predict(images).argmax(1).tolist()]


def handwritten(count: int) -> tuple[np.ndarray, list[str]]:
    """Give images as the run was trained on them, and what they show."""
    pixels, shown = load_digits(return_X_y=True)  # 64 values of 0..16 an image
    images = (pixels[-count:].reshape(-1, 8, 8, 1) * 255 / 16).round().astype(np.uint8)
    return images, [str(k) for k in shown[-count:]]


def test_it_names_handwritten_digits(tmp_path):
    """Train a few rounds, and let the model read digits."""
    words = ["rounds=6", "clients=2", "partition.kind=iid", "strategy=leave", "run=demo", f"home={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "digits", "--engine", "local", *words])
    assert ended.value.code == 0
    images, shown = handwritten(50)
    names = predicted(fedunlearn.open_run("demo", home=str(tmp_path)), images)
    assert sum(a == b for a, b in zip(names, shown, strict=True)) > 25


if __name__ == "__main__":
    images, shown = handwritten(10)
    names = predicted(fedunlearn.open_run(*sys.argv[1:]), images)
    print("shown:", *shown, " predicted:", *names)
