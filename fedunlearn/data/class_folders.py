"""List the images of a folder of classes, with the splits that it may have."""

import logging
from pathlib import Path
from typing import NamedTuple

from fedunlearn.data.folders import check_classes, subfolders
from fedunlearn.data.images import class_name, find_images, say_passed_over
from fedunlearn.errors import UserError, printable

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "dev", "eval"),
}
"""Names of folders that say what images are for, in small letters."""

log = logging.getLogger("fedunlearn")


class Labelled(NamedTuple):
    """The image files of a folder of classes.

    Attributes:
        classes: names, sorted.
        train: paths to train with, each with its class; ordered by class, then by path.
        test: those that are held out.
    """

    classes: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


def labelled(source: Path) -> Labelled:
    """List the images of root/class/image, or of root/train/class/image and root/test/class/image.

    Splits may also be called training, testing, val or validation, in capitals or not; validation images are held out
    where there are none for testing, and left out else. Without splits every sixth image of a class is held out.

    Args:
        source: the root.

    Raises:
        UserError: there are not two classes, one of them has no images, or the splits have different classes.
    """
    found = find_images(source)
    splits = splits_of(source)
    say_passed_over(source, found.passed_over)
    if splits:
        train, test = (_by_class(source / splits[name], splits[name], found.files) for name in ("train", "test"))
        if only_one := sorted(train.keys() ^ test.keys()):
            there, here = splits["train"], splits["test"]
            raise UserError(
                f"{printable(str(source))}/{there} and {here} have different classes: {printable(only_one[0])}"
            )
    else:
        train, test = _by_class(source, "", found.files), {}
    classes = sorted(train)
    if len(classes) < 2:
        raise UserError(
            f"data.root={printable(str(source))} has one class ({printable(''.join(classes))}): at least 2 are needed"
        )
    own, held_out = (
        [(file, k) for k, name in enumerate(classes) for file in part.get(name, ())] for part in (train, test)
    )
    return Labelled(classes, own, held_out) if splits else Labelled(classes, *_split_off(own))


def splits_of(source: Path) -> dict[str, str]:
    """Give the names of the folders for `train` and `test`, where a root has both; validation may be the second.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("Train", "val"):
        ...         (Path(root) / name).mkdir()
        ...     splits_of(Path(root))
        {'train': 'Train', 'test': 'val'}
    """
    folders = subfolders(source)
    found = {
        split: sorted(name for name in folders if name.casefold() in names)[0]
        for split, names in SPLITS.items()
        if any(name.casefold() in names for name in folders)
    }
    held_out = found.get("test") or found.get("validation")
    if "train" not in found or held_out is None:
        return {}
    others = sorted(set(folders) - {found["train"], held_out})
    if others:
        log.info("left out of %s: %s", printable(str(source)), printable(", ".join(others)))
    return {"train": found["train"], "test": held_out}


def _by_class(folder: Path, split: str, files: list[Path]) -> dict[str, list[str]]:
    """Give the paths of a split's images by the names of their classes.

    Raises:
        UserError: it has no folders of classes, or one without images.
    """
    check_classes(folder)
    depth = 1 if split else 0
    root = folder.parent if split else folder
    found: dict[str, list[str]] = {}
    for file in files:
        if len(file.parts) > depth + 1 and (not split or file.parts[0] == split):
            found.setdefault(class_name(file.parts[depth]), []).append(str(root / file))
    empty = sorted(name for name in map(class_name, subfolders(folder)) if name not in found)
    if empty or not found:
        reason = f"no image in {printable(', '.join(empty))}" if empty else "it has none with images"
        raise UserError(
            f"data.root={printable(str(folder))} is no folder of one subfolder of images a class ({reason})"
        )
    return found


def _split_off(samples: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Hold every sixth image of a class out."""
    counts: dict[int, int] = {}
    own, held_out = [], []
    for file, label in samples:
        counts[label] = counts.get(label, 0) + 1
        (own if counts[label] % 6 else held_out).append((file, label))
    return own, held_out
