"""What a notebook shows of a run, a receipt and an audit: a small card, and pages that a run has written."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from fedunlearn.runs.page import drawing, rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 600  # pixels of a page in a notebook


def card(title: str, state: str, facts: Sequence[tuple[str, object]], *, level: str = "plain", table: str = "") -> str:
    """Write a card in HTML.

    Args:
        title: what it is about.
        state: a word or two.
        facts: names and values.
        level: how the state is to be taken, as verdicts have it.
        table: HTML that follows.
    """
    return rendered(
        "fedunlearn.live", "card.html.jinja", title=title, state=state, facts=facts, level=level, table=table
    )


@dataclass(frozen=True)
class Page:
    """A page for people, which a notebook shows in place.

    Attributes:
        path: its file, self-contained.
    """

    path: Path

    @property
    def html(self) -> str:
        """The page itself."""
        return self.path.read_text(encoding="utf-8")

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self.html)}" title="{escape(self.path.name)}" '
            f'style="width:100%;height:{HEIGHT}px;border:0"></iframe>'
        )


def shown(figure: "Figure") -> "Figure":
    """Let a notebook show a figure that pyplot does not know."""

    def png() -> bytes:
        buffer = io.BytesIO()
        with drawing():
            figure.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()

    vars(figure)["_repr_png_"] = png
    return figure
