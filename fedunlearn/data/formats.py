"""Read data sets that are one file of arrays: NumPy's .npz, with names of one's own or MedMNIST's."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from fedunlearn.data.decoded import Decoded, Split
from fedunlearn.data.scaling import OutOfRangeError, UnreadableError, Window, scaled
from fedunlearn.errors import UserError, printable

ORGANS = (
    "bladder; femur-left; femur-right; heart; kidney-left; kidney-right; liver; lung-left; lung-right; pancreas; spleen"
)
MEDMNIST = {
    "pathmnist": "adipose; background; debris; lymphocytes; mucus; smooth muscle; normal colon mucosa; "
    "cancer-associated stroma; colorectal adenocarcinoma epithelium",
    "dermamnist": "actinic keratoses and intraepithelial carcinoma; basal cell carcinoma; "
    "benign keratosis-like lesions; dermatofibroma; melanoma; melanocytic nevi; vascular lesions",
    "octmnist": "choroidal neovascularization; diabetic macular edema; drusen; normal",
    "pneumoniamnist": "normal; pneumonia",
    "retinamnist": "grade 0; grade 1; grade 2; grade 3; grade 4",
    "breastmnist": "malignant; normal, benign",
    "bloodmnist": "basophil; eosinophil; erythroblast; immature granulocyte; lymphocyte; monocyte; neutrophil; "
    "platelet",
    "tissuemnist": "collecting duct, connecting tubule; distal convoluted tubule; glomerular endothelial cells; "
    "interstitial endothelial cells; leukocytes; podocytes; proximal tubule segments; thick ascending limb",
    "organamnist": ORGANS,
    "organcmnist": ORGANS,
    "organsmnist": ORGANS,
}
"""The classes of MedMNIST's sets of images with one label each (Yang et al., 2023): its files do not name them."""

CHANNELS = (1, 3)
"""That an image may have."""

log = logging.getLogger("fedunlearn")


def decode_medmnist(file: Path) -> Decoded:
    """Read a file of MedMNIST: its training and its test images.

    The validation images are left out, as in the published benchmarks, and the log says how many they are. Images keep
    their size. The names of the classes come from the name of the file.

    Args:
        file: such as `pneumoniamnist.npz`.

    Raises:
        UserError: it has no such arrays, several labels an image, or volumes.
    """
    arrays = read_arrays(file)
    train, test = (
        Split(pixels(_of(arrays, f"{part}_images", file), file), _of(arrays, f"{part}_labels", file))
        for part in ("train", "test")
    )
    known = re.match(r"[a-z]+mnist", file.name.lower())
    names = MEDMNIST.get(known[0] if known else "", "").split("; ")
    check_shapes(train.images, test.images, file)
    (labels, test_labels), class_names = classes([train.labels, test.labels], names if names[0] else None, file)
    if "val_images" in arrays:
        log.info("%s: its %d validation images are left out", printable(file.name), len(arrays["val_images"]))
    return Decoded(Split(train.images, labels), Split(test.images, test_labels), class_names, about_of(file))


def decode_npz(file: Path, window: Window = ()) -> Decoded:
    """Read a NumPy file of one's own.

    It has `images` and `labels`; further `clients`, `class_names`, and `test_images` with `test_labels`, and
    `test_clients`, if there are such. Without test images, every sixth image of a class (of a client, where these are
    known) is for testing. Images keep their size. Values of other types than uint8 are scaled as those of image files
    are.

    Args:
        file: made by `numpy.savez` or `numpy.savez_compressed`.
        window: values that become black and white; () takes the type's range.

    Raises:
        UserError: it has no such arrays, or arrays of other shapes.
    """
    arrays = read_arrays(file)
    images, labels = pixels(_of(arrays, "images", file), file, window), _of(arrays, "labels", file)
    names = names_of(arrays["class_names"].tolist(), "name", file) if "class_names" in arrays else None
    owners = clients_of(arrays["clients"], len(images), file) if "clients" in arrays else []
    if "test_images" in arrays:
        test_images = pixels(arrays["test_images"], file, window)
        check_shapes(images, test_images, file)
        (own, held_out), class_names = classes([labels, _of(arrays, "test_labels", file)], names, file)
        _check_lengths(file, images=images, labels=own)
        _check_lengths(file, test_images=test_images, test_labels=held_out)
        test_owners = clients_of(arrays["test_clients"], len(test_images), file) if "test_clients" in arrays else []
        splits = Split(images, own), Split(test_images, held_out)
        return Decoded(*splits, class_names, about_of(file), clients=owners, test_clients=test_owners)
    (own,), class_names = classes([labels], names, file)
    _check_lengths(file, images=images, labels=own)
    return split_off(Decoded(Split(images, own), Split(images[:0], own[:0]), class_names, about_of(file), [], owners))


def check_shapes(images: np.ndarray, test_images: np.ndarray, file: Path) -> None:
    """Raise UserError where images to train with and to test with are of different forms."""
    if images.shape[1:] != test_images.shape[1:]:
        form, other = (" x ".join(map(str, each.shape[1:])) for each in (images, test_images))
        raise UserError(f"{printable(str(file))} has images of {form} for training and of {other} for testing")


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a NumPy file; Python objects in it are never made.

    Raises:
        UserError: it is no such file, or it has Python objects.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            return {name: content[name] for name in content.files}
    except Exception as error:  # numpy and zip have errors of their own
        hint = ": save texts as np.array(texts, dtype=str)" if "allow_pickle" in str(error) else ""
        raise UserError(f"{printable(str(file))} is no readable .npz file ({error}){hint}") from error


def _of(arrays: Mapping[str, np.ndarray], name: str, file: Path) -> np.ndarray:
    if name not in arrays:
        there = printable(", ".join(sorted(arrays)))
        raise UserError(f"{printable(str(file))} has no array {name}: there are {there}")
    return arrays[name]


def pixels(images: np.ndarray, file: Path, window: Window = ()) -> np.ndarray:
    """Give images as uint8 [N, H, W, channels], whether their channels come first, last, or not at all.

    Where only the second axis can be channels, they come first, and the log says so.

    Raises:
        UserError: they are volumes, have other numbers of channels, or values outside the range.
    """
    shape = list(images.shape)
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and shape[3] not in CHANNELS and shape[1] in CHANNELS:
        images = images.transpose(0, 2, 3, 1)
        said = "%s: images of shape %s have their channels first, and are taken for %d x %d pixels of %d channels"
        log.info(said, printable(file.name), shape, *images.shape[1:])
    if images.ndim != 4 or images.shape[3] not in CHANNELS:
        can = "[N, H, W], [N, H, W, channels] and [N, channels, H, W] of 1 or 3 channels can be read"
        has_alpha = images.ndim == 4 and 4 in (shape[1], shape[3])
        hint = "; of RGBA, keep images[..., :3] or images[:, :3]" if has_alpha else ""
        raise UserError(f"{printable(str(file))} has images of shape {shape}: {can}{hint}")
    try:
        return scaled(images, window)
    except OutOfRangeError as error:
        low, high = error.found
        raise UserError(f"{printable(str(file))}: {error}; data.window=[{low:g},{high:g}] scales by these") from error
    except UnreadableError as error:
        raise UserError(f"{printable(str(file))}: {error}") from error


def classes(parts: Sequence[np.ndarray], names: Sequence[str] | None, file: Path) -> tuple[list[np.ndarray], list[str]]:
    """Turn labels, numbers or texts, into 0..K-1.

    Args:
        parts: labels, each [N] or [N, 1].
        names: of the classes that numbers stand for, if they are known.
        file: that they are from.

    Returns:
        The labels of each part, int64, and K names: those given, or the numbers and texts themselves.

    Raises:
        UserError: several labels an image, numbers without a name, or numbers that are no whole ones.

    Example:
        >>> classes([np.array(["no", "yes"]), np.array(["yes"])], None, Path("x"))
        ([array([0, 1]), array([1])], ['no', 'yes'])
    """
    where = printable(str(file))
    flat = [part[:, 0] if part.ndim == 2 and part.shape[1] == 1 else part for part in parts]
    flat = [_as_text(part, file) if part.dtype.kind in "SUO" else part for part in flat]
    if names is not None and len(set(names)) < len(names):
        raise UserError(f"{where} has a name of two classes: {printable(', '.join(names))}")
    for labels in flat:
        if labels.ndim != 1:
            raise UserError(
                f"{where} has labels of shape {list(labels.shape)}: an image needs one class, and several labels an "
                "image cannot be learned here"
            )
        if labels.dtype.kind == "f" and not (labels == np.rint(labels)).all():
            raise UserError(f"{where} has labels that are no whole numbers: they are no classes")
    if flat[0].dtype.kind in "fbiu":
        flat = [labels.astype(np.int64) for labels in flat]
    if names is not None and flat[0].dtype.kind in "iu":
        if outside := sorted({int(k) for labels in flat for k in np.unique(labels)} - set(range(len(names)))):
            raise UserError(f"{where} has the label {outside[0]}, and names of {len(names)} classes")
        return flat, list(names)
    known, trained = np.unique(np.concatenate(flat)), np.unique(flat[0])
    if strange := np.setdiff1d(known, trained).tolist():
        raise UserError(f"{where}: class {printable(str(strange[0]))} has examples for testing and none for training")
    return [np.searchsorted(known, labels) for labels in flat], [str(name) for name in known.tolist()]


def _as_text(labels: np.ndarray, file: Path) -> np.ndarray:
    return np.array(names_of(labels.reshape(-1).tolist(), "class", file), str).reshape(labels.shape)


def clients_of(clients: np.ndarray, count: int, file: Path) -> list[str]:
    """Give the name of every image's client: numbers as text.

    Raises:
        UserError: there is not one for every image.
    """
    if clients.shape not in ((count,), (count, 1)):
        raise UserError(f"{printable(str(file))} has clients of shape {list(clients.shape)} for {count} images")
    return names_of(clients.reshape(-1).tolist(), "client", file)


def names_of(values: Sequence[Any], what: str, file: Path) -> list[str]:
    """Give the text that each value stands for: whole numbers without a point, bytes as UTF-8, composed characters.

    Args:
        values: texts, bytes or numbers.
        what: they name.
        file: that they are from.

    Raises:
        UserError: one is missing, which files also write as NaN.

    Example:
        >>> names_of(["h 1 ", b"h2", 3.0, 3.5], "client", Path("x"))
        ['h 1', 'h2', '3', '3.5']
    """
    found = [_name_of(value) for value in values]
    if missing := found.count(""):
        raise UserError(f"{printable(str(file))}: {missing} of {len(found)} examples have no {what}")
    return found


def _name_of(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if value is None or value != value:
        return ""
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return normalize("NFC", text.strip())


def split_off(decoded: Decoded) -> Decoded:
    """Hold every sixth image of a class for testing, of each client's where clients are known.

    So the images of one client decide nothing about those of another.

    Raises:
        UserError: none has six.
    """
    train, owners = decoded.train, decoded.clients
    of = np.unique(owners, return_inverse=True)[1] if owners else np.zeros(len(train.labels), np.int64)
    is_test = every_sixth(of * (train.labels.max(initial=0) + 1) + train.labels)
    if not is_test.any():
        raise UserError("there is nothing for testing: give test images, or six of a class and more")
    rest = np.flatnonzero(~is_test)
    return decoded._replace(
        train=Split(train.images[rest], train.labels[rest]),
        test=Split(train.images[is_test], train.labels[is_test]),
        clients=[owners[place] for place in rest] if owners else [],
        test_clients=[owners[place] for place in np.flatnonzero(is_test)] if owners else [],
    )


def every_sixth(groups: np.ndarray) -> np.ndarray:
    """Mark every sixth example of each group, bool [N].

    Example:
        >>> every_sixth(np.zeros(7, int)).tolist()
        [False, False, False, False, False, True, False]
    """
    marked = np.zeros(len(groups), bool)
    for group in np.unique(groups):
        marked[np.flatnonzero(groups == group)[5::6]] = True
    return marked


def about_of(source: Path) -> dict[str, Any]:
    """Say where decoded images come from, for the store."""
    return {"source": str(source)}


def _check_lengths(file: Path, **arrays: np.ndarray) -> None:
    (first, images), (second, labels) = arrays.items()
    if len(images) != len(labels):
        raise UserError(f"{printable(str(file))} has {len(images)} {first} and {len(labels)} {second}")
