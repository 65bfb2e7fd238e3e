"""What a message carries: tensors, a task, counts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedunlearn.evaluate import Counts


@dataclass(frozen=True)
class Task:
    """What a node is to do: for which of its clients, in which round, under which settings (JSON of the config)."""

    config: str
    round: int
    clients: list[int]


def request(task: Task, state: ArrayRecord | None = None) -> RecordDict:
    """The content of a message to a node; the same `state` may be shared by many."""
    content = RecordDict({"task": ConfigRecord(asdict(task))})
    if state is not None:
        content["arrays"] = state
    return content


def task_of(message: Message) -> Task:
    """The task of a message from the server."""
    return Task(**message.content["task"])


def tensors_of(message: Message) -> dict[str, Tensor]:
    """The tensors of a message, writable and in the sender's order."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in message.content["arrays"].items()}


def reply(message: Message, sums: Mapping[str, Tensor], counts: Mapping[int, Counts]) -> Message:
    """Weighted sums over clients, and each client's own counts."""
    columns = {"client": list(counts)}
    for field in fields(Counts):
        columns[field.name] = [getattr(count, field.name) for count in counts.values()]
    content = RecordDict({"metrics": MetricRecord(columns), "arrays": ArrayRecord(dict(sums))})
    return Message(content, reply_to=message)


def counts_of(message: Message) -> dict[int, Counts]:
    """Each client's counts in a reply."""
    columns = dict(message.content["metrics"])
    clients = columns.pop("client")
    return {c: Counts(*row) for c, row in zip(clients, zip(*columns.values(), strict=True), strict=True)}


def add_to(sums: dict[str, Tensor], values: Mapping[str, Tensor], weight: float = 1) -> None:
    """`sums[name] += weight * values[name]`, starting from zero where `sums` has no such name."""
    for name, value in values.items():
        sums[name] = sums[name] + weight * value if name in sums else weight * value


def averaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a model's state that is averaged over clients: all that is floating-point."""
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
