"""What Flower runs on a node: a client task for each of the clients that a message names, one after another.

A node keeps nothing between messages but caches by content. Every message says all that it needs.
"""

import os
import socket
import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from fedunlearn.config import from_json
from fedunlearn.federation import messages
from fedunlearn.federation.client import ClientRuntime
from fedunlearn.federation.folding import FOLDED, fold, unfold
from fedunlearn.federation.machine import Machine, settled
from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.strategy import Strategy, strategy_of
from fedunlearn.federation.tasks import tasks_of
from fedunlearn.federation.withdrawals import carried
from fedunlearn.malloc import peak_mebibytes
from fedunlearn.nn.evaluate import Counts
from fedunlearn.nn.rng import drawing_from


def measured(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Add to every reply which worker made it, in how many seconds, at what work, and the worker's peak memory.

    Work is processor time, which other processes of the machine do not change; on a GPU it is wall-clock time.
    """
    working = time.perf_counter if torch.cuda.is_available() else time.process_time
    started, begun = time.perf_counter(), working()
    reply = call_next(message, context)
    reply.content["work"] = MetricRecord(
        {
            "worker": zlib.crc32(f"{socket.gethostname()} {os.getpid()}".encode()),
            "seconds": time.perf_counter() - started,
            "work": working() - begun,
            "mebibytes": peak_mebibytes(),
        }
    )
    return reply


def in_one_piece(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Take a message whose tensors are in one piece apart, and reply in the same way."""
    is_folded = FOLDED in message.content
    message.content = unfold(message.content)
    reply = call_next(message, context)
    if is_folded and reply.has_content():
        reply.content = fold(reply.content)
    return reply


app = ClientApp(mods=[carried, in_one_piece, measured])

DROPOUT = 10**6
"""Place of the draws that layers make by themselves, after any epoch's."""


@lru_cache(maxsize=2)
def resident(config: str, machine: Machine | None = None) -> tuple[ClientRuntime, Strategy]:
    """Give what this process has for the settings in a message, as JSON, on a machine of its own or in a simulation."""
    settings, here = settled(from_json(config), machine)
    runtime = ClientRuntime(settings, here)
    if machine:
        runtime.dataset.say_removed()
    return runtime, strategy_of(settings)


@app.train()
@app.evaluate()
@app.query()
def run_task(message: Message, context: Context) -> Message:
    """Run the message's client task for each of its clients, and reply with the sum of what they share."""
    asked = messages.task_of(message)
    runtime, strategy = resident(asked.config, Machine.of(context.node_config))
    task = tasks_of(type(strategy))[asked.name]
    torch.set_num_threads(runtime.config.train.threads)
    broadcast = {name: value.to(runtime.device) for name, value in messages.unpack(message).items()}
    arguments, portions = messages.arguments_of(message), messages.portions_of(asked)
    sums: Tensors = {}
    counts: dict[int, Counts] = {}
    statistics: Tensors = {}
    weight = 0.0
    for number in asked.clients:
        if broadcast:
            runtime.model.load_state_dict(broadcast)
        client = runtime.client(number, asked.round, broadcast, portions=portions)
        with drawing_from(client.generator(DROPOUT)):  # in any process and order of clients
            update = task(client, runtime.model, strategy.settings, **arguments)
        messages.add_to(sums, update.tensors, update.weight)
        weight += update.weight
        counts[number] = update.counts
        if update.statistics is not None:
            statistics[str(number)] = update.statistics
    packed = messages.pack(sums, task.dtype or runtime.config.message_dtype) if sums else None
    return messages.reply(message, counts, packed, weight=weight, statistics=statistics)


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Reply with the clients that this node can answer for, all of them in a simulation, and their examples.

    A machine of its own also tells the SHA-256 of its clients' images.
    """
    config, machine = messages.task_of(message).config, Machine.of(context.node_config)
    if not resident(config, machine)[0].is_current:
        resident.cache_clear()
    runtime, _ = resident(config, machine)
    counts = {client: Counts(len(runtime.slices[client])) for client in runtime.clients}
    reply = messages.reply(message, counts)
    about = reply.content.metric_records["metrics"]
    about["nodes"] = int(context.node_config.get("num-partitions", 1))
    about["gpu"] = int(runtime.device.type == "cuda")
    if runtime.config.partition.is_on_nodes:
        own: dict[str, Any] = {str(client): runtime.fingerprint(client) for client in runtime.clients}
        reply.content["fingerprints"] = ConfigRecord(own)
    return reply
