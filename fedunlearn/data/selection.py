"""Select some of a client's images: by class, by patient, one by one."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from posixpath import normpath
from typing import Any
from unicodedata import normalize

import numpy as np

from fedunlearn.data.images import class_name
from fedunlearn.errors import printable


@dataclass(frozen=True)
class Selection:
    """Say which images are meant: those that fit in each respect that is named.

    Attributes:
        classes: numbers of classes, in ascending order; empty for any.
        patients: as the data set names them; empty for any.
        examples: names of images, as the data set names them; empty for any.

    Example:
        >>> Selection((5,)).of(np.array([5, 0, 5]), ["p1", "p1", "p2"], ["a", "b", "c"])
        array([ True, False,  True])
        >>> Selection((5,), ("p2",)).of(np.array([5, 0, 5]), ["p1", "p1", "p2"], ["a", "b", "c"])
        array([False, False,  True])
    """

    classes: tuple[int, ...] = ()
    patients: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    @classmethod
    def by(
        cls, classes: Collection[int] = (), patients: Collection[str] = (), examples: Collection[str] = ()
    ) -> "Selection":
        """Make a selection of names in any order, each as often as it is there, and in any spelling."""
        whose, which = {normalize("NFC", name.strip()) for name in patients}, set(map(image_name, examples))
        return cls(tuple(sorted(set(classes))), tuple(sorted(whose)), tuple(sorted(which)))

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Selection":
        """Read what `content` gave.

        Raises:
            TypeError, ValueError: it is no selection.
        """
        classes = tuple(content.get("classes", ()))
        if not all(type(number) is int and number >= 0 for number in classes):
            raise ValueError(f"{list(classes)} are no numbers of classes")
        names = tuple(tuple(content.get(kind, ())) for kind in ("patients", "examples"))
        if not all(isinstance(name, str) for each in names for name in each):
            raise ValueError("patients and images have names that are text")
        return cls(classes, *names)

    def content(self) -> dict[str, Any]:
        """Give what is named, for JSON; what is not named is not there."""
        return {name: list(values) for name, values in asdict(self).items() if values}

    @property
    def is_of_classes(self) -> bool:
        """Whether classes alone are named."""
        return bool(self.classes) and not self.patients and not self.examples

    @property
    def is_of_examples(self) -> bool:
        """Whether single images alone are named."""
        return bool(self.examples) and not self.classes and not self.patients

    def __bool__(self) -> bool:
        return bool(self.classes or self.patients or self.examples)

    def of(self, labels: np.ndarray, patients: Sequence[str] | None, examples: Sequence[str]) -> np.ndarray:
        """Say which of N images are meant.

        Args:
            labels: their classes, [N].
            patients: whose they are, N names; None where nobody knows, or none is named.
            examples: their names, N; none where none is named.

        Returns:
            bool [N].
        """
        meant = np.ones(len(labels), bool)
        if self.classes:
            meant &= np.isin(labels, self.classes)
        if self.patients:
            meant &= _among(patients, self.patients) if patients is not None else False
        if self.examples:
            meant &= _among(examples, self.examples)
        return meant

    def may_share(self, other: "Selection") -> bool:
        """Say whether an image may be meant by both, as far as names tell.

        Example:
            >>> Selection((5,)).may_share(Selection((), ("p1",))), Selection((5,)).may_share(Selection((7,), ("p1",)))
            (True, False)
        """
        named = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return not any(own and others and set(own).isdisjoint(others) for own, others in named)

    def in_words(self, class_names: Sequence[str] = ()) -> str:
        """Say what is meant, as `class 5 (frog)`, or by names alone if one of them is a number, as in commands.

        Args:
            class_names: of the data set, where they are known.
        """
        names = {k: printable(class_names[k]) for k in self.classes if k < len(class_names)}
        if not has_numbers(class_names):
            names = {k: f"{k} ({name})" for k, name in names.items()}
        classes = [names.get(k, str(k)) for k in self.classes]
        patients = list(map(printable, self.patients))
        said = [_listed("class", "classes", classes), _listed("patient", "patients", patients)]
        if self.examples:
            said.append(f"{len(self.examples)} named image{'s' if len(self.examples) > 1 else ''}")
        return ", ".join(filter(None, said))


@dataclass(frozen=True)
class Portion:
    """Some images of a client that are to be forgotten while the rest of them stay.

    A portion is a client to every strategy: it has a number of its own, from the number of clients on. Images that
    portions of lower numbers have of the same client are not among its own.

    Attributes:
        number: of the portion.
        client: whose images they are.
        selection: which of them.
    """

    number: int
    client: int
    selection: Selection

    @classmethod
    def read(cls, number: int, content: Mapping[str, Any]) -> "Portion":
        """Read what `content` gave.

        Raises:
            TypeError, ValueError, KeyError: it is no portion.
        """
        return cls(number, int(content["client"]), Selection.read(content))

    def content(self) -> dict[str, Any]:
        """Give all but the number, for JSON."""
        return {"client": self.client, **self.selection.content()}


def image_name(path: str) -> str:
    """Give the name of an image: its path with slashes, without detours, in composed characters.

    Example:
        >>> image_name(".\\\\a\\\\1.png"), image_name("b//2.png"), image_name("17")
        ('a/1.png', 'b/2.png', '17')
    """
    return class_name(normpath(path.replace("\\", "/")))


def has_numbers(names: Sequence[str]) -> bool:
    """Say whether a name is a number: then a number that somebody types is a name, and never a place in the list.

    Example:
        >>> has_numbers(["a", "007"]), has_numbers(["hospital_1", "2nd", "1e999"])
        (True, False)
    """
    return any(map(_is_number, names))


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(normalize("NFKC", name)))
    except ValueError:
        return False


def _among(names: Sequence[str], wanted: Collection[str]) -> np.ndarray:
    known = frozenset(wanted)
    return np.fromiter((name in known for name in names), bool, len(names))


def _listed(one: str, several: str, names: Sequence[str]) -> str:
    return f"{one if len(names) == 1 else several} {', '.join(names)}" if names else ""
