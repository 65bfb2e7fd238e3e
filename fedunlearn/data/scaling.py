"""Map numbers of any type to 0..255, by the range of the type, so that all images of a data set are scaled alike."""

import numpy as np

Window = tuple[()] | tuple[float, float]
"""The values that become black and white; () for the range of the type."""


class UnreadableError(ValueError):
    """A file is no image that can be read: its text says why."""


class OutOfRangeError(UnreadableError):
    """An image has values that the range does not hold.

    Args:
        found: the lowest and the highest.
        allowed: black and white.
    """

    def __init__(self, found: tuple[float, float], allowed: tuple[float, float]) -> None:
        super().__init__(f"its values {found[0]:g}..{found[1]:g} are not in {allowed[0]:g}..{allowed[1]:g}")
        self.found = found


def scaled(values: np.ndarray, window: Window = (), *, whole: int = 255) -> np.ndarray:
    """Map values linearly to 0..255, and round.

    x -> 255 (x - low) / (high - low). Without a window, low and high depend on the type alone, never on the values:
    an image looks the same whatever others there are. What lies outside is refused. With a window, which somebody has
    chosen, what lies outside becomes black or white.

    Args:
        values: of any shape; those of type uint8 stay as they are.
        window: low and high.
        whole: what is white in numbers of a type without a range of its own: int16, int32, int64 and uint32.

    Returns:
        uint8, in the same shape.

    Raises:
        OutOfRangeError: values outside the range.
        UnreadableError: values that are no finite numbers.

    Example:
        >>> scaled(np.array([0, 20_000, 65_535], np.uint16)), scaled(np.array([0.0, 0.5, 1.0]))
        (array([  0,  78, 255], dtype=uint8), array([  0, 128, 255], dtype=uint8))
        >>> scaled(np.array([-2000, 0, 400]), (-1000, 400))
        array([  0, 182, 255], dtype=uint8)
    """
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8)
    if values.dtype.kind not in "buif":
        raise UnreadableError(f"its values are {values.dtype}, no numbers")
    found = float(values.min()), float(values.max())
    if not np.isfinite(found).all():
        raise UnreadableError("it has values that are no finite numbers")
    low, high = window or range_of(values.dtype, whole)
    if not window and (found[0] < low or found[1] > high):
        raise OutOfRangeError(found, (low, high))
    share = (np.clip(values.astype(np.float64), low, high) - low) / (high - low)
    return np.rint(255 * share).astype(np.uint8)


def range_of(dtype: np.dtype, whole: int = 255) -> tuple[float, float]:
    """Give the values of black and white in numbers of a type: 0..1 in bool and float, 0..65535 in uint16.

    Example:
        >>> range_of(np.dtype(np.uint16)), range_of(np.dtype(np.int64))
        ((0, 65535), (0, 255))
    """
    if dtype.kind in "bf":
        return 0, 1
    if dtype in (np.uint8, np.uint16):
        return 0, int(np.iinfo(dtype).max)
    return 0, whole
