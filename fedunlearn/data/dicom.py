"""Read DICOM images, by pydicom, an optional package."""

from pathlib import Path
from typing import Any

import numpy as np

from fedunlearn.data.scaling import UnreadableError, Window, scaled
from fedunlearn.errors import UserError, printable

ENDINGS = (".dcm", ".dicom")
OF_PILLOW = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".j2k",
)  # fmt: skip
"""Endings of the image files that Pillow reads, in small letters."""
OTHERS = (*OF_PILLOW, ".txt", ".csv", ".json", ".xml")
"""Endings of files that are not looked into."""
MAGIC, PLACE = b"DICM", 128


def is_dicom(path: Path) -> bool:
    """Say whether a file is DICOM: by its ending, or, since many have none, by its first bytes.

    Files with the ending of another image format are not opened.
    """
    if path.suffix.lower() in ENDINGS:
        return True
    if path.suffix.lower() in OTHERS or path.name == "DICOMDIR":
        return False
    with path.open("rb") as file:
        return file.read(PLACE + len(MAGIC))[PLACE:] == MAGIC


def read_dicom(path: Path, window: Window = ()) -> np.ndarray:
    """Read the pixels of a DICOM file as a radiologist would see them.

    Stored values are rescaled (slope and intercept), then `window`, or else the file's own first window, decides what
    is black and white, or else the range of the bits stored. MONOCHROME1 is inverted.

    Args:
        path: of the file.
        window: low and high, in rescaled values such as Hounsfield units.

    Returns:
        uint8 [H, W], or [H, W, 3] in colour.

    Raises:
        UnreadableError: it has several frames.
        UserError: pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.pixels.processing import apply_modality_lut
    except ImportError as error:
        raise UserError(
            f"{printable(str(path))} is DICOM, which the package pydicom reads: pip install 'fedunlearn[dicom]'"
        ) from error
    image = pydicom.dcmread(path)
    if (frames := int(image.get("NumberOfFrames") or 1)) > 1:
        raise UnreadableError(f"it has {frames} frames: save each as an image of its own")
    if image.get("SamplesPerPixel", 1) > 1 or image.PhotometricInterpretation == "PALETTE COLOR":
        return _coloured(image)
    low, high = window or _own_window(image) or _range(image)
    grey = scaled(apply_modality_lut(image.pixel_array, image).astype(np.float64), (low, high))
    return 255 - grey if image.PhotometricInterpretation == "MONOCHROME1" else grey


def _coloured(image: Any) -> np.ndarray:
    from pydicom.pixels.processing import apply_color_lut

    # pydicom gives YBR as RGB
    is_palette = image.PhotometricInterpretation == "PALETTE COLOR"
    return scaled(apply_color_lut(image.pixel_array, image) if is_palette else image.pixel_array)


def _own_window(image: Any) -> Window:
    """Give the values that the file's first window shows black and white (DICOM PS3.3, C.11.2.1.2); () for none."""
    centre, width = _first(image.get("WindowCenter")), _first(image.get("WindowWidth"))
    if centre is None or width is None or width <= 1:
        return ()
    if image.get("VOILUTFunction") == "LINEAR_EXACT":
        return centre - width / 2, centre + width / 2
    return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2


def _first(value: Any) -> float | None:
    """Give the first of what may be one number, several, or none."""
    values = [value] if isinstance(value, int | float | str) else list(value or ())
    return float(values[0]) if values else None


def _range(image: Any) -> tuple[float, float]:
    """Give the lowest and the highest value that the bits stored can have, rescaled."""
    values, is_signed = 2**image.BitsStored, image.get("PixelRepresentation", 0)
    stored = np.array([0, values - 1]) - (values // 2 if is_signed else 0)
    low, high = sorted(stored * float(image.get("RescaleSlope", 1)) + float(image.get("RescaleIntercept", 0)))
    return float(low), float(high)
