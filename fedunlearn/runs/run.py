"""One run: its folder with settings, ledger, checkpoints and metrics, and the door for requests from outside."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedunlearn.config import Config, check_clients, stored
from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError
from fedunlearn.naming import MOST_NAMED, listed, name_of, named, numbers_of, with_portions
from fedunlearn.runs.door import RequestHandle
from fedunlearn.runs.events import TamperedError
from fedunlearn.runs.files import named_in_errors, sha256_of, sync
from fedunlearn.runs.ledger import FORGOTTEN, Ledger, Request
from fedunlearn.runs.lock import is_locked
from fedunlearn.runs.rows import check as check_row
from fedunlearn.runs.signed import CANCEL, FORGET, SignedRequest, UnsignedError, action_of, check
from fedunlearn.schema import check_text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from fedunlearn.build import Images
    from fedunlearn.nn.model import TwoHeadModel

log = getLogger("fedunlearn")

# what reads or writes tensors imports torch when it is called: a look at the ledger must not wait for it


@dataclass
class Run:
    """A run's folder.

    Attributes:
        folder: where everything lies.
        config: the settings it was started with.
        ledger: its requests, its current checkpoint, its audit chain.
        listeners: called with every row that is recorded.

    Example:
        >>> from fedunlearn.runs.home import open_run
        >>> run = open_run("demo")  # doctest: +SKIP
        >>> run.metrics()[-1]["test"]["class"]  # doctest: +SKIP
        0.95
    """

    folder: Path
    config: Config
    ledger: Ledger
    listeners: list[Callable[[dict[str, Any]], None]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.ledger.names = self.names

    @classmethod
    def opened(cls, folder: Path) -> "Run":
        """Open the run in `folder` to look at it and to ask for something; another process may hold it."""
        ledger = open_ledger(folder)
        try:
            return cls(folder, stored_config(folder), ledger)
        except BaseException:
            ledger.close()
            raise

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def home(self) -> Path:
        """The state folder that the run lies in."""
        return self.folder.parent.parent

    def config_here(self) -> Config:
        """Give the settings with the state folder that the run lies in now."""
        return self.config.model_copy(update={"home": str(self.home)})

    def named(self, clients: Collection[int], *, capital: bool = False, most: int = MOST_NAMED) -> str:
        """Name clients in a sentence, as `client hospital_b` or `clients 3 and 5`."""
        return named([*clients], self.names(), capital=capital, most=most)

    def names(self) -> Sequence[str]:
        """List the names of all clients, and of the portions of clients that were asked about; none without both."""
        portions = self.ledger.portions()
        class_names, examples = self.class_names() if portions else [], self.ledger.examples()
        of_all = {
            n for request in self.ledger.requests() if request.detail.get("all_clients") for n in request.portions
        }
        return with_portions(self.config.partition.names, portions, class_names, examples, of_all)

    def client_names(self, clients: Iterable[int]) -> list[str]:
        """List the names of clients, where they have some; else none."""
        names = self.config.partition.names
        return [names[client] for client in clients] if names else []

    def numbers_of(self, clients: Iterable[int | str]) -> list[int]:
        """Give the numbers of clients by what somebody calls them, without repetition.

        Args:
            clients: their names; or their numbers, where no client's name is a number.

        Raises:
            UserError: nobody has such a name.
        """
        return list(dict.fromkeys(numbers_of(map(str, listed(clients)), self.config.partition.names)))

    # For whoever asks from outside -------------------------------------------------------------------------------

    def is_live(self) -> bool:
        """Say whether a process holds the run."""
        return is_locked(self.folder)

    def request(self, clients: Iterable[int | str], **about: Any) -> RequestHandle:
        """Ask for clients to be forgotten, or for some of their images, together.

        Args:
            clients: as somebody calls them: their names; or their numbers, where no client's name is a number.
            about: who asks, and for what else: as `file` takes it.

        Returns:
            A handle on the new request and on earlier ones that cover some of the clients.

        Raises:
            UserError: nobody has such a name, or as `file` says.
        """
        return self.file(self.numbers_of(clients), **about)

    def file(
        self,
        clients: Collection[int],
        *,
        by: str = "",
        right: str = "",
        signed: SignedRequest | None = None,
        how: Mapping[str, Any] | None = None,
        selection: Selection | None = None,
    ) -> RequestHandle:
        """File a request for clients to be forgotten, or for some of their images, together.

        A live run takes the request at its next round boundary. Otherwise nobody does, until somebody serves the run.

        Args:
            clients: their numbers in the run; none, with a selection, for all clients that have such images.
            by: who asks; the receipt says it.
            right: by what right.
            signed: what the clients' key has signed.
            how: settings that are others for this request, as `fedunlearn.federation.strategy.chosen` gives them.
            selection: which of the clients' images are meant; all by default.

        Returns:
            A handle on the new request and on earlier ones that cover some of the clients.

        Whoever files what was signed once more gets the request that there is; where that is void, nothing is filed.

        Raises:
            UserError: a client is not in 0..C-1, the run has no sound checkpoint to forget from, or the request needs a
                signature that it does not have; this is written down.
        """
        wanted = self.meant(clients, selection)
        if earlier := self._filed_before(wanted, signed, selection):
            return self.handle(request.id for request in earlier)
        self.check_signed(signed, wanted, action=action_of(selection))
        live, current = self.is_live(), self.ledger.current()
        if not live:
            self.check_checkpoint()
        requests = self.ledger.file(
            wanted,
            not_before=current.round + 1 if live and current else 0,
            months=self.config.forget.due_months,
            by=by,
            right=right,
            signed=asdict(signed) if signed else None,
            how=how,
            selection=selection,
            all_clients=not clients,
            first_portion=self.config.clients,
        )
        return self.handle(request.id for request in requests)

    def _filed_before(
        self, clients: Collection[int], signed: SignedRequest | None, selection: Selection | None
    ) -> list[Request]:
        """Give the requests that were filed with the very same signature, as whoever repeats a command sends it."""
        if signed is None:
            return []
        found = self.ledger.covering(clients, selection)
        return found if any(request.detail.get("signed") == asdict(signed) for request in found) else []

    def handle(self, request_ids: Iterable[str]) -> RequestHandle:
        """Give a handle on requests, which reads the run's ledger as long as that is open."""
        return RequestHandle(self.folder, tuple(request_ids), partial(nullcontext, self.ledger))

    def meant(self, clients: Collection[int], selection: Selection | None = None) -> list[int]:
        """Give the clients whose images a request is about.

        Args:
            clients: their numbers; none, with a selection, for all that are not forgotten.
            selection: which of their images are meant.

        Raises:
            UserError: there is no such client, class, or none that is left.
        """
        all_clients = set(range(self.config.clients)) - set(self.ledger.clients_in(FORGOTTEN))
        for name in (*selection.patients, *selection.examples) if selection else ():
            check_text(name)
            if not name:
                raise UserError("a patient has no name: who is not named is nobody")
        wanted = sorted(set(clients) or (all_clients if selection else set()))
        if not clients and not selection:
            raise UserError("nothing is named to forget: name clients, classes, patients or images")
        check_clients(wanted, self.config.clients)
        names = self.class_names() if selection and selection.classes else []
        for class_ in selection.classes if selection else ():
            if class_ >= len(names):
                raise UserError(f"class {class_} is not in 0..{len(names) - 1}")
        return wanted

    def cancel(self, request_id: str, *, signed: SignedRequest | None = None) -> Request:
        """Take a request back that was not taken up, or was refused.

        Raises:
            UserError: it was, there is none, or that needs a signature; this is written down.
        """
        request = self.ledger.request(request_id)
        self.check_signed(signed, request.owners, action=f"{CANCEL} {request_id}")
        return self.ledger.cancel(request_id, signed=asdict(signed) if signed else None)

    def check_signed(self, signed: SignedRequest | None, clients: Collection[int], *, action: str = FORGET) -> None:
        """Raise UserError, and write it down, where a signature is needed or given and is not good."""
        try:
            self.would_take(signed, clients, action=action)
        except UnsignedError as error:
            self.ledger.write_down(clients, action, str(error))
            raise UserError(f"the request to {action} {self.named(sorted(clients))} is turned away: {error}") from error

    def would_take(self, signed: SignedRequest | None, clients: Collection[int], *, action: str = FORGET) -> None:
        """Raise UnsignedError where a signature is needed or given and is not good."""
        forget = self.config.forget
        if forget.signed or signed:
            about = {"run": self.ledger.key, "owners": self.config.owner_keys, "at": datetime.now(UTC)}
            about |= {"name": partial(name_of, names=self.config.partition.names)}
            check(signed, clients, action=action, used=self.ledger.nonces(), **about)

    def check_checkpoint(self) -> None:
        """Raise UserError unless there is a sound checkpoint."""
        from fedunlearn.runs import checkpoint

        current = self.ledger.current()
        if current is None:
            raise UserError(f"run {self.name} has no checkpoint yet: start it again with run={self.name}")
        checkpoint.read(self.folder / "checkpoints" / current.checkpoint, sha256=current.sha256)

    def model(self) -> "TwoHeadModel":
        """Load the current model, in eval mode on the CPU.

        Raises:
            UserError: there is no checkpoint, or it was damaged.
        """
        from fedunlearn.build import model_of

        self.check_checkpoint()
        model = model_of(self.config, self.images())
        self.restore(model, beside=None)
        return model.eval()

    def images(self) -> "Images":
        """Say what the run's images look like, and the names of their classes; the images may be gone."""
        from fedunlearn.build import Images

        return Images(**self.about()["images"])

    def class_names(self) -> list[str]:
        """List the names of the K classes, in the order of the model's outputs."""
        return list(self.about()["images"]["class_names"])  # `images` would import torch

    def predict(self, images: "np.ndarray") -> "Tensor":
        """Predict the classes of images with the current model.

        Args:
            images: uint8 [N, H, W, channels], of the size that the run was trained on; of a table, fp32 rows
                [N, 1, 1, features].

        Returns:
            Class probabilities, [N, K].

        Raises:
            UserError: images of another form, or there is no sound checkpoint.

        Example:
            >>> run = fedunlearn.open_run("demo")  # doctest: +SKIP
            >>> [run.class_names()[k] for k in run.predict(images).argmax(1)]  # doctest: +SKIP
            ['7', '1']
        """
        import numpy as np
        import torch

        from fedunlearn.data.batches import batches
        from fedunlearn.data.decoded import Split
        from fedunlearn.nn.evaluate import predict

        expected, dtype = self.images().shape, "float32" if self.config.data.is_table else "uint8"
        if images.dtype != dtype or list(images.shape[1:]) != list(expected):
            takes = f"{dtype} [N, {', '.join(map(str, expected))}]"
            raise UserError(f"images are {images.dtype} {list(images.shape)}: run {self.name} takes {takes}")
        data = Split(images, np.zeros(len(images), np.int64))
        places, device = np.arange(len(images)), torch.device("cpu")
        everything = batches(data, places, -1, batch_size=self.config.train.batch_size, device=device)
        return predict(self.model(), everything).class_probs

    # For the process that holds it -------------------------------------------------------------------------------

    def commit(
        self, tensors: "dict[str, Tensor]", round_: int, request: Request | None = None, **detail: Any
    ) -> Request | None:
        """Write the server's state, in one transaction with the request's step to APPLIED.

        Checkpoints that this one replaces are deleted: after a request no model that knew its clients is kept.
        """
        from fedunlearn.runs import checkpoint

        name = f"round-{round_:05d}{f'-{request.id}' if request else ''}.safetensors"
        sha256 = checkpoint.save(self.folder / "checkpoints" / name, tensors)
        applied = self.ledger.commit(round_, name, sha256, request=request, **detail)
        self.delete_all_but(name)
        return applied

    def restore(self, model: "nn.Module", *, beside: tuple[str, ...] | None) -> "tuple[int, dict[str, Tensor]]":
        """Load the current checkpoint into `model`; where there is none yet, `model` stays as it is.

        Args:
            model: says which tensors a checkpoint must have, and where they are to be.
            beside: how names of further tensors begin; None for any.

        Returns:
            The rounds that are in it, and all its tensors.

        Raises:
            UserError: it was damaged, or is of another model.
        """
        from fedunlearn.runs import checkpoint

        current = self.ledger.current()
        rest: dict[str, Tensor] = {}
        if current is not None:
            file = self.folder / "checkpoints" / current.checkpoint
            rest = checkpoint.load(file, model, sha256=current.sha256, beside=beside)
        device = next(model.parameters()).device
        params = {name: value.clone() for name, value in model.state_dict().items()}
        return current.round if current else 0, params | {name: value.to(device) for name, value in rest.items()}

    def delete_all_but(self, name: str) -> None:
        """Delete every file beside the checkpoint `name`: older models, and what a crash left half-written."""
        folder = self.folder / "checkpoints"
        older = [file for file in folder.iterdir() if file.name != name]
        for file in older:
            file.unlink()
        if older:
            sync(folder)

    def record(self, kind: str, **row: Any) -> None:
        """Append a row to `metrics.jsonl`; a row of the same kind, round and request replaces an earlier one."""
        path = self.folder / "metrics.jsonl"
        with named_in_errors(path), open(path, "ab+") as file:
            if file.tell() and not _ends_in_newline(file):
                file.write(b"\n")
            file.write(json.dumps({"kind": kind, **row}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        for listener in self.listeners:
            listener({"kind": kind, **row})

    def metrics(self) -> list[dict[str, Any]]:
        """Read the rows of `metrics.jsonl` in order of rounds; lines that are none are passed over and counted."""
        path = self.folder / "metrics.jsonl"
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        classes = len(self.class_names()) if (self.folder / "run.json").exists() else None
        clients = self.config.clients + len(self.ledger.portions())
        damaged = 0
        for line in _lines(path):
            try:
                row = json.loads(line)
                check_row(row, clients, classes=classes)
                rows[row["kind"], row["round"], row.get("request")] = row
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged += 1
        if damaged > 1:  # a crash leaves one that is cut short
            log.warning("%s: %d lines are damaged and passed over", path, damaged)
        return sorted(rows.values(), key=lambda row: row["round"])

    def about(self) -> dict[str, Any]:
        """Read `run.json`: when it was made, of which data, with which versions and settings."""
        return read_about(self.folder)


def read_about(folder: Path) -> dict[str, Any]:
    """Read the `run.json` of a run's folder.

    Raises:
        UserError: it is damaged.
    """
    file = folder / "run.json"
    try:
        about = json.loads(file.read_text())
        if missing := {"created", "data", "images", "versions", "config"} - about.keys():
            raise ValueError(f"it has no {min(missing)}")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({error}): put back a copy of the file, or remove the folder {folder}"
        ) from error
    return about


def open_ledger(folder: Path) -> Ledger:
    """Open a run's ledger.

    Raises:
        UserError: it is missing, is damaged or was changed, it knows nothing of the checkpoints beside it, or
            `run.json` is another one than it knows.
    """
    if not (folder / "ledger.sqlite").exists():  # `Ledger` would make one
        raise UserError(f"{folder / 'ledger.sqlite'} is missing: put back a copy of it, or remove the folder")
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        check_not_empty(folder, ledger)
        check_about(folder, ledger)
    except BaseException:
        ledger.close()
        raise
    return ledger


def check_not_empty(folder: Path, ledger: Ledger) -> None:
    """Raise UserError where a ledger knows nothing of the checkpoints beside it."""
    if ledger.current() is None and last_round(folder):
        raise UserError(
            f"{folder / 'ledger.sqlite'} is empty, beside a checkpoint of round {last_round(folder)}: "
            f"put back a copy of the ledger, or remove the folder {folder}"
        )


def check_about(folder: Path, ledger: Ledger) -> None:
    """Raise TamperedError unless `run.json` is as the run's processes wrote it."""
    file = folder / "run.json"
    try:
        found = sha256_of(file)  # before the ledger: that goes on meanwhile
    except OSError:
        found = ""
    known = ledger.about()
    if known and found not in known:
        raise TamperedError(
            f"{file} is damaged, or not as this run wrote it: put back a copy of the file, or remove the folder "
            f"{folder}"
        )


def last_round(folder: Path) -> int:
    """Give the round of a run's newest checkpoint, from file names alone; 0 where there is none."""
    names = (re.match(r"round-(\d+)", file.name) for file in (folder / "checkpoints").glob("round-*"))
    return max((int(name[1]) for name in names if name), default=0)


def stored_config(folder: Path) -> Config:
    """Read the settings that a run was started with."""
    return stored(read_about(folder)["config"])


def _lines(file: Path) -> list[bytes]:
    """The lines of a file; none where it is not there."""
    try:
        return file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error


def _ends_in_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
