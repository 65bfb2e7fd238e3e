"""A grid that keeps few messages in flight and gives replies in the order of the messages."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run


@dataclass
class _Slot:
    message: Message
    id: str | None
    reply: Message | None = None


class OrderedGrid(Grid):
    """Wraps `grid`: `send_and_receive` is lazy, yields one reply a message, in their order.

    What is added up from it is therefore the same, bit for bit, in whatever order the replies arrive, and no more than
    `window` messages and replies exist at once. A message that nobody answers is answered by an error.
    """

    def __init__(self, grid: Grid, *, window: int, pause: float = 0.02) -> None:
        self._grid = grid
        self._window = window
        self._pause = pause

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send lazily, at most `window` ahead, and yield exactly one reply a message, in order.

        `timeout` counts seconds without any new reply: then all messages in flight are answered by errors.
        """
        queue, slots, last_news = iter(messages), deque[_Slot](), time.monotonic()
        while True:
            slots.extend(self._push(message) for message in islice(queue, self._window - len(slots)))
            if not slots:
                return
            if self._pull(slots):
                last_news = time.monotonic()
            elif timeout is not None and time.monotonic() - last_news > timeout:
                for slot in slots:
                    slot.reply = slot.reply or _error(slot.message, f"no reply within {timeout:g} s")
            if slots[0].reply is None:
                time.sleep(self._pause)
            while slots and slots[0].reply is not None:
                reply = slots.popleft().reply
                assert reply is not None
                yield reply
                last_news = time.monotonic()

    def _push(self, message: Message) -> _Slot:
        ids = list(self._grid.push_messages([message]))
        if ids and ids[0]:
            return _Slot(message, ids[0])
        return _Slot(message, None, _error(message, "the node is not connected"))

    def _pull(self, slots: Iterable[_Slot]) -> bool:
        open_slots = {slot.id: slot for slot in slots if slot.reply is None and slot.id is not None}
        replies = list(self._grid.pull_messages(open_slots)) if open_slots else []
        for reply in replies:
            open_slots[reply.metadata.reply_to_message_id].reply = reply
        return bool(replies)

    def set_run(self, run: Run) -> None:
        """As the wrapped grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As the wrapped grid."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As the wrapped grid."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """As the wrapped grid."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the wrapped grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the wrapped grid."""
        return self._grid.pull_messages(message_ids)


def _error(message: Message, reason: str) -> Message:
    return Message(Error(code=ErrorCode.NODE_UNAVAILABLE, reason=reason), reply_to=message)
