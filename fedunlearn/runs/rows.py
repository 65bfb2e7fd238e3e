"""What a row of `metrics.jsonl` has, so that whoever reads it can rely on it."""

from typing import Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

KINDS = ("round", "forget")  # others are a study's own


class Score(BaseModel):
    """Accuracies, 0..1, and of how many examples."""

    class_: float = Field(alias="class")
    client_id: float
    examples: int
    held_out: float | None = None


class Scores(BaseModel):
    """How good a model is."""

    retain: Score
    test: Score
    forgotten: dict[int, Score]
    retain_clients: dict[int, Score]


class Round(BaseModel):
    """A round of training; `clients` counts them where there are many."""

    kind: Literal["round"]
    round: int
    clients: list[int] | int = 0


class Forget(BaseModel):
    """A request that is COMPLETED."""

    kind: Literal["forget"]
    round: int
    completed_round: int
    request: str
    clients: list[int]
    before: Scores
    after: Scores


ROW = TypeAdapter(Round | Forget)


def check(row: Any) -> None:
    """Raise ValueError where something is no row; in rounds that were evaluated, scores are there."""
    if not isinstance(row, dict) or type(row["round"]) is not int:
        raise ValueError("a row has a round")
    if row["kind"] in KINDS:
        ROW.validate_python(row)
    if row["kind"] == "round" and "test" in row:
        Scores.model_validate(row)
