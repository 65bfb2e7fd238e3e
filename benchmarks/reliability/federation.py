"""A small federation whose runs go on from one base, and a grid in which one reply is bad."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Error, Message, RecordDict

from benchmarks.reliability.array_damages import Damage
from benchmarks.reliability.damages import copied
from fedunlearn.apps.client_app import app
from fedunlearn.apps.server_app import asked_for, prepared
from fedunlearn.apps.simulate import app_folder
from fedunlearn.composing import compose
from fedunlearn.config import Config
from fedunlearn.federation import messages
from fedunlearn.federation.auditor import Auditor
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.federation.rounds import Rounds
from fedunlearn.runs.home import locked_run
from fedunlearn.runs.run import Run

CLIENTS = 4
BASE_ROUNDS = 12
BASE = (
    f"data.limit=600 data.test_limit=120 clients={CLIENTS} model.width=8 rounds={BASE_ROUNDS} train.epochs=2 "
    "train.batch_size=32 train.crop_padding=0 train.lr=0.05 train.schedule_rounds=16 train.server_momentum=0 "
    f"train.client_head_steps=20 evaluate_every={BASE_ROUNDS} train.precision=fp32 message_dtype=fp32 timeout=0.2 "
    "strategy=federaser"  # which stores what it needs for a request, and changes nothing else
)
LIAR, FORGET = 1, 0  # the client that lies where all are asked, and the one that is forgotten


class Site(NamedTuple):
    """Which message gets a bad reply: the nth of a client task to a client."""

    task: str
    client: int
    number: int


class Memory:
    """Replies to messages that were answered before: clients reply the same to the same."""

    def __init__(self) -> None:
        self.replies: dict[str, RecordDict] = {}


class BadReplyGrid(LocalGrid):
    """A node a client; the reply to one message is damaged.

    Attributes:
        sent: which messages there were, each with the honest reply.
    """

    def __init__(self, memory: Memory, site: Site | None = None, damage: Damage | None = None) -> None:
        super().__init__(CLIENTS, app)
        self._memory, self._site, self._damage = memory, site, damage
        self._times: Counter[tuple[str, int]] = Counter()
        self.sent: dict[Site, tuple[Message, Message]] = {}

    def call(self, message: Message) -> Message:
        """Answer a message as its node does, but for the one whose reply is damaged."""
        task = messages.task_of(message)
        client = task.clients[0] if task.clients else self.nodes[message.metadata.dst_node_id]
        site = Site(task.name, client, self._times[task.name, client])
        self._times[task.name, client] += 1
        reply = self._honest(message)
        if reply.has_content():
            self.sent[site] = (message, reply)
        if site == self._site and self._damage and reply.has_content():
            return damaged(message, reply, self._damage)  # type: ignore[return-value]
        return reply

    def pull_messages(self, message_ids) -> list[Message]:
        """Give the replies; None is a node's silence."""
        return [reply for reply in super().pull_messages(message_ids) if reply is not None]

    def _honest(self, message: Message) -> Message:
        key = _content_key(message)
        if key not in self._memory.replies:
            reply = super().call(message)
            if reply.has_error():
                return reply
            self._memory.replies[key] = reply.content
        return Message(copied(self._memory.replies[key]), reply_to=message)


def damaged(message: Message, reply: Message, damage: Damage) -> Message | None:
    """Give a damaged copy of the reply to a message; None for silence."""
    found = damage(Message(copied(reply.content), reply_to=message))
    return Message(found, reply_to=message) if isinstance(found, Error | RecordDict) else found


def _content_key(message: Message) -> str:
    digest = sha256(repr(messages.task_of(message)).encode())
    for name, record in sorted(message.content.array_records.items()):
        digest.update(name.encode())
        for array_name, array in record.items():
            digest.update(array_name.encode())
            digest.update(array.data)
    return digest.hexdigest()


@contextmanager
def going_on(
    home: Path, run: str, words: str, grid: LocalGrid, *, rounds: int, auditor: Auditor | None = None
) -> Iterator[Run]:
    """Train a run and serve its requests, without a report; gives it while it is locked."""
    asked, values = _composed(words)
    config = prepared(asked.model_copy(update={"home": str(home), "run": run}), values)
    auditor = auditor or Auditor(config)
    with locked_run(config, data=auditor.fingerprints(), images=auditor.images, asked=values) as opened:
        Rounds.assemble(opened, auditor=auditor).start(grid, rounds)
        yield opened


@cache
def _composed(words: str) -> tuple[Config, dict[str, Any]]:
    config = compose(app_folder("digits") / "conf", words.split())
    return config, asked_for(words.split(), config)
