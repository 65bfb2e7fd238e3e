"""A federation in which one client replies something else to one task, every time it is asked."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import Message
from torch import Tensor

from fedunlearn.apps.client_app import app
from fedunlearn.federation import messages
from fedunlearn.federation.local_grid import LocalGrid


@dataclass(frozen=True)
class Lie:
    """What a client makes of each value that it should have sent for a task, but for BatchNorm statistics."""

    task: str
    client: int
    name: str
    change: Callable[[Tensor], Tensor]

    def of(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Change an update."""
        return {n: v if n.endswith(messages.STATISTICS) else self.change(v) for n, v in values.items()}


class LyingGrid(LocalGrid):
    """Four nodes, a client each; one of them may lie."""

    def __init__(self, lie: Lie | None) -> None:
        super().__init__(4, app)
        self._lie = lie

    def push_messages(self, messages_: Iterable[Message]) -> list[str]:
        """Answer the messages, some of them with a lie."""
        sent = list(messages_)
        ids = super().push_messages(sent)
        for message, reply_id in zip(sent, ids, strict=True):
            task, reply, lie = messages.task_of(message), self._replies[reply_id], self._lie
            if lie and (task.name, task.clients) == (lie.task, [lie.client]) and reply.has_content():
                travels = {array.dtype for array in reply.content.array_records["arrays"].values()}
                dtype = "bf16" if "int16" in travels else "fp32"
                reply.content["arrays"] = messages.pack(lie.of(messages.unpack(reply)), dtype)
        return ids
