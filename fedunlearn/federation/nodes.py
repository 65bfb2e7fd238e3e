"""The nodes behind a grid: which clients each hosts, what they are sent, and the sums of what they reply."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedunlearn.errors import UserError
from fedunlearn.federation import messages
from fedunlearn.federation.messages import Task, Tensors
from fedunlearn.federation.tasks import ClientTask
from fedunlearn.log import waiting
from fedunlearn.nn.evaluate import Counts
from fedunlearn.nn.model import TwoHeadResNet18

WAIT_SECONDS = 600
ATTEMPTS = 3
MOST_LISTED = 100
DIVERGED = "has training diverged? try a lower train.lr"
LARGEST = ("workers", "worker_mebibytes")  # of a cost: does not add up over queries

log = getLogger("fedunlearn")


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


def add_cost(costs: dict[str, Any], name: str, cost: Mapping[str, float]) -> None:
    """Book a query's cost under `name`: sums, but for numbers of workers and their memory."""
    cost = {**cost, "queries": 1}
    before = costs.get(name, dict.fromkeys(cost, 0))
    costs[name] = {key: max(before[key], v) if key in LARGEST else before[key] + v for key, v in cost.items()}


class Nodes:
    """Addresses clients through the nodes that host them.

    Args:
        config: settings as JSON, which travel with every message.
        model: that says which shapes replies have.
        dtype: of the tensors in messages, `fp32` or `bf16`.
        timeout: seconds of silence after which nodes are left out.
    """

    def __init__(self, config: str, model: TwoHeadResNet18, *, dtype: str, timeout: float) -> None:
        self._config, self._model, self._dtype, self._timeout = config, model, dtype, timeout
        self.nodes: list[int] = []  # Flower's node ids, by position in the federation
        self.clients_of: dict[int, list[int]] = {}  # Flower's node id -> clients, in order
        self.examples: dict[int, int] = {}  # client -> how many it has
        self.gpu = False

    def identify(self, grid: Grid) -> None:
        """Learn which node hosts which clients, waiting until all nodes of the federation are there.

        A node that fails to say it three times is named in the log and left out.

        Raises:
            UserError: no node works, or not all are connected in time.
        """
        with waiting("the nodes' first answers", limit=WAIT_SECONDS):
            found = self._introduced(grid)
        for _, reply in sorted(found.items()):
            counts, node = messages.counts_of(reply), reply.metadata.src_node_id
            self.nodes.append(node)
            self.clients_of[node] = list(counts)
            self.examples |= {client: count.examples for client, count in counts.items()}
            self.gpu |= bool(reply.content.metric_records["metrics"]["gpu"])

    def _introduced(self, grid: Grid) -> dict[int, Message]:
        """Give what every node says of itself, by position in the federation."""
        found: dict[int, Message] = {}
        failures: Counter[int] = Counter()
        expected, deadline = 1, time.monotonic() + WAIT_SECONDS
        while len(found) + sum(count == ATTEMPTS for count in failures.values()) < expected:
            if time.monotonic() > deadline:
                raise UserError(f"{len(found)} of {expected} nodes are connected after {WAIT_SECONDS} s")
            known = {reply.metadata.src_node_id for reply in found.values()}
            unknown = [node for node in grid.get_node_ids() if node not in known and failures[node] < ATTEMPTS]
            if not unknown:
                time.sleep(0.1)
            content = messages.request(Task(self._config, "identify", 0, []), {})
            sent = [Message(content, node, "query.identify") for node in unknown]
            patience = min(self._timeout, WAIT_SECONDS)
            for message, reply in zip(sent, grid.send_and_receive(sent, timeout=patience), strict=True):
                if reply.has_error():
                    node = message.metadata.dst_node_id
                    failures[node] += 1
                    log.warning("node %s, attempt %d of %d: %s", node, failures[node], ATTEMPTS, _reason(reply))
                    continue
                about = cast(Mapping[str, int], reply.content["metrics"])
                found[about["node"]] = reply
                expected = about["nodes"]
        if not found:
            raise UserError("no node works: the reasons are in the log above")
        return found

    def messages(
        self,
        task: ClientTask,
        round_: int,
        clients: Iterable[int],
        state: Mapping[str, Tensor],
        *,
        arguments: Mapping[str, Any] | None = None,
        one_client_each: bool = False,
    ) -> list[Message]:
        """Make one message to every node that hosts some of `clients`: those with most examples first.

        So workers that take one message after another end at about the same time, and the order depends on the data
        alone.

        Args:
            state: of the model that is broadcast.
            arguments: of the client task.
            one_client_each: give every client a message of its own.
        """
        wanted = set(clients)
        hosted = [(node, [c for c in self.clients_of[node] if c in wanted]) for node in self.nodes]
        groups = [pair for pair in hosted if pair[1]]
        if one_client_each:
            groups = [(node, [client]) for node, own in hosted for client in own]
        groups.sort(key=lambda pair: -sum(self.examples[c] for c in pair[1]))
        text, records = messages.pack_arguments(arguments or {})
        if task.needs_model:
            records = {"arrays": self.packed(state), **records}
        return [
            Message(
                messages.request(Task(self._config, task.name, round_, own, text), records),
                node,
                task.kind,
                group_id=str(round_),
            )
            for node, own in groups
        ]

    def add_up(
        self,
        task: ClientTask,
        sent: Iterable[Message],
        replies: Iterable[Message],
        *,
        on_reply: Callable[[Results], None] = lambda results: None,
    ) -> Results:
        """Sum the replies to `sent` as they come, in their order (`OrderedGrid`).

        A reply that has other names or shapes than the task sends, is not finite, lacks a client or is an error is
        named in the log and left out.

        Args:
            on_reply: is shown every reply alone.
        """
        results, started = Results(), time.monotonic()
        shapes = task.sends(self._model)
        apart = task.sends_apart(self._model) if task.sends_apart else None
        for message, reply in zip(sent, replies, strict=True):
            asked = messages.task_of(message)
            try:
                one = _checked(reply, asked.clients, shapes, apart)
            except ValueError as error:
                node = self.nodes.index(message.metadata.dst_node_id)
                listed = _listed(asked.clients)
                log.warning("round %d: node %d (clients %s) is left out: %s", asked.round, node, listed, error)
                continue
            on_reply(one)
            _include(results, one, message, reply)
        results.seconds = time.monotonic() - started
        return results

    def query(
        self,
        grid: Grid,
        task: ClientTask,
        round_: int,
        clients: Iterable[int],
        state: Mapping[str, Tensor],
        *,
        on_reply: Callable[[Results], None] = lambda results: None,
        **content: Any,
    ) -> Results:
        """Send `messages` and `add_up` what comes back; `content` is further content of the messages."""
        sent = self.messages(task, round_, clients, state, **content)
        return self.add_up(task, sent, grid.send_and_receive(sent, timeout=self._timeout), on_reply=on_reply)

    def packed(self, state: Mapping[str, Tensor]) -> ArrayRecord:
        """Pack a model as it is broadcast."""
        return messages.pack(state, self._dtype)


def _include(results: Results, one: Results, message: Message, reply: Message) -> None:
    """Add one reply to the results, and what it cost."""
    messages.add_to(results.tensors, one.tensors)
    results.weight += one.weight
    results.counts |= one.counts
    results.statistics |= one.statistics
    work = cast(MetricRecord, reply.content["work"])
    worker, seconds = int(cast(int, work["worker"])), float(cast(float, work["seconds"]))
    results.worker_seconds[worker] += seconds  # type: ignore[assignment]
    results.worker_mebibytes[worker] = float(cast(float, work["mebibytes"]))
    results.work += float(cast(float, work["work"]))
    results.bytes += messages.bytes_of(message) + messages.bytes_of(reply)


def _checked(reply: Message, clients: list[int], shapes: Mapping[str, Tensor], apart: Tensor | None) -> Results:
    """What a reply says, if it is as asked for; ValueError with the reason otherwise."""
    if reply.has_error():
        raise ValueError(_reason(reply))
    try:
        tensors, counts, statistics = messages.unpack(reply), messages.counts_of(reply), messages.statistics_of(reply)
        weight, _ = messages.weight_of(reply), reply.content["work"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"its reply is not in the expected form ({error!r})") from error
    if sorted(counts) != sorted(clients):
        raise ValueError(f"it answered for clients {_listed(counts)}")
    if tensors.keys() != shapes.keys():
        raise ValueError(f"it sent wrong names: {_listed(sorted(tensors.keys() ^ shapes.keys())[:3])}")
    for client, value in statistics.items():
        if client not in clients or apart is None or value.shape != apart.shape:
            raise ValueError(f"it sent statistics of client {client} of shape {list(value.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"it sent NaN or infinite statistics of client {client} ({DIVERGED})")
    for name, value in tensors.items():
        if value.shape != shapes[name].shape:
            raise ValueError(f"it sent {name} of shape {list(value.shape)}, not {list(shapes[name].shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"it sent NaN or infinite values in {name} ({DIVERGED})")
    return Results(tensors, weight, counts, statistics)


def _reason(reply: Message) -> str:
    """The innermost line of an error reply that says something."""
    lines: Iterator[str] = (line.strip() for line in (reply.error.reason or "unknown error").splitlines())
    return [line for line in lines if line][-1]


def _listed(values: Iterable[Any]) -> str:
    words = list(map(str, values))
    return ", ".join(words[:MOST_LISTED] + ["..."] * (len(words) > MOST_LISTED)) or "none"
