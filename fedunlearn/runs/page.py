"""What all pages that people get have in common: one look, light and dark, in one self-contained file."""

import base64
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, FunctionLoader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE = "#2b2f33", "#6b7178", "#b9bec4"  # of figures: words, lesser words, lines
IN_THE_DARK = {
    INK: "#e4e6e8", SOFT: "#a2a8af", LINE: "#565c63",
    "#2a6f97": "#62b0dc", "#6a994e": "#93c572", "#c8553d": "#f0876f", "#e09f3e": "#f0b860", "#7b2cbf": "#c08df0",
    "#bc4b8a": "#e58abd", "#5c4033": "#c9a28f", "#222222": "#e4e6e8", "#444444": "#c4c8cc",
}  # fmt: skip  # what a colour of a figure becomes on a dark page


class Picture(NamedTuple):
    """A figure for a light and for a dark page, each as a `data:` address of an SVG."""

    light: str
    dark: str


def rendered(package: str, name: str, /, **words: Any) -> str:
    """Fill in a template of a package; it may extend the templates that lie here."""
    return _templates(package).get_template(name).render(**words)


@cache
def _templates(package: str) -> Environment:
    def load(template: str) -> str | None:
        for folder in (files(package), files("fedunlearn.runs")):
            if (found := folder.joinpath(template)).is_file():
                return found.read_text(encoding="utf-8")
        return None

    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(load))


def encoded(page: str) -> bytes:
    """Encode a page; what is no text, as in a file name of another encoding, becomes a question mark."""
    return page.encode(errors="replace")


def literal(text: str) -> str:
    """Give a name as a figure can show it: what is no text or cannot be printed becomes a replacement character.

    Example:
        >>> literal("caf" + chr(0xDCE9) + chr(10) + "au lait")
        'caf� au lait'
    """
    return "".join(" " if c.isspace() else c if _can_be_drawn(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in this page's colours, and take every word literally: `$` begins no formula.

    A font may lack a letter, as of a Chinese name. The browser has others, so that nobody need be warned.
    """
    from matplotlib import rc_context

    coloured = {
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE, "xtick.color": SOFT, "ytick.color": SOFT,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": LINE,
    }  # fmt: skip
    plain = {"text.parse_math": False, "axes.unicode_minus": True, "svg.fonttype": "none", "svg.hashsalt": "fedunlearn"}
    looks = {"font.size": 9, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False}
    settings: Any = coloured | plain | looks
    with rc_context(settings), warnings.catch_warnings():
        for harmless in ("Glyph .* missing from font", "constrained_layout not applied"):
            warnings.filterwarnings("ignore", message=harmless)
        yield


def embedded(figure: "Figure") -> Picture:
    """Write a figure into addresses that a page can hold."""
    buffer = io.BytesIO()
    with drawing():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    light = dark = buffer.getvalue().decode()
    for colour, other in IN_THE_DARK.items():
        dark = dark.replace(colour, other)
    return Picture(_address(light), _address(dark))


def _can_be_drawn(character: str) -> bool:
    return character.isprintable() or character in "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"


def _address(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
