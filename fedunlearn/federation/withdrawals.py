"""What a client has signed on its own machine to be forgotten: carried by its node's replies, and believed or not.

A node adds it to every reply until it expires, so that the server may lose it. The server believes nothing of it but
a signature.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from logging import getLogger
from typing import Any

from flwr.app import ConfigRecord, Context, Message

from fedunlearn.config import from_json, state_home
from fedunlearn.errors import UNREADABLE, UserError, printable
from fedunlearn.federation.machine import Machine, settled
from fedunlearn.runs import taking_part
from fedunlearn.runs.keys import is_id
from fedunlearn.runs.signed import SignedRequest, UnsignedError, check, read
from fedunlearn.runs.taking_part import LONGEST, MOST

RECORD, SIGNED = "withdrawals", "signed"
"""Name of the record of a reply, and of the list of JSON texts in it."""

MOST_SAID = 5
"""Reasons that the log gives for one node, whatever that sends."""

NONCE = r"[0-9a-f]{32}"

log = getLogger("fedunlearn")


def carried(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Add to a machine's replies what its clients have signed; note in which runs the machine takes part.

    Nothing that goes wrong with it keeps a reply back.
    """
    machine, task = Machine.of(context.node_config), _task_of(message)
    reply = call_next(message, context)
    if machine is None or not is_id(task.get("run")) or not reply.has_content():
        return reply
    try:
        home, run = state_home(machine.home), task["run"]
        if task.get("name") == "identify":
            config, numbers = settled(from_json(task["config"]), machine)
            names = {number: config.partition.names[number] for number in numbers or ()}
            taking_part.note(home, run, names, _signers_of(task))
        if texts := [json.dumps(asdict(asked)) for asked in taking_part.kept(home, run)[:MOST]]:
            reply.content[RECORD] = ConfigRecord({SIGNED: texts})
    except (OSError, UserError) as error:
        log.warning("what this machine's clients have signed cannot be carried (%s)", error)
    return reply


def _signers_of(task: Mapping[str, Any]) -> dict[int, str]:
    try:
        return {int(client): str(key) for client, key in json.loads(task["signers"]).items()}
    except UNREADABLE:
        return {}  # of a server that does not say it


def _task_of(message: Message) -> dict[str, Any]:
    return dict(message.content.config_records.get("task", {}))  # `messages` imports torch


class Withdrawals:
    """Collects what replies carry until it is filed; it is bounded, and nothing that a node sends raises."""

    def __init__(self) -> None:
        self._texts: dict[int, list[str]] = {}
        self._said: dict[int, set[str]] = {}

    def take(self, node: int, reply: Message) -> None:
        """Take what a node's reply carries out of it."""
        record = reply.content.pop(RECORD, None) if reply.has_content() else None
        if record is None:
            return
        sent = record.get(SIGNED) if isinstance(record, ConfigRecord) else None
        texts = sent[:MOST] if isinstance(sent, list) else [None]
        sound = [text for text in texts if isinstance(text, str) and len(text) <= LONGEST]
        if len(sound) < len(texts):
            self.refuse(node, "it is no list of signed requests")
        kept = self._texts.setdefault(node, [])
        kept += [text for text in dict.fromkeys(sound) if text not in kept][: MOST - len(kept)]

    def drain(self) -> list[tuple[int, str]]:
        """Give what was collected, with the node that sent it; from then on it is collected anew."""
        found, self._texts = self._texts, {}
        return [(node, text) for node, texts in found.items() for text in texts]

    def refuse(self, node: int, reason: str) -> None:
        """Say why what a node carries is not filed: each reason once, and not without end."""
        said = self._said.setdefault(node, set())
        if reason not in said and len(said) < MOST_SAID:
            said.add(reason)
            log.warning(
                "what node %s carries is not filed, as a client's wish to be forgotten: %s",
                node,
                printable(reason[:300]),
            )


def believed(
    text: str, *, run: str, owners: Mapping[int, str], used: Collection[str], name: Callable[[int], str]
) -> SignedRequest | None:
    """Give what a client has signed; None where it was filed before, as it is carried again and again.

    Args:
        text: JSON, from a node.
        run: id of the run's key.
        owners: the id of the key that must have signed, by each client that the node may speak for.
        used: nonces of what was filed.
        name: of a client, in words.

    Raises:
        UnsignedError: it is not what one of these clients has signed for this run, in time.
    """
    asked = read(text.encode(errors="replace"))
    if asked.nonce in used:
        return None
    if not re.fullmatch(NONCE, asked.nonce) or len(asked.clients) != 1:
        raise UnsignedError("it is not by `fedunlearn leave`")
    (client,) = asked.clients
    if client not in owners:
        raise UnsignedError(f"it is about client {name(client)}, for whom this node does not speak")
    check(asked, [client], run=run, owners=owners, at=datetime.now(UTC), used=used, name=name)
    return asked
