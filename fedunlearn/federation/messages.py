"""What a message carries: tensors, a task, counts."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedunlearn.nn.evaluate import Counts


@dataclass(frozen=True)
class Task:
    """What a node is to do: for which of its clients, in which round, under which settings (JSON of the config).

    `share` is of each client's examples, as far as the work can do with fewer; `lr` replaces the schedule's learning
    rate; `embeddings` asks for their moments beside the training; `until` (accuracy) and `radius` (distance from the
    broadcast model) bound an ascent; after the `last` teaching of a request nothing of it is kept.
    """

    config: str
    round: int
    clients: list[int]
    share: float = 1.0
    lr: float = -1.0
    embeddings: bool = True
    until: float = 0.0
    radius: float = math.inf
    last: bool = False


def packed(tensors: Mapping[str, Tensor], precision: str) -> ArrayRecord:
    """Tensors as they travel: all that is fp32 rounded to bf16 for `precision="bf16"`, and as it is for `"fp32"`.

    Flower's arrays know no bf16, so that its bits travel as int16.
    """
    if precision == "bf16":
        tensors = {name: _bits(value) if value.dtype == torch.float32 else value for name, value in tensors.items()}
    return ArrayRecord(dict(tensors))


def request(
    task: Task, state: ArrayRecord | None = None, beside: Mapping[str, ArrayRecord] | None = None
) -> RecordDict:
    """The content of a message to a node; the same `state`, and further tensors `beside` it, may be shared by many."""
    content = RecordDict({"task": ConfigRecord(asdict(task)), **(beside or {})})
    if state is not None:
        content["arrays"] = state
    return content


def task_of(message: Message) -> Task:
    """The task of a message from the server."""
    return Task(**message.content["task"])


def tensors_of(message: Message, name: str = "arrays") -> dict[str, Tensor]:
    """The tensors of a message, writable and in the sender's order; bf16 bits as fp32 again."""
    sent = message.content.get(name, {})
    arrays = {name: torch.from_numpy(array.numpy().copy()) for name, array in sent.items()}
    return {name: _from_bits(value) if value.dtype == torch.int16 else value for name, value in arrays.items()}


def reply(message: Message, sums: ArrayRecord | None, counts: Mapping[int, Counts]) -> Message:
    """Sums over clients, where there are any, and each client's own counts."""
    columns = {"client": list(counts)}
    for field in fields(Counts):
        columns[field.name] = [getattr(count, field.name) for count in counts.values()]
    content = RecordDict({"metrics": MetricRecord(columns)})
    if sums is not None:
        content["arrays"] = sums
    return Message(content, reply_to=message)


def counts_of(message: Message) -> dict[int, Counts]:
    """Each client's counts in a reply."""
    columns = dict(message.content["metrics"])
    clients = columns.pop("client")
    return {c: Counts(*row) for c, row in zip(clients, zip(*columns.values(), strict=True), strict=True)}


def add_to(sums: dict[str, Tensor], values: Mapping[str, Tensor], weight: float = 1) -> None:
    """`sums[name] += weight * values[name]` in place, starting from zero where `sums` has no such name."""
    for name, value in values.items():
        if name in sums:
            sums[name].add_(value, alpha=weight)
        else:
            sums[name] = weight * value


def averaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a model's state that is averaged over clients: all that is floating-point."""
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def bytes_of(message: Message) -> int:
    """Of the tensors in a message."""
    return sum(record.count_bytes() for record in message.content.array_records.values())


def _bits(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).view(torch.int16)


def _from_bits(bits: Tensor) -> Tensor:
    return bits.view(torch.bfloat16).float()
