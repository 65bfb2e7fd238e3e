"""A signed receipt as an object: its file, what it says, and whether that is valid."""

from pathlib import Path
from typing import Any

from fedunlearn.live.cards import Page, card
from fedunlearn.runs.ledger import FAILED
from fedunlearn.runs.statement import Receipt as Content
from fedunlearn.runs.verifying import envelope_of, verified


class Receipt:
    """What became of a forget request, as its signed file says.

    Fields of the receipt are attributes: `state`, `clients`, `strategy`, `figures`, `after` and the others.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        content: what it says.

    Example:
        >>> receipt = run.forget(clients=[3])  # doctest: +SKIP
        >>> receipt.state, receipt.verify()  # doctest: +SKIP
        ('COMPLETED', True)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = verified(path.read_bytes())

    def __getattr__(self, name: str) -> Any:
        if name in Content.model_fields:
            return getattr(self.content, name)
        raise AttributeError(f"a receipt has no {name!r}: {', '.join(Content.model_fields)}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *Content.model_fields]

    def __repr__(self) -> str:
        return f"Receipt({self.request} of run {self.run}, {self.content.who}: {self.state}, {self.path})"

    def verify(self, *, key: str = "", log: Path | str | None = None) -> bool:
        """Check the file again, offline.

        Args:
            key: id of the key that must have signed; without one, of whatever run the receipt names.
            log: the run's `ledger.sqlite`, in which the events must be too.

        Returns:
            True.

        Raises:
            UserError: with the first thing that is wrong.
        """
        verified(self.path.read_bytes(), key=key, log=None if log is None else Path(log))
        return True

    def as_dict(self) -> dict[str, Any]:
        """Give all fields as plain Python."""
        return self.content.model_dump()

    @property
    def page(self) -> Page:
        """The same for people, beside the file."""
        return Page(self.path.with_suffix(".html"))

    def _repr_html_(self) -> str:
        facts: list[tuple[str, object]] = [("reason", self.reason)] if self.reason else []
        if self.strategy:
            facts.append(("applied", f"{(self.applied_at or '')[:19].replace('T', ' ')} UTC, strategy {self.strategy}"))
        for one in self.figures:
            if one.before is not None and one.after is not None:
                facts.append(
                    (
                        f"class accuracy, {self.content.shown(one.of)}",
                        f"{one.before:.3f} → {one.after:.3f} ± {one.after_error:.3f}",
                    )
                )
        (signer, *_) = envelope_of(self.path.read_bytes()).signatures
        facts += [("signed with", f"{signer[:16]}…"), ("file", self.path)]
        level = "failed" if self.state in FAILED else "good"
        return card(f"Receipt {self.request} of run {self.run}, {self.content.who}", self.state, facts, level=level)
