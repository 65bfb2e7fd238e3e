"""Atomic files: model states as safetensors, and small texts."""

import hashlib
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor, nn

from fedunlearn.errors import UserError

CURE = "restore the file, or start a new run"
NEW = ".new-"  # how names of files begin that are not written yet


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary file -> fsync -> rename -> fsync folder: after a crash `path` has its old or its new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=NEW)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, state: dict[str, Tensor], about: dict[str, str] | None = None) -> str:
    """Write `state`, and words about it, to `path` atomically; returns the file's SHA-256."""
    data = serialise_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, about)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def read(path: Path, *, sha256: str | None = None, cure: str = CURE) -> bytes:
    """The bytes of `path`.

    Raises:
        UserError: the file is missing, or not the one of that SHA-256; it ends with `cure`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): {cure}") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} was cut short or changed since it was written: {cure}")
    return data


def read_tensors(
    path: Path, *, sha256: str | None = None, cure: str = CURE
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of `path`, and the words about them.

    Raises:
        UserError: the file is missing, cut short or changed since it was written.
    """
    data = read(path, sha256=sha256, cure=cure)
    try:
        state = parse_tensors(data)
        with safe_open(path, "pt") as file:
            return state, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} was cut short ({error}): {cure}") from error


def load(
    path: Path, model: nn.Module, *, sha256: str | None = None, cure: str = CURE, beside: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Load `path` into `model`; returns what lies there beside it, under names that begin with one of `beside`.

    Raises:
        UserError: the file is missing, cut short, changed since it was written, or of another model.
    """
    state, _ = read_tensors(path, sha256=sha256, cure=cure)
    rest = {name: state.pop(name) for name in list(state) if name.startswith(beside)}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(
            f"{path} is of another model: {name} is {found.get(name, 'absent')} there, "
            f"{expected.get(name, 'absent')} in this run's model"
        )
    model.load_state_dict(state)
    return rest
