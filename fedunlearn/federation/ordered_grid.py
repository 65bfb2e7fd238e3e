"""A grid that keeps few messages in flight and gives replies in the order of the messages."""

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import median

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from fedunlearn.federation.folding import fold, unfold

PAUSE, REMOTE_PAUSE = 0.02, 0.5
"""Seconds between two looks for replies. A SuperLink answers each in some 40 ms of its processor's time."""


@dataclass
class _Slot:
    message: Message
    id: str | None
    reply: Message | None = None


class OrderedGrid(Grid):
    """Wraps `grid`: `send_and_receive` is lazy, yields one reply a message, in their order.

    What is added up from it is therefore the same, bit for bit, in whatever order the replies arrive, and no more than
    `window` messages and replies exist at once. A message that nobody answers is answered by an error.

    A node that was silent once is remembered, until it answers. Where nobody else is waited for, it is given half of
    the usual time only: the median of what earlier calls for the same type of message took until their last reply.
    """

    def __init__(self, grid: Grid, *, window: int, pause: float | None = None) -> None:
        self._grid = grid
        self._window = window
        self._is_remote = isinstance(grid, HttpGrid)
        usual = REMOTE_PAUSE if self._is_remote else PAUSE
        self._pause = usual if pause is None else pause
        self._silent: set[int] = set()
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)  # of earlier calls, by type of message

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send lazily, at most `window` ahead, and yield exactly one reply a message, in order.

        `timeout` counts seconds without any new reply: then all messages in flight are answered by errors.
        """
        queue, slots, last_news = iter(messages), deque[_Slot](), time.monotonic()
        started, answered, kind = last_news, 0.0, ""
        while True:
            slots.extend(self._push(message) for message in islice(queue, self._window - len(slots)))
            if not slots:
                if answered:
                    self._seconds[kind].append(answered)
                return
            kind = slots[0].message.metadata.message_type
            if self._pull(slots):
                last_news = time.monotonic()
                answered = last_news - started
            elif timeout is not None and time.monotonic() - last_news > (patience := self._patience(slots, timeout)):
                self._give_up(slots, patience)
            if slots[0].reply is None:
                time.sleep(self._pause)
            while slots and slots[0].reply is not None:
                reply = slots.popleft().reply
                assert reply is not None
                yield reply
                last_news = time.monotonic()

    def _patience(self, slots: Iterable[_Slot], timeout: float) -> float:
        """Give the seconds for which replies to open messages are waited for."""
        waited_for = [slot.message.metadata for slot in slots if slot.reply is None]
        usual = self._seconds[waited_for[0].message_type] if waited_for else []
        known_as_silent = all(about.dst_node_id in self._silent for about in waited_for)
        return min(timeout, median(usual) / 2) if usual and known_as_silent else timeout

    def _give_up(self, slots: Iterable[_Slot], patience: float) -> None:
        for slot in slots:
            if slot.reply is None:
                self._silent.add(slot.message.metadata.dst_node_id)
                slot.reply = _error(slot.message, f"no reply within {patience:.3g} s")

    def _push(self, message: Message) -> _Slot:
        ids = list(self._grid.push_messages([in_one_piece(message) if self._is_remote else message]))
        if ids and ids[0]:
            return _Slot(message, ids[0])
        return _Slot(message, None, _error(message, "the node is not connected"))

    def _pull(self, slots: Iterable[_Slot]) -> bool:
        open_slots = {slot.id: slot for slot in slots if slot.reply is None and slot.id is not None}
        replies = list(self._grid.pull_messages(open_slots)) if open_slots else []
        for reply in replies:
            slot = open_slots[reply.metadata.reply_to_message_id]
            slot.reply = unfolded(reply, slot.message)
            self._silent.discard(slot.message.metadata.dst_node_id)
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

    def public_keys(self) -> dict[int, bytes]:
        """Give the key of every node that is connected, in PEM; none where the grid knows no keys.

        A SuperLink takes nothing from a node that is not signed with its key.
        """
        get_nodes = getattr(self._grid, "get_nodes", None)
        return {node.node_id: node.public_key for node in get_nodes()} if get_nodes else {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the wrapped grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the wrapped grid."""
        return self._grid.pull_messages(message_ids)


def in_one_piece(message: Message) -> Message:
    """Give a message to the same node with its tensors in one piece; the message itself stays as it is."""
    about = message.metadata
    return Message(fold(message.content), about.dst_node_id, about.message_type, ttl=about.ttl, group_id=about.group_id)


def unfolded(reply: Message, message: Message) -> Message:
    """Give a reply with its tensors apart; an error, where it does not say what is in it."""
    if reply.has_error():
        return reply
    try:
        reply.content = unfold(reply.content)
    except ValueError as error:
        return _error(message, str(error))
    return reply


def _error(message: Message, reason: str) -> Message:
    return Message(Error(code=ErrorCode.NODE_UNAVAILABLE, reason=reason), reply_to=message)
