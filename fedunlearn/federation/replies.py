"""What nodes reply: believed as far as it can be true, and added up.

Whatever a node sends is somebody else's word. `read` takes a reply apart and refuses it with the reason where it is not
what was asked for, or cannot be true. Nothing else of the project reads replies.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple, cast

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedunlearn.federation import messages
from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.tasks import ROUNDING, ClientTask, Sent
from fedunlearn.nn.evaluate import Counts
from fedunlearn.nn.model import TwoHeadModel

MOST_SAID = 1000
"""Characters of what a node says of an error."""
MOST_LISTED = 100
MOST_EXAMPLES = 10**8  # of one client
MOST = 1e30  # of a number that is added up: sums stay finite
MOST_EPOCHS = 1000  # of a client task that trains
DIVERGED = "has training diverged? try a lower train.lr"
LARGEST = ("workers", "worker_mebibytes")  # of a cost: does not add up over queries


class RefusedError(ValueError):
    """A reply is not what was asked for, or cannot be true; the reason begins with `it` or `its`, the node."""


class AstrayError(RefusedError):
    """A reply is what an honest client would send too if the model that it got were of no use."""


@dataclass
class Results:
    """What a query of clients brought: sums over those who replied, and what it cost.

    Attributes:
        tensors: by name, the sum over clients of weight times tensor.
        weight: the sum of the clients' weights.
        counts: by client.
        statistics: by client, where the task sends any.
        worker_seconds: wall-clock seconds by worker process.
        worker_mebibytes: peak memory by worker process.
        work: processor seconds of all workers together.
        bytes: of all tensors sent in both directions.
        seconds: wall-clock seconds of the query.
        outsized: the clients of updates that are far larger than is usual.
    """

    tensors: Tensors = field(default_factory=dict)
    weight: float = 0.0
    counts: dict[int, Counts] = field(default_factory=dict)
    statistics: dict[int, Tensor] = field(default_factory=dict)
    worker_seconds: Counter[int] = field(default_factory=Counter)
    worker_mebibytes: dict[int, float] = field(default_factory=dict)
    work: float = 0.0
    bytes: int = 0
    seconds: float = 0.0
    outsized: set[int] = field(default_factory=set)

    def sum(self) -> Tensors:
        """Give the sum of weight times tensor."""
        return self.tensors

    def mean(self) -> Tensors:
        """Give the mean of the tensors, each client with its weight (its examples, if the task says nothing else)."""
        return {name: total / self.weight for name, total in self.tensors.items()}

    @property
    def total(self) -> Counts:
        """Counts over all clients."""
        return sum(self.counts.values(), Counts())

    @property
    def cost(self) -> dict[str, float]:
        """Seconds (wall-clock, work of all workers, wall-clock of the busiest), workers, bytes, peak memory of one."""
        return {
            "seconds": self.seconds,
            "work": self.work,
            "busiest": max(self.worker_seconds.values(), default=0.0),
            "workers": len(self.worker_seconds),
            "bytes": self.bytes,
            "worker_mebibytes": max(self.worker_mebibytes.values(), default=0.0),
        }

    def include(self, one: "Results") -> None:
        """Add what one reply brought."""
        messages.add_to(self.tensors, one.tensors)
        self.weight += one.weight
        self.counts |= one.counts
        self.statistics |= one.statistics
        self.outsized |= one.outsized
        self.charge(one)

    def charge(self, other: "Results") -> None:
        """Add what other replies cost, and nothing else of them."""
        self.worker_seconds.update(other.worker_seconds)
        self.worker_mebibytes |= other.worker_mebibytes
        self.work += other.work
        self.bytes += other.bytes
        self.seconds += other.seconds


def add_cost(costs: dict[str, Any], name: str, cost: Mapping[str, float]) -> None:
    """Book a query's cost under `name`: sums, but for numbers of workers and their memory."""
    cost = {**cost, "queries": 1}
    before = costs.get(name, dict.fromkeys(cost, 0))
    costs[name] = {key: max(before[key], v) if key in LARGEST else before[key] + v for key, v in cost.items()}


class Introduction(NamedTuple):
    """What a node says of itself: among how many nodes it is, whether it has a GPU, the examples by client.

    One with its own images also tells their SHA-256, by client.
    """

    nodes: int
    gpu: bool
    examples: dict[int, int]
    fingerprints: Mapping[int, str] = {}


@dataclass(frozen=True)
class Expected:
    """What the replies to a query may say.

    Args:
        task: that was asked for.
        model: says which shapes its tensors have.
        dtype: of the run's messages.
        examples: that each client has.
        pixels: of an image.
        variances: running variances of the model that was broadcast, by name.
    """

    task: ClientTask
    model: TwoHeadModel
    dtype: str
    examples: Mapping[int, int]
    pixels: int
    variances: Mapping[str, Tensor]

    def read(self, reply: Message, message: Message) -> Results:
        """Give what a reply to a message says.

        Raises:
            ValueError: it is not what was asked for, or cannot be true; with the reason.
        """
        _refuse_errors(reply)
        try:
            found = self._parsed(reply, messages.task_of(message).clients)
        except RefusedError:
            raise
        except Exception as error:  # bytes from outside make a parser raise anything
            raise RefusedError(f"its reply is not in the expected form ({error!r})") from error
        self._check_counts(found)
        self._check_variances(found)
        if self.task.check:
            examples = {client: self.examples[client] for client in found.counts}
            self.task.check(Sent(found.tensors, found.statistics, examples, self.pixels))
        found.bytes = messages.bytes_of(message) + messages.bytes_of(reply)
        return found

    def _parsed(self, reply: Message, clients: list[int]) -> Results:
        content = reply.content
        _check_records(content, {"metrics": MetricRecord, "work": MetricRecord}, {"arrays", "statistics"})
        answered, counts = messages.clients_of(reply), messages.counts_of(reply)
        if sorted(answered) != sorted(clients):
            raise RefusedError(f"it answered for clients {listed(answered)}")
        shapes = self.task.sends(self.model)
        tensors = self._tensors(content.get("arrays"), shapes)
        work = cast(MetricRecord, content["work"])
        worker = whole(work["worker"], "worker")
        return Results(
            tensors,
            number(messages.weight_of(reply), "weight"),
            counts,
            self._statistics(content.get("statistics"), clients),
            Counter({worker: amount(work["seconds"], "seconds")}),  # type: ignore[dict-item]
            {worker: amount(work["mebibytes"], "mebibytes")},
            amount(work["work"], "work"),
        )

    def _tensors(self, record: Any, shapes: Mapping[str, Tensor]) -> Tensors:
        arrays = _arrays(record)
        if arrays.keys() != shapes.keys():
            raise RefusedError(f"it sent wrong names: {listed(sorted(arrays.keys() ^ shapes.keys())[:3])}")
        dtype = self.task.dtype or self.dtype
        return {name: _tensor(name, array, shapes[name], dtype) for name, array in arrays.items()}

    def _statistics(self, record: Any, clients: list[int]) -> dict[int, Tensor]:
        arrays = _arrays(record)
        names = {str(client): client for client in clients}
        if self.task.sends_apart is None:
            if arrays:
                raise RefusedError("it sent statistics, which nobody asked for")
            return {}
        optional = bool(self.task.sends(self.model))  # beside an update; else they are all that is sent
        if arrays.keys() != names.keys() and (arrays or not optional):
            raise RefusedError(f"it sent statistics of clients {listed(sorted(arrays))}")
        shape = self.task.sends_apart(self.model)
        return {
            names[name]: _tensor(f"statistics of client {name}", array, shape, "fp32") for name, array in arrays.items()
        }

    def _check_counts(self, found: Results) -> None:
        """Refuse counts that are not whole, are more than the client has, or more right than there are."""
        for client, counts in found.counts.items():
            examples, loss, *right = astuple(counts)
            has, trains = self.examples[client], self.task.kind == "train"
            if not 0 <= whole(examples, "examples") <= has * (MOST_EPOCHS if trains else 1):
                raise RefusedError(f"it counted {examples} examples of client {client}, which has {has}")
            if self.task.kind == "evaluate" and examples != has:
                raise RefusedError(f"it counted {examples} of the {has} examples of client {client}")
            if type(loss) not in (int, float):
                raise RefusedError(f"it sent {loss!r} as loss, which is no number")
            if not all(0 <= whole(hits, "hits") <= examples for hits in right):
                raise RefusedError(f"it counted {max(right)} right answers to {examples} examples of client {client}")
            least = 0.0 if self.task.kind == "evaluate" else -MOST  # a loss of one's own may be negative
            if not least <= loss <= MOST:
                raise AstrayError(f"it sent a loss of {loss:g} on {examples} examples of client {client} ({DIVERGED})")
        clients, examples = len(found.counts), sum(self.examples[client] for client in found.counts)
        if found.weight not in (clients, examples):
            raise RefusedError(f"it sent a weight of {found.weight:g}, for {clients} clients with {examples} examples")

    def _check_variances(self, found: Results) -> None:
        """Refuse running variances below zero, but for rounding."""
        for name, value in found.tensors.items():
            if name in self.variances:
                before = self.variances[name]
                if bool((before + value / found.weight < -ROUNDING * before.abs()).any()):
                    raise RefusedError(f"it sent {name} that would be negative")


def introduction(reply: Message, clients: int) -> Introduction:
    """Read what a node says of itself.

    Args:
        clients: of the federation; there are no others.

    Raises:
        ValueError: it cannot be true; with the reason.
    """
    _refuse_errors(reply)
    try:
        _check_records(reply.content, {"metrics": MetricRecord, "work": MetricRecord}, {"fingerprints"})
        about = cast(Mapping[str, Any], reply.content["metrics"])
        images = dict(cast(Mapping[str, Any], reply.content.get("fingerprints", {})))
        numbers = messages.clients_of(reply)
        counts = messages.counts_of(reply)
        found = Introduction(
            whole(about["nodes"], "number of nodes"),
            bool(about["gpu"]),
            {client: whole(counts[client].examples, "examples") for client in numbers},
            {int(client): sha256(value) for client, value in images.items()},
        )
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"its reply is not in the expected form ({error!r})") from error
    if len(set(numbers)) < len(numbers) or not all(0 <= client < clients for client in numbers):
        raise RefusedError(f"it says that it hosts clients {listed(numbers)}, of {clients}")
    if found.nodes < 1:
        raise RefusedError(f"it says that it is one of {found.nodes} nodes")
    for client, examples in found.examples.items():
        if not 0 <= examples <= MOST_EXAMPLES:
            raise RefusedError(f"it says that client {client} has {examples} examples")
    return found


def sha256(value: Any) -> str:
    """Give a SHA-256 in hexadecimal digits, or nothing, or raise RefusedError."""
    if not isinstance(value, str) or not re.fullmatch(r"([0-9a-f]{64})?", value):
        raise RefusedError(f"it sent {str(value)[:20]!r} in place of a SHA-256")
    return value


def whole(value: Any, what: str) -> int:
    """Give a whole number, or raise RefusedError."""
    if type(value) is not int:
        raise RefusedError(f"it sent {value!r} as {what}, which is no whole number")
    return value


def number(value: Any, what: str) -> float:
    """Give a finite number, or raise RefusedError."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise RefusedError(f"it sent {value!r} as {what}, which is no number")
    return float(value)


def amount(value: Any, what: str) -> float:
    """Give a number of seconds or bytes, or raise RefusedError."""
    if not 0 <= number(value, what) <= MOST:
        raise RefusedError(f"it sent {value!r} as {what}")
    return float(value)


def listed(values: Iterable[Any]) -> str:
    """Give values in words, not more than can be read."""
    words = list(map(str, values))
    return ", ".join(words[:MOST_LISTED] + ["..."] * (len(words) > MOST_LISTED)) or "none"


def reason(reply: Message) -> str:
    """Give what a node's person can put right, in one line, else the innermost line of an error that says something."""
    text = reply.error.reason or ""
    by_hand = re.fullmatch(r"<class '[\w.]*\bUserError'>:<'(.*)'>", text, re.DOTALL)  # as Flower puts exceptions
    lines = [line for line in map(str.strip, (by_hand[1] if by_hand else text).splitlines()) if line]
    return " ".join(lines if by_hand else lines[-1:])[:MOST_SAID] or "unknown error"


def _refuse_errors(reply: Message) -> None:
    if reply.has_error():
        raise RefusedError(reason(reply))


def _check_records(content: Mapping[str, Any], needed: Mapping[str, type], others: set[str]) -> None:
    """Refuse a reply without a part, with a part of another kind, or with a part that nobody asked for."""
    for name, kind in needed.items():
        if not isinstance(content.get(name), kind):
            raise RefusedError(f"its reply is not in the expected form: {name} is missing or of another kind")
    if foreign := content.keys() - needed.keys() - others:
        raise RefusedError(f"it sent {min(foreign)!r}, which nobody asked for")


def _arrays(record: Any) -> Mapping[str, Any]:
    if record is None:
        return {}
    if not isinstance(record, ArrayRecord):
        raise RefusedError("its reply is not in the expected form: arrays are of another kind")
    return record


def _tensor(name: str, array: Any, shape: Tensor, dtype: str) -> Tensor:
    """Give a tensor of that dtype, shape and of finite values, or raise RefusedError."""
    values, wanted = array.numpy(), messages.travels_as(name, shape, dtype)
    if values.dtype != torch.empty(0, dtype=wanted).numpy().dtype:
        raise RefusedError(f"it sent {name} of type {values.dtype}, not {str(wanted).removeprefix('torch.')}")
    if values.shape != shape.shape:
        raise RefusedError(f"it sent {name} of shape {list(values.shape)}, not {list(shape.shape)}")
    value = torch.from_numpy(values.copy())
    value = messages.from_bits(value) if wanted == torch.int16 else value
    if not torch.isfinite(value).all():
        raise AstrayError(f"it sent NaN or infinite values in {name} ({DIVERGED})")
    return value
