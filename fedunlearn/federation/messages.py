"""What a message carries: a task for some clients, tensors, and what the clients counted."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedunlearn.data.selection import Portion
from fedunlearn.nn.evaluate import Counts

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What a node is to do, for which of its clients, in which round.

    Attributes:
        config: settings of the run, as JSON; who is forgotten is not among them.
        name: of the client task.
        round: that random draws depend on.
        clients: for whom.
        arguments: further arguments of the client task, as JSON; tensors travel beside it.
        portions: of the clients' images that were asked to be forgotten, by number, as JSON (`data.selection.Portion`).
        run: id of the run's key, where machines have their own images: by it a client signs what it asks for.
        signers: the id of the key that must sign for each client, as JSON; a machine of its own is told at the start.
    """

    config: str
    name: str
    round: int
    clients: list[int]
    arguments: str = "{}"
    portions: str = "{}"
    run: str = ""
    signers: str = ""


def pack(tensors: Mapping[str, Tensor], dtype: str) -> ArrayRecord:
    """Pack tensors as they travel: fp32 rounded to bf16 for `dtype="bf16"`, and everything as it is for `"fp32"`.

    Flower's arrays know no bf16, so that its bits travel as int16. Running statistics of BatchNorm are never rounded:
    a rounded change could make a variance negative.
    """
    packed = {n: _bits(v) if travels_as(n, v, dtype) == torch.int16 else v for n, v in tensors.items()}
    return ArrayRecord(packed)


def travels_as(name: str, tensor: Tensor, dtype: str) -> torch.dtype:
    """Give the dtype in which `pack` sends a tensor; int16 stands for the bits of bf16."""
    rounded = dtype == "bf16" and tensor.dtype == torch.float32 and not name.endswith(STATISTICS)
    return torch.int16 if rounded else tensor.dtype


def unpack(message: Message, name: str = "arrays", *, only: str = "") -> Tensors:
    """Give the tensors of a record of a message, writable and in the sender's order; bf16 bits as fp32 again.

    Args:
        only: how the names end of those that are wanted.
    """
    sent = cast(Mapping[str, Any], message.content.get(name, {}))
    arrays = {name: torch.from_numpy(array.numpy().copy()) for name, array in sent.items() if name.endswith(only)}
    return {name: from_bits(value) if value.dtype == torch.int16 else value for name, value in arrays.items()}


def request(task: Task, records: Mapping[str, ArrayRecord]) -> RecordDict:
    """Make the content of a message to a node; the same `records` may be shared by many."""
    about = {name: value for name, value in asdict(task).items() if value or name not in ("run", "signers")}
    return RecordDict({"task": ConfigRecord(about), **records})


def task_of(message: Message) -> Task:
    """Read the task of a message from the server."""
    return Task(**cast(dict[str, Any], dict(message.content.config_records["task"])))


def portions_of(task: Task) -> dict[int, Portion]:
    """Read the portions of clients that a task names, by number."""
    return {int(number): Portion.read(int(number), about) for number, about in json.loads(task.portions).items()}


STATISTICS = ("running_mean", "running_var")
ONE, MANY = "tensor:", "tensors:"


def pack_arguments(arguments: Mapping[str, Any]) -> tuple[str, dict[str, ArrayRecord]]:
    """Split the arguments of a client task into JSON and records of tensors, which are never rounded."""
    plain, records = {}, {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            records[f"{ONE}{name}"] = pack({name: value}, "fp32")
        elif isinstance(value, dict) and value and all(isinstance(entry, Tensor) for entry in value.values()):
            records[f"{MANY}{name}"] = pack(value, "fp32")
        else:
            plain[name] = value
    return json.dumps(plain), records


def arguments_of(message: Message) -> dict[str, Any]:
    """Read what `pack_arguments` made."""
    arguments = json.loads(task_of(message).arguments)
    for record in message.content.array_records:
        if record.startswith(ONE):
            arguments[record.removeprefix(ONE)] = unpack(message, record)[record.removeprefix(ONE)]
        elif record.startswith(MANY):
            arguments[record.removeprefix(MANY)] = unpack(message, record)
    return arguments


def reply(
    message: Message,
    counts: Mapping[int, Counts],
    sums: ArrayRecord | None = None,
    *,
    weight: float = 0.0,
    statistics: Mapping[str, Tensor] | None = None,
) -> Message:
    """Make the reply of a node: sums over its clients and their weight, each client's counts and statistics."""
    columns: dict[str, Any] = {"client": list(counts), "weight": float(weight)}
    for field in fields(Counts):
        columns[field.name] = [getattr(count, field.name) for count in counts.values()]
    content = RecordDict({"metrics": MetricRecord(columns)})
    if sums is not None:
        content["arrays"] = sums
    if statistics:
        content["statistics"] = pack(statistics, "fp32")
    return Message(content, reply_to=message)


def clients_of(message: Message) -> list[int]:
    """Read for which clients a reply answers, as often as it says so."""
    return list(cast(list[int], message.content.metric_records["metrics"]["client"]))


def counts_of(message: Message) -> dict[int, Counts]:
    """Read each client's counts from a reply."""
    columns = cast(dict[str, Any], message.content.metric_records["metrics"])
    rows = zip(*(columns[field.name] for field in fields(Counts)), strict=True)
    return {client: Counts(*row) for client, row in zip(columns["client"], rows, strict=True)}


def weight_of(message: Message) -> float:
    """Read the weight of the sums in a reply."""
    return float(cast(float, message.content.metric_records["metrics"]["weight"]))


def add_to(sums: Tensors, values: Mapping[str, Tensor], weight: float = 1) -> None:
    """Do `sums[name] += weight * values[name]` in place, starting from zero where `sums` has no such name."""
    for name, value in values.items():
        if name in sums:
            sums[name].add_(value, alpha=weight)
        else:
            sums[name] = weight * value


def floating(state: Mapping[str, Tensor]) -> Tensors:
    """Give the part of a model's state that is averaged over clients: all that is floating-point."""
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def bytes_of(message: Message) -> int:
    """Count the bytes of the tensors in a message."""
    return sum(record.count_bytes() for record in message.content.array_records.values())


def _bits(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).view(torch.int16)


def from_bits(bits: Tensor) -> Tensor:
    """Give the fp32 tensor whose bf16 bits travelled as int16."""
    return bits.view(torch.bfloat16).float()
