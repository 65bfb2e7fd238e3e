"""A local grid whose deliveries a test can watch, change and delay."""

from collections.abc import Callable, Iterable
from uuid import uuid4

import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedunlearn.apps.client_app import app
from fedunlearn.federation import local_grid, messages


class LocalGrid(local_grid.LocalGrid):
    """`num_nodes` nodes; `deliver` may replace how a message is answered (None: never)."""

    def __init__(self, num_nodes: int, client_app: ClientApp = app) -> None:
        super().__init__(num_nodes, client_app)
        self.nodes = {1000 + 7 * i: i for i in range(num_nodes)}
        self.deliver: Callable[[Message], Message | None] = self.call
        self.sent: list[Message] = []
        self.most_in_flight = 0
        self.newest_first = False

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.sent.append(message)
            self._replies[message.metadata.message_id] = self.deliver(message)
            ids.append(message.metadata.message_id)
        self.most_in_flight = max(self.most_in_flight, len(self._replies))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        answered = [i for i in message_ids if self._replies.get(i) is not None]
        if self.newest_first:  # one reply a pull, the last one sent first
            answered = answered[-1:]
        return [self._replies.pop(i) for i in answered]

    def get_node_ids(self) -> list[int]:
        return list(reversed(self.nodes))

    def sent_for(self, task: str) -> list[Message]:
        """The messages that asked for a client task."""
        return [message for message in self.sent if messages.task_of(message).name == task]


def equal(a, b):
    """Whether two state dicts have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def kinds(grid, client=None):
    """(client task, round) of every message sent, or of those that name `client`."""
    tasks = [messages.task_of(message) for message in grid.sent]
    return [(task.name, task.round) for task in tasks if client is None or client in task.clients]


def asked(grid):
    """(client task, client) of every message, for each client that it names."""
    tasks = [messages.task_of(message) for message in grid.sent]
    return [(task.name, client) for task in tasks for client in task.clients]
