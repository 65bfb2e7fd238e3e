"""Checkpoints: tensors as safetensors files, written atomically and read with care."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor, nn

from fedunlearn.errors import UserError
from fedunlearn.runs.files import write_atomically

BESIDE = {"momentum": "momentum.", "frozen": "frozen.", "predictions": "predictions."}
"""What the server keeps beside the model, and how the names of these tensors begin."""
HINT = "restore the file, or start a new run"
LATER = {"pruned_classes"}  # marks that checkpoints of earlier versions lack: nothing is marked there


def save(path: Path, state: dict[str, Tensor], about: dict[str, str] | None = None) -> str:
    """Write `state`, and words about it, to `path` atomically; returns the file's SHA-256."""
    data = serialise_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, about)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def read(path: Path, *, sha256: str | None = None, hint: str = HINT) -> bytes:
    """The bytes of `path`.

    Raises:
        UserError: the file is missing, or not the one of that SHA-256; it ends with `hint`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): {hint}") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} was cut short or changed since it was written: {hint}")
    return data


def read_tensors(
    path: Path, *, sha256: str | None = None, hint: str = HINT
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of `path`, and the words about them.

    Raises:
        UserError: the file is missing, cut short or changed since it was written.
    """
    data = read(path, sha256=sha256, hint=hint)
    try:
        state = parse_tensors(data)
        with safe_open(path, "pt") as file:
            return state, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} was cut short ({error}): {hint}") from error


def load(
    path: Path, model: nn.Module, *, sha256: str | None = None, hint: str = HINT, beside: tuple[str, ...] | None = ()
) -> dict[str, Tensor]:
    """Load `path` into `model`; returns what lies there beside it.

    Args:
        beside: how names of tensors begin that are no part of the model; None for any.

    Raises:
        UserError: the file is missing, cut short, changed since it was written, or of another model.
    """
    state, _ = read_tensors(path, sha256=sha256, hint=hint)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    also = [name for name in state if (name not in expected if beside is None else name.startswith(beside))]
    rest = {name: state.pop(name) for name in also}
    state |= {name: torch.zeros_like(model.state_dict()[name]) for name in expected.keys() & LATER - state.keys()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(
            f"{path} is of another model: {name} is {found.get(name, 'absent')} there, "
            f"{expected.get(name, 'absent')} in this run's model"
        )
    model.load_state_dict(state)
    return rest
