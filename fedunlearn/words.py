"""Settings as people type them: `name=value`, in words or in one text, and as Hydra reads them."""

import re
from pathlib import Path

from pydantic import BaseModel

from fedunlearn.errors import UserError
from fedunlearn.schema import fields_of, is_mapping

_SCALES = ("auto", "full", "laptop")
_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}


def split_words(text: str) -> list[str]:
    """Split a text into words, which begin where `name=` does, but not within brackets.

    Example:
        >>> split_words("a=1 b={6: ['c d=e']} c=x y")
        ['a=1', "b={6: ['c d=e']}", 'c=x y']
    """
    words: list[str] = []
    for piece in re.split(r"(\s+)(?=[~+]*[\w./@]+=)", text.strip()):
        if words and (not piece.strip() or _is_open(words[-1])):
            words[-1] += piece
        else:
            words.append(piece)
    return [word.strip() for word in words if word.strip()]


def _is_open(word: str) -> bool:
    """Say whether a bracket is still open at the end of a word; those in quotes do not count."""
    plain = re.sub(r"""(?<=[\[{,:\s])("(?:\\.|[^"\\])*("|$)|'(?:\\.|[^'\\])*('|$))""", "", word)
    return sum(_BRACKETS.get(character, 0) for character in plain) > 0


def texts_of(words: list[str], schema: type[BaseModel]) -> dict[str, str]:
    """Give the settings that are text, as they were typed: Hydra would read 1.10 as a number."""
    texts = {name for name, declared in fields_of(schema) if declared.annotation is str}
    pairs = [word.partition("=")[::2] for word in words]
    return {name: unquoted(value) for name, value in pairs if name in texts}


def unquoted(text: str) -> str:
    """Give a text without the quotes around it, if there are any: a shell has left those to Flower's run config."""
    quoted = re.fullmatch(r"(['\"])(.*)\1", text, re.DOTALL)
    return quoted[2] if quoted else text


def for_hydra(word: str, schema: type[BaseModel]) -> str:
    """Give a word as Hydra reads it, with `++` before keys that no default has: pydantic knows which there may be."""
    name, _, value = word.partition("=")
    mappings = tuple(known for known, declared in fields_of(schema) if is_mapping(declared))
    free = name.startswith(mappings) or (value.startswith("{") and name.isidentifier())
    return f"{'++' if free else ''}{word}"


def with_scale(words: list[str], folder: Path) -> list[str]:
    """Replace scale=auto, also where it is only implied, by laptop or full."""
    rest = [word for word in words if not word.startswith("scale=")]
    named = [word.removeprefix("scale=") for word in words if word not in rest]
    scale = named[-1] if named else "auto"
    if scale not in _SCALES:
        raise UserError(f"scale={scale} is not one of {', '.join(_SCALES)}")
    if not (folder / "scale").is_dir():
        return rest
    if scale == "auto":
        import torch

        scale = "full" if torch.cuda.is_available() else "laptop"
    return [f"scale={scale}", *rest]
