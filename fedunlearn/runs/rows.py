"""What a row of `metrics.jsonl` has, so that whoever reads it can rely on it."""

from math import nan
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationInfo

ROUND, FORGET, PURGE = KINDS = ("round", "forget", "purge")  # others are somebody's own


def _accuracy(value: float) -> float:
    """A fraction, up to rounding; not a number where there are no images."""
    if not -1e-6 <= value <= 1 + 1e-6 and value == value:
        raise ValueError("an accuracy is in 0..1")
    return value


def _client(client: int, info: ValidationInfo) -> int:
    if not 0 <= client < (info.context or {})["clients"]:
        raise ValueError("the run has no such client")
    return client


def _client_name(name: str, info: ValidationInfo) -> str:
    if str(_client(int(name), info)) != name:
        raise ValueError("a client has a number")
    return name


def _of_all_classes(counts: list[int], info: ValidationInfo) -> list[int]:
    if len(counts) != (info.context or {})["classes"]:
        raise ValueError("there is a count for every class")
    return counts


Accuracy = Annotated[float, AfterValidator(_accuracy)]
Client = Annotated[int, AfterValidator(_client)]
ClientName = Annotated[str, AfterValidator(_client_name)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
ClassCounts = Annotated[list[Count], AfterValidator(_of_all_classes)]


class Part(BaseModel):
    """A part of a row: nothing is converted, since whoever reads it takes it as it is there."""

    model_config = ConfigDict(strict=True)


class Score(Part):
    """Accuracies, 0..1, and of how many examples."""

    class_: Accuracy = Field(alias="class")
    client_id: Accuracy
    examples: Count
    held_out: Accuracy | None = None


class Each(Part):
    """Scores by client."""

    forgotten: dict[ClientName, Score] = {}
    retain_clients: dict[ClientName, Score] = {}


class Scores(Part):
    """How good a model is."""

    retain: Score
    test: Score
    forgotten: dict[ClientName, Score]
    retain_clients: dict[ClientName, Score]


class Round(Part):
    """A round of training; `clients` counts them where there are many."""

    kind: Literal["round"]
    round: Count
    clients: list[Client] | Count = 0
    loss: float = nan
    seconds: float = nan
    class_accuracy: Accuracy = nan
    client_accuracy: Accuracy = nan


class Forget(Part):
    """A request that is COMPLETED."""

    kind: Literal["forget"]
    round: Count
    completed_round: Count
    request: str
    clients: list[Client]
    before: Scores
    after: Scores


class Purge(Part):
    """What was kept of clients whose images were removed."""

    kind: Literal["purge"]
    round: Count
    request: str
    class_counts: dict[ClientName, ClassCounts]


ROW = TypeAdapter(Round | Forget | Purge)


def check(row: Any, clients: int, *, classes: int | None) -> None:
    """Raise ValueError where something is no row; in rounds that were evaluated, scores are there.

    Args:
        row: as it was read.
        clients: of the run, with the parts of clients that requests are about.
        classes: of the run's images; None in a study, whose own rows are of any form.
    """
    if not isinstance(row, dict) or type(row["round"]) is not int:
        raise ValueError("a row has a round")
    context = {"clients": clients, "classes": classes}
    if row["kind"] in KINDS:
        ROW.validate_python(row, context=context)
    elif classes is None:
        return
    schema = Scores if "test" in row else Each
    schema.model_validate(row, context=context)
