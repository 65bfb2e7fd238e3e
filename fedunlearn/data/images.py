"""Find image files in a tree, and read them into uint8 arrays that are all scaled alike."""

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from unicodedata import normalize

import numpy as np

from fedunlearn.data.dicom import OF_PILLOW, is_dicom, read_dicom
from fedunlearn.data.scaling import OutOfRangeError, UnreadableError, Window, scaled
from fedunlearn.errors import UserError, printable

if TYPE_CHECKING:
    from PIL import Image

OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini")
"""Files and folders that operating systems put beside images."""

Fit = Literal["stretch", "crop", "pad"]
LISTED = 20
"""Unreadable files that an error names."""
SECONDS = 10
"""Between two lines of the log that say how many images are decoded."""

log = logging.getLogger("fedunlearn")


class Found(NamedTuple):
    """What `find_images` finds below a folder.

    Attributes:
        files: relative to the folder; the files of a folder by name, then those of its subfolders.
        passed_over: how many files and folders were not taken, by kind.
    """

    files: list[Path]
    passed_over: Mapping[str, int]


def find_images(root: Path) -> Found:
    """Find all image files below a folder.

    Links are followed, but not into a folder that they are in. Hidden files and folders, those of operating systems,
    dangling links and everything that is no image are passed over and counted.

    Args:
        root: the folder; its own name may be anything.

    Raises:
        UserError: a folder that cannot be opened.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt"):
        ...         _ = (Path(root) / name).write_bytes(b"")
        ...     found = find_images(Path(root))
        >>> [str(file) for file in found.files], dict(found.passed_over)
        (['a.JPG', 'b.png'], {'hidden': 1, '.txt': 1})
    """
    passed_over: Counter[str] = Counter()
    files = [Path(path).relative_to(root) for path in image_paths(root, passed_over)]
    return Found(files, passed_over)


def image_paths(root: Path, passed_over: Counter[str] | None = None) -> Iterator[str]:
    """Give the paths of all image files below a folder, as `find_images` does, but in less time.

    Args:
        root: the folder, which the paths begin with.
        passed_over: counts, by kind, what is passed over.
    """
    return _walk(str(root), (), Counter() if passed_over is None else passed_over)


def _walk(folder: str, within: tuple[tuple[int, int], ...], passed_over: Counter[str]) -> Iterator[str]:
    """Give the images below a folder; `within` identifies the folders that it is in."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        stat = os.stat(folder)
    except OSError as error:
        raise UserError(f"{printable(folder)} cannot be opened ({error.strerror})") from error
    within = (*within, (stat.st_dev, stat.st_ino))
    folders = []
    for entry in entries:
        kind = _kind(entry, within)
        if kind == "folder":
            folders.append(entry.path)
        elif kind == "image":
            yield entry.path
        else:
            passed_over[kind] += 1
    for path in folders:
        yield from _walk(path, within, passed_over)


def _kind(entry: os.DirEntry, within: Sequence[tuple[int, int]]) -> str:
    """Say what an entry of a folder is: an image, a folder, or the kind of what is passed over."""
    if entry.name in OF_SYSTEMS:
        return entry.name
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            stat = entry.stat()
            return "loop of links" if (stat.st_dev, stat.st_ino) in within else "folder"
        if entry.is_file():
            ending = os.path.splitext(entry.name)[1].lower()
            return "image" if ending in OF_PILLOW or is_dicom(Path(entry)) else ending or "no ending"
    except OSError:  # a link of links that never ends
        return "dangling link"
    return "dangling link" if entry.is_symlink() else "neither file nor folder"


def say_passed_over(root: Path, passed_over: Mapping[str, int]) -> None:
    """Say in the log, in one line, what was passed over; nothing where that is nothing."""
    if passed_over:
        kinds = ", ".join(f"{count:,} {printable(kind)}" for kind, count in sorted(passed_over.items()))
        log.info("passed over in %s: %s", printable(str(root)), kinds)


def class_name(folder: str) -> str:
    """Give the text that a folder's name stands for: composed characters, and escapes for bytes that are no UTF-8.

    Example:
        >>> class_name("e" + chr(0x301)) == chr(0xE9), class_name("caf" + chr(0xDCE9))
        (True, 'caf\\\\udce9')
    """
    return normalize("NFC", folder.encode("utf-8", "backslashreplace").decode())


class Content(NamedTuple):
    """An image file that lies within another file.

    Attributes:
        name: that messages call it by.
        data: its bytes.
    """

    name: str
    data: bytes

    def __str__(self) -> str:
        """Give its name."""
        return self.name


class Reading(NamedTuple):
    """How files become images: every choice here makes another decoded copy.

    Attributes:
        size: pixels a side.
        fit: `stretch` to a square, `crop` the middle of the longer side, or `pad` the shorter side with black.
        exif: whether images are turned as their EXIF data say; else they stay as they are stored.
        window: values that become black and white, where images have more than 8 bits; () takes the type's range.
    """

    size: int = 32
    fit: Fit = "stretch"
    exif: bool = False
    window: Window = ()


def read_image(
    path: Path | str, size: int, *, fit: Fit = "stretch", exif: bool = False, window: Window = ()
) -> np.ndarray:
    """Read one image file.

    Values of more than 8 bits are scaled by their type's range or by `window`, never clipped without one
    (`scaling.scaled`). What is transparent is laid on white. The colours of CMYK and palettes become RGB.

    Args:
        path: of a file that Pillow or pydicom reads.
        size, fit, exif, window: as in `Reading`.

    Returns:
        uint8 [size, size, 3].

    Raises:
        UnreadableError: it is damaged, has several frames, or values outside the range.
        UserError: it is DICOM, and pydicom is not installed.
    """
    return _read(Path(path), Reading(size, fit, exif, window))[0]


class ImageReader:
    """Read images in any number of calls, then say once what there was to be said of all of them.

    Args:
        reading: how.
        total: images in all, for the log.
        clock: gives the time in seconds.

    Attributes:
        bad: unreadable files, and why.

    Example:
        >>> reader = ImageReader(Reading(8), total=1)
        >>> images, is_good = reader.read(["/no/such.png"], 1)
        >>> images.shape, is_good.tolist(), reader.bad
        ((0, 8, 8, 3), [False], {'/no/such.png': 'No such file or directory'})
    """

    def __init__(self, reading: Reading, *, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.reading = reading
        self.bad: dict[str, str] = {}
        self._total, self._done, self._turned = total, 0, 0
        self._clock, self._said = clock, clock()
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._outside: list[tuple[float, float]] = []
        self._highest: dict[float, float] = {}

    def read(self, paths: Iterable[Path | str | Content], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Read files one after another, and remember those that cannot be read.

        Args:
            paths: of files, or what lies within one.
            count: how many they are.

        Returns:
            Images uint8 [n, size, size, 3] of the n files that can be read, and which those are, bool [count].

        Raises:
            UserError: some are DICOM, and pydicom is not installed.
        """
        size, is_good = self.reading.size, np.ones(count, bool)
        images = np.empty((count, size, size, 3), np.uint8)
        for place, path in enumerate(paths):
            try:
                images[place], seen = _read(path if isinstance(path, Content) else Path(path), self.reading)
                self._note(seen)
            except UnreadableError as error:
                is_good[place], self.bad[str(path)] = False, str(error)
                if isinstance(error, OutOfRangeError):
                    self._outside.append(error.found)
            self._progress()
        return images if is_good.all() else images[is_good], is_good

    def conclude(self, *, skip_bad: bool = False) -> None:
        """Say how many images were resized, turned and skipped.

        Args:
            skip_bad: whether to go on without those that cannot be read.

        Raises:
            UserError: some cannot be read: the first twenty of them, with what is wrong, and their number.
        """
        if self.bad and not skip_bad:
            raise UserError(self._refusal())
        if self.bad:
            log.warning("data.skip_bad=true: %d of %d images are left out:%s", len(self.bad), self._done, self._list())
        self._say_resized()
        if self._turned and not self.reading.exif:
            log.info("%d images are turned by EXIF alone: read as stored (data.exif=true turns them)", self._turned)
        for white, highest in self._highest.items():
            if highest < white / 2:
                text = "values of images reach %g of %g: data.window=[0,%g] makes them brighter"
                log.warning(text, highest, white, highest)

    def _note(self, seen: "_Seen") -> None:
        self._sizes[seen.size] += 1
        self._turned += seen.is_turned
        if seen.white:
            self._highest[seen.white] = max(seen.highest, self._highest.get(seen.white, 0))

    def _progress(self) -> None:
        self._done += 1
        if (now := self._clock()) - self._said >= SECONDS:
            self._said = now
            log.info("decoded %s of %s images", f"{self._done:,}", f"{self._total:,}")

    def _say_resized(self) -> None:
        size = self.reading.size
        others = [shape for shape in self._sizes if shape != (size, size)]
        if others:
            low, high = min(others, key=_area), max(others, key=_area)
            text = f"{low[0]} x {low[1]}" + (f" to {high[0]} x {high[1]}" if low != high else "")
            count, how = sum(self._sizes[shape] for shape in others), self.reading.fit
            log.info(
                "%s images of %s pixels become %d x %d (data.image_size, data.fit=%s)",
                f"{count:,}",
                text,
                size,
                size,
                how,
            )

    def _list(self) -> str:
        lines = [f"\n  {printable(path)}: {printable(reason)}" for path, reason in list(self.bad.items())[:LISTED]]
        more = f"\n  and {len(self.bad) - LISTED} more" if len(self.bad) > LISTED else ""
        return "".join(lines) + more

    def _refusal(self) -> str:
        if len(self.bad) == 1:
            ((path, reason),) = self.bad.items()
            text = f"{printable(path)} is not a readable image ({printable(reason)}); "
        else:
            text = f"{len(self.bad)} of {self._done} files are not readable images:{self._list()}\n"
        if self._outside:
            low, high = min(0, *(low for low, _ in self._outside)), max(high for _, high in self._outside)
            text += f"data.window=[{low:g},{high:g}] would hold all values outside the range; "
        return f"{text}data.skip_bad=true goes on without"


def _area(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


class _Seen(NamedTuple):
    """What is to be said of an image: width and height, whether EXIF turns it, white's value and the highest one."""

    size: tuple[int, int]
    is_turned: bool
    white: float = 0
    highest: float = 0


def _read(file: Path | Content, how: Reading) -> tuple[np.ndarray, _Seen]:
    from PIL import Image

    with _named(file):
        if isinstance(file, Path) and is_dicom(file):
            image = Image.fromarray(read_dicom(file, how.window))
            return _fitted(image.convert("RGB"), how), _Seen(image.size, False)
        with Image.open(file if isinstance(file, Path) else BytesIO(file.data)) as opened:
            return _of_pillow(opened, how)


def _of_pillow(opened: "Image.Image", how: Reading) -> tuple[np.ndarray, _Seen]:
    from PIL import ImageOps

    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format != "MPO":  # of those that phones make, the first is the image
        raise UnreadableError(f"it has {frames} frames: save each as an image of its own")
    opened.load()
    is_turned = _is_turned(opened)
    image = ImageOps.exif_transpose(opened) if how.exif and is_turned else opened
    seen = _Seen(image.size, is_turned)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _of_many_bits(np.asarray(image), how, seen)
    return _fitted(_rgb(image), how), seen


ORIENTATION = 0x0112
"""EXIF's tag of how an image is turned: 2 to 8; 1 is as stored."""


def _is_turned(opened: "Image.Image") -> bool:
    """Say whether EXIF data turn an image; damaged ones, which each decoder names in a way of its own, do not."""
    with suppress(Exception):
        return opened.getexif().get(ORIENTATION) in range(2, 9)
    return False


def _of_many_bits(values: np.ndarray, how: Reading, seen: _Seen) -> tuple[np.ndarray, _Seen]:
    from PIL import Image

    grey = scaled(values, how.window, whole=65_535)
    if not how.window and values.dtype.kind in "iu":
        seen = seen._replace(white=65_535, highest=float(values.max()))
    return _fitted(Image.fromarray(grey).convert("RGB"), how), seen


def _rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _fitted(image: "Image.Image", how: Reading) -> np.ndarray:
    from PIL import Image, ImageOps

    square = (how.size, how.size)
    if how.fit == "crop":
        return np.asarray(ImageOps.fit(image, square, Image.Resampling.BICUBIC))
    if how.fit == "pad":
        if 2 * how.size * min(image.size) <= max(image.size):
            raise UnreadableError(f"of {image.width} x {image.height} pixels data.fit=pad would leave nothing")
        return np.asarray(ImageOps.pad(image, square, Image.Resampling.BICUBIC, "black"))
    return np.asarray(image.resize(square))


@contextmanager
def _named(path: Path | Content) -> Iterator[None]:
    """Turn what decoders raise over a file into an UnreadableError."""
    try:
        yield
    except (UserError, UnreadableError, MemoryError):
        raise
    except OSError as error:
        raise UnreadableError(error.strerror or re.sub(r" ('.*'|<.*>)$", "", str(error))) from error
    except Exception as error:  # each decoder has errors of its own
        raise UnreadableError(str(error) or type(error).__name__) from error
