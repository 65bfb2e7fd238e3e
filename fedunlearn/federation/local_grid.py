"""A Flower grid whose nodes are in this process: for studies on machines without Ray, and for tests."""

import logging
from collections.abc import Iterable
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """`num_nodes` nodes that run `client_app` here, one message after another, as soon as it is pushed."""

    def __init__(self, num_nodes: int, client_app: ClientApp) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # a message says who made it
        self.nodes = {1000 + i: i for i in range(num_nodes)}
        self._client_app = client_app
        self._replies: dict[str, Message] = {}

    def call(self, message: Message) -> Message:
        """What the node answers; an error where the app raises one, as Flower has it."""
        node_id = message.metadata.dst_node_id
        config: UserConfig = {"partition-id": self.nodes[node_id], "num-partitions": len(self.nodes)}
        try:
            return self._client_app(message, Context(1, node_id, config, RecordDict(), {}))
        except Exception as error:
            logging.getLogger("flwr").exception("node %d failed", self.nodes[node_id])
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Answer the messages; the replies wait to be pulled."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            self._replies[ids[-1]] = self.call(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to those messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def get_node_ids(self) -> list[int]:
        """Every node's."""
        return list(self.nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, and pull at once."""
        return self.pull_messages(self.push_messages(messages))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As Flower's."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def set_run(self, run: Run) -> None:
        """Nothing: there is one run."""

    @property
    def run(self) -> Run:
        """Flower's description of a run, which there is none of."""
        raise NotImplementedError
