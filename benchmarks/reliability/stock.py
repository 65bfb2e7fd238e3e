"""What stock Flower's FedAvg makes of the same bad replies to `train`, as far as it has their like."""

from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from benchmarks.reliability.array_damages import Damage
from benchmarks.reliability.damages import copied
from benchmarks.reliability.federation import BadReplyGrid, Site, damaged
from benchmarks.reliability.outcomes import Examiner, Found
from fedunlearn.federation import messages

OURS_ALONE = (
    "statistics",
    "embeddings",
    "work",
    "second",
    "memory",
    "client",
    "loss",
    "correct",
    "weight",
    "plausible",
)


def has_counterpart(damage: str) -> bool:
    """Say whether FedAvg's replies have what is damaged: arrays, and a number of examples."""
    return not any(word in damage for word in OURS_ALONE)


def stock_found(examiner: Examiner, grid: BadReplyGrid, site: Site, damage: Damage | None) -> Found:
    """Let FedAvg make one round of the replies of `grid`, one of them damaged.

    A client's mean update is what FedAvg averages here, and the broadcast weights are added to the mean. That is the
    same as averaging weights.
    """
    found, replies = Found(), []
    for place, (message, reply) in grid.sent.items():
        if (place.task, place.number) == (site.task, site.number):
            mean = Message(_mean(reply), reply_to=message)
            answer = damaged(message, mean, damage) if damage and place == site else mean
            if answer is not None:
                replies.append(_with_examples(message, answer))
    broadcast = messages.unpack(grid.sent[site][0])
    try:
        arrays, _ = FedAvg(weighted_by_key="num-examples").aggregate_train(1, replies)
        assert arrays is not None
        update = {name: value.to(broadcast[name].dtype) for name, value in arrays.to_torch_state_dict().items()}
        found.model = examiner.model(broadcast | {name: broadcast[name] + value for name, value in update.items()})
    except Exception as error:
        found.ended = f"{type(error).__name__}: {error}"
    return found


def _mean(reply: Message) -> RecordDict:
    content = copied(reply.content)
    weight = messages.weight_of(reply)
    content["arrays"] = ArrayRecord({name: value / weight for name, value in messages.unpack(reply).items()})
    return RecordDict({name: content[name] for name in ("arrays", "metrics")})


def _with_examples(message: Message, reply: Message) -> Message:
    """Put FedAvg's one number in the place of our counts."""
    if reply.has_error() or "metrics" not in reply.content:
        return reply
    metrics: Any = reply.content["metrics"]
    if isinstance(metrics, MetricRecord) and "examples" in metrics:
        examples = metrics["examples"]
        number = examples[0] if isinstance(examples, list) else examples
        reply.content["metrics"] = MetricRecord({"num-examples": number})
    return reply
