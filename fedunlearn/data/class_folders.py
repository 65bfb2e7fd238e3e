"""List the images of a folder of classes, with the splits that it may have."""

import logging
from pathlib import Path
from typing import NamedTuple

from fedunlearn.data.folders import VALIDATION, check_classes, subfolders
from fedunlearn.data.images import class_name, find_images, say_passed_over
from fedunlearn.errors import UserError, printable

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": tuple(VALIDATION),
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
    Folders without images are said and passed over. In the test split they say that a class has no test images.

    Args:
        source: the root.

    Raises:
        UserError: there are not two classes, no class has images, or the splits have different classes.
    """
    found = find_images(source)
    splits = splits_of(source)
    loose = _of_no_class(found.files, splits)
    say_passed_over(source, {**found.passed_over, **({"image in no folder of a class": loose} if loose else {})})
    if splits:
        train, test = (_by_class(source / splits[name], splits[name], found.files) for name in ("train", "test"))
        without = {name for name in map(class_name, subfolders(source / splits["test"])) if name not in test}
        if only_one := sorted((train.keys() ^ test.keys()) - (train.keys() & without)):
            there, here = splits["train"], splits["test"]
            raise UserError(
                f"{printable(str(source))}/{there} and {here} have different classes: {printable(only_one[0])}"
            )
    else:
        _say_split_alone(source)
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


def _say_split_alone(source: Path) -> None:
    """Warn of a folder among those of classes that is named like a split: its images may be of all classes."""
    folders = subfolders(source)
    for name in folders:
        if len(folders) > 1 and any(name.casefold() in names for names in SPLITS.values()):
            said = (
                "%s is taken for a class called %s: as a split it would need another one beside it (train/ and test/)"
            )
            log.warning(said, printable(str(source / name)), printable(name))


def _of_no_class(files: list[Path], splits: dict[str, str]) -> int:
    """Count the images that lie in no folder of a class: directly in the root, or in that of a split."""
    return sum(len(file.parts) == 1 or (len(file.parts) == 2 and file.parts[0] in splits.values()) for file in files)


def _by_class(folder: Path, split: str, files: list[Path]) -> dict[str, list[str]]:
    """Give the paths of a split's images by the names of their classes; say which folders have no images.

    Raises:
        UserError: it has no folders of classes, or none with images.
    """
    check_classes(folder)
    depth = 1 if split else 0
    root = folder.parent if split else folder
    own = [file for file in files if not split or file.parts[0] == split]
    found: dict[str, list[str]] = {}
    for file in own:
        if len(file.parts) > depth + 1:
            found.setdefault(class_name(file.parts[depth]), []).append(str(root / file))
    empty = sorted(name for name in map(class_name, subfolders(folder)) if name not in found)
    if not found:
        form = f"{split}/CLASS/image" if split else "CLASS/image"
        why = f"no image in {printable(', '.join(empty))}" if empty else "it has none with images"
        reason = f"{len(own)} images lie directly in it: {form} is read" if own else why
        raise UserError(
            f"data.root={printable(str(folder))} is no folder of one subfolder of images a class ({reason})"
        )
    if empty:
        log.warning("passed over in %s: no image in %s", printable(str(folder)), printable(", ".join(empty)))
    return found


def _split_off(samples: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Hold every sixth image of a class out."""
    counts: dict[int, int] = {}
    own, held_out = [], []
    for file, label in samples:
        counts[label] = counts.get(label, 0) + 1
        (own if counts[label] % 6 else held_out).append((file, label))
    return own, held_out
