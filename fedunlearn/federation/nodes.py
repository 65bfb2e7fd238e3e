"""The nodes behind a grid: who hosts whom, what they are sent, and the sums of what they answer."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedunlearn.errors import UserError
from fedunlearn.federation import messages as wire
from fedunlearn.nn.evaluate import Counts

WAIT_SECONDS = 600
ATTEMPTS = 3
MOST_LISTED = 100
DIVERGED = "has training diverged? try a lower train.lr"


class NoAnswerError(Exception):
    """Nobody, or not everybody who had to, answered a sweep."""


@dataclass
class Answer:
    """What a sweep over nodes brought: one sum a name, the counts of every client that is in it, and what it cost.

    `moments` are embedding moments by client, where a client sent them. `worker_seconds` and `worker_mebibytes` (peak
    memory) are by worker process, `work` is processor time of all of them, `bytes` those of all tensors sent.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[int, Counts] = field(default_factory=dict)
    moments: dict[int, Tensor] = field(default_factory=dict)
    worker_seconds: Counter[int] = field(default_factory=Counter)
    worker_mebibytes: dict[int, float] = field(default_factory=dict)
    work: float = 0.0
    bytes: int = 0
    seconds: float = 0.0

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


class Federation:
    """Addresses clients through the nodes that host them.

    Args:
        config: settings as JSON, sent along with every message.
        timeout: seconds of silence after which nodes are left out.
        log: told of every node that is left out, and why.
    """

    def __init__(self, config: str, *, timeout: float, log: Callable[[str], None] = print) -> None:
        self._config = config
        self._log = log
        self._sent: list[Message] = []
        self.timeout = timeout
        self.nodes: list[int] = []  # Flower's node ids, by position in the federation
        self.clients_of: dict[int, list[int]] = {}  # Flower's node id -> clients, in order
        self.examples: dict[int, int] = {}  # client -> how many it has
        self.gpu = False
        self.moments_shape: tuple[int, ...] = ()  # of each client's embedding moments, where they are wanted

    def identify(self, grid: Grid) -> None:
        """Learn which node hosts which clients, waiting until all nodes of the federation are there.

        A node that fails to say it three times is named in the log and left out.
        """
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
            content = wire.request(wire.Task(self._config, 0, []))
            messages = [Message(content, node, "query.identify") for node in unknown]
            for message, reply in zip(messages, grid.send_and_receive(messages, timeout=self.timeout), strict=True):
                if reply.has_error():
                    node = message.metadata.dst_node_id
                    failures[node] += 1
                    self._log(f"node {node}, attempt {failures[node]} of {ATTEMPTS}: {_reason(reply)}")
                    continue
                metrics = reply.content["metrics"]
                found[metrics["node"]] = reply
                expected = metrics["nodes"]
        if not found:
            raise UserError("no node works: the reasons are in the log above")
        for _, reply in sorted(found.items()):
            metrics = reply.content["metrics"]
            self.nodes.append(reply.metadata.src_node_id)
            self.clients_of[reply.metadata.src_node_id] = list(metrics["client"])
            self.examples |= dict(zip(metrics["client"], metrics["examples"], strict=True))
            self.gpu |= bool(metrics["gpu"])

    def messages(
        self,
        kind: str,
        round_: int,
        clients: Iterable[int],
        state: ArrayRecord,
        *,
        apart: bool = False,
        beside: Mapping[str, ArrayRecord] | None = None,
        **task: float,
    ) -> list[Message]:
        """One message of type `kind` to every node that hosts some of `clients`: those with most examples first.

        So workers that take one message after another end at about the same time, and the order depends on the data
        alone. With `apart` every client has a message of its own. `task` are further fields of `wire.Task`; tensors
        `beside` the model's state go along.
        """
        wanted = set(clients)
        hosted = [(node, [c for c in self.clients_of[node] if c in wanted]) for node in self.nodes]
        groups = [(node, [c]) for node, mine in hosted for c in mine] if apart else [pair for pair in hosted if pair[1]]
        groups.sort(key=lambda pair: -sum(self.examples[c] for c in pair[1]))
        self._sent = [
            Message(
                wire.request(wire.Task(self._config, round_, mine, **task), state, beside),
                node,
                kind,
                group_id=str(round_),
            )
            for node, mine in groups
        ]
        return self._sent

    def add_up(
        self, replies: Iterable[Message], like: dict[str, Tensor], each: Callable[[Answer], None] = lambda answer: None
    ) -> Answer:
        """Sum the replies to the last `messages`, as they come, in their order.

        Args:
            replies: one a message, in their order (`OrderedGrid`).
            like: names and shapes that every reply must have. A reply that has others, is not finite, lacks a client
                or is an error is named in the log and left out.
            each: shown every reply alone.
        """
        answer, started = Answer(), time.monotonic()
        for message, reply in zip(self._sent, replies, strict=True):
            self._add(answer, message, reply, like, each)
        answer.seconds = time.monotonic() - started
        return answer

    def ask(
        self,
        grid: Grid,
        kind: str,
        round_: int,
        clients: Iterable[int],
        state: ArrayRecord,
        like: dict[str, Tensor],
        *,
        each: Callable[[Answer], None] = lambda answer: None,
        **content: Any,
    ) -> Answer:
        """Send `messages` and `add_up` what comes back; `content` is further content of the messages."""
        messages = self.messages(kind, round_, clients, state, **content)
        return self.add_up(grid.send_and_receive(messages, timeout=self.timeout), like, each)

    def mean(self, answer: Answer) -> dict[str, Tensor]:
        """Sum of n_c (theta_c - theta) / sum of n_c over the clients of a sweep of training."""
        examples = sum(self.examples[c] for c in answer.counts)
        return {name: total / examples for name, total in answer.sums.items()}

    def _add(
        self, answer: Answer, message: Message, reply: Message, like: dict[str, Tensor], each: Callable[[Answer], None]
    ) -> None:
        task = wire.task_of(message)
        try:
            sums, counts, moments = _checked(reply, task.clients, like, self.moments_shape)
        except ValueError as error:
            node = self.nodes.index(message.metadata.dst_node_id)
            self._log(f"round {task.round}: node {node} (clients {_listed(task.clients)}) is left out: {error}")
            return
        each(Answer(sums, counts))
        answer.moments |= moments
        wire.add_to(answer.sums, sums)
        answer.counts |= counts
        work = reply.content["work"]
        answer.worker_seconds[work["worker"]] += work["seconds"]
        answer.work += work["work"]
        answer.worker_mebibytes[work["worker"]] = work["mebibytes"]
        answer.bytes += wire.bytes_of(message) + wire.bytes_of(reply)


def _checked(
    reply: Message, clients: list[int], like: dict[str, Tensor], moments_shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[int, Counts], dict[int, Tensor]]:
    """Sums, counts and embedding moments of a reply that is as asked for; ValueError with the reason otherwise."""
    if reply.has_error():
        raise ValueError(_reason(reply))
    try:
        sums, counts, _ = wire.tensors_of(reply), wire.counts_of(reply), reply.content["work"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"its reply is not in the expected form ({error!r})") from error
    if sorted(counts) != sorted(clients):
        raise ValueError(f"it answered for clients {_listed(counts)}")
    if sums.keys() != like.keys():
        raise ValueError(f"it sent wrong names: {_listed(sorted(sums.keys() ^ like.keys())[:3])}")
    moments = {int(client): value for client, value in wire.tensors_of(reply, "moments").items()}
    for client, value in moments.items():
        if client not in clients or value.shape != moments_shape:
            raise ValueError(f"it sent embedding moments of client {client} of shape {list(value.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"it sent NaN or infinite embedding moments of client {client} ({DIVERGED})")
    for name, value in sums.items():
        if value.shape != like[name].shape:
            raise ValueError(f"it sent {name} of shape {list(value.shape)}, not {list(like[name].shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"it sent NaN or infinite values in {name} ({DIVERGED})")
    return sums, counts, moments


def _reason(reply: Message) -> str:
    """The innermost line of an error reply that says something."""
    lines: Iterator[str] = (line.strip() for line in (reply.error.reason or "unknown error").splitlines())
    return [line for line in lines if line][-1]


def _listed(values: Iterable) -> str:
    words = list(map(str, values))
    return ", ".join(words[:MOST_LISTED] + ["..."] * (len(words) > MOST_LISTED)) or "none"
