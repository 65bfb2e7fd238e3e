"""What runs on a node: it trains, measures and questions the clients that it hosts, one after another.

A node keeps nothing between messages but caches by content; every message says all that it needs.
"""

import os
import resource
import socket
import time
import zlib
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from torch import Tensor

from fedunlearn import config as configuration
from fedunlearn.data.partition import hosted
from fedunlearn.federation import messages as wire
from fedunlearn.federation.client import Worker
from fedunlearn.nn.evaluate import Counts
from fedunlearn.unlearning.batch_norm import batch_moments
from fedunlearn.unlearning.fisher import diagonal_fisher
from fedunlearn.unlearning.null_space import symmetric, upper


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
            "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )
    return reply


app = ClientApp(mods=[measured])


@lru_cache(maxsize=2)
def resident(config: str) -> Worker:
    """The worker of a configuration, given as JSON."""
    return Worker(configuration.from_json(config))


def prepare(message: Message) -> tuple[wire.Task, Worker, dict[str, Tensor]]:
    """The task of a message, the worker for it, and the model state that came along (already in the model)."""
    task = wire.task_of(message)
    worker = resident(task.config)
    torch.set_num_threads(worker.config.train.threads)
    state = {name: value.to(worker.device) for name, value in wire.tensors_of(message).items()}
    worker.model.load_state_dict(state)
    return task, worker, state


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train every client from the broadcast model; reply with the sum of n_c times how its weights moved.

    Where the server trains the client head and asks for them, every client's embedding moments at the broadcast model
    come along.
    """
    task, worker, state = prepare(message)
    if task.lr < 0:  # the schedule's, as in no request
        worker.drop_views()
    moments = moments_of(task, worker)
    reply = moved_by(message, worker, state, partial(worker.fit, round_=task.round, share=task.share, lr=task.lr))
    reply.content["moments"] = moments
    return reply


def moments_of(task: wire.Task, worker: Worker) -> ArrayRecord:
    """Every wanted client's embedding moments; none where the server does not train the client head."""
    clients = task.clients if task.embeddings and worker.server_trains_head else []
    return wire.packed({str(client): worker.embedding_moments(client, task.round) for client in clients}, "fp32")


@app.train("unlearn")
def unlearn(message: Message, context: Context) -> Message:
    """As `train`, but every client teaches the model to answer as to unseen images (`worker.unlearn`), and moves it as
    much as it would alone: the reply has the plain sum."""
    task, worker, state = prepare(message)
    teacher = wire.tensors_of(message, "teacher")
    sent = {name: p.to(worker.device) for name, p in wire.tensors_of(message, "projectors").items()}
    work = partial(
        worker.unlearn, round_=task.round, state=state, teacher=teacher, projectors=symmetric(sent), lr=task.lr
    )  # fmt: skip
    reply = moved_by(message, worker, state, work, weight=lambda client: 1)
    if task.last:
        worker.drop_views()
    return reply


@app.train("ascend")
def ascend(message: Message, context: Context) -> Message:
    """As `train`, but every client climbs its class loss (`train.ascend`)."""
    task, worker, state = prepare(message)
    work = partial(worker.ascend, round_=task.round, until=task.until, radius=task.radius)
    return moved_by(message, worker, state, work)


def moved_by(
    message: Message,
    worker: Worker,
    state: dict[str, Tensor],
    work: Callable[[int], Counts],
    weight: Callable[[int], float] | None = None,
) -> Message:
    """Let `work` change the broadcast model for each client; reply with the sum of how its weights moved, times n_c or
    another `weight`."""
    weight = weight or worker.examples
    sums: dict[str, Tensor] = {}
    counts: dict[int, Counts] = {}
    for client in wire.task_of(message).clients:
        worker.model.load_state_dict(state)
        counts[client] = work(client)
        moved = {name: value - state[name] for name, value in wire.averaged(worker.model.state_dict()).items()}
        wire.add_to(sums, moved, weight(client))
    return wire.reply(message, wire.packed(sums, worker.config.wire), counts)


@app.evaluate()
def evaluate_clients(message: Message, context: Context) -> Message:
    """Count what the broadcast model gets right on every client's training images, as they are."""
    task, worker, _ = prepare(message)
    return wire.reply(message, None, {c: worker.evaluate(c) for c in task.clients})


@app.query("fisher")
def fisher(message: Message, context: Context) -> Message:
    """Reply with the sum of n_c times every client's diagonal Fisher."""
    task, worker, _ = prepare(message)
    settings = worker.config.unlearn
    sums: dict[str, Tensor] = {}
    for client in task.clients:
        f = diagonal_fisher(
            worker.model,
            worker.sample(client, task.share, task.round),
            head=settings.head,
            estimator=settings.estimator,
            precision=settings.precision,
        )
        wire.add_to(sums, f, worker.examples(client))
    counts = {c: Counts(worker.examples(c)) for c in task.clients}
    return wire.reply(message, wire.packed(sums, worker.config.wire), counts)


@app.query("inputs")
def inputs(message: Message, context: Context) -> Message:
    """Reply with the sum of n_c times every client's mean products of layers' inputs (`worker.input_products`).

    In fp32: rounded to bf16 they would no longer be products of anything (eigenvalues below zero).
    """
    task, worker, _ = prepare(message)
    sums: dict[str, Tensor] = {}
    for client in task.clients:
        wire.add_to(sums, upper(worker.input_products(client, task.round)), worker.examples(client))
    counts = {c: Counts(worker.examples(c)) for c in task.clients}
    return wire.reply(message, wire.packed(sums, "fp32"), counts)


@app.query("moments")
def moments(message: Message, context: Context) -> Message:
    """Reply with the sums that BatchNorm statistics are estimated from, over a share of every client's images."""
    task, worker, _ = prepare(message)
    sums: dict[str, Tensor] = {}
    for client in task.clients:
        images = worker.shuffled_images(client, task.round, task.share)
        wire.add_to(sums, batch_moments(worker.model, images, precision=worker.config.train.precision))
    counts = {c: Counts(worker.examples(c)) for c in task.clients}
    return wire.reply(message, wire.packed(sums, worker.config.wire), counts)


@app.query("embeddings")
def embeddings(message: Message, context: Context) -> Message:
    """Reply with every client's embedding moments."""
    task, worker, _ = prepare(message)
    reply = wire.reply(message, None, {c: Counts(worker.examples(c)) for c in task.clients})
    reply.content["moments"] = moments_of(task, worker)
    return reply


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Reply with the clients that this node hosts (`partition.hosted`) and how many examples each has."""
    worker = resident(wire.task_of(message).config)
    index, nodes = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    mine = hosted(tuple(map(len, worker.slices)), nodes)[index]
    content = wire.reply(message, None, {c: Counts(worker.examples(c)) for c in mine}).content
    content["metrics"]["node"], content["metrics"]["nodes"] = index, nodes
    content["metrics"]["gpu"] = int(worker.device.type == "cuda")
    return Message(content, reply_to=message)
