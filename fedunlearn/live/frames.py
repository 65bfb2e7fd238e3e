"""Tables of a run for pandas: a row a round, a row a request."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedunlearn.errors import UserError
from fedunlearn.naming import name_of
from fedunlearn.runs.ledger import Request
from fedunlearn.runs.uncertainty import memorisation_gap

if TYPE_CHECKING:
    from pandas import DataFrame

NAN = float("nan")
OF_A_ROUND = ("train_loss", "train_accuracy", "retain_accuracy", "test_accuracy", "client_id_accuracy")
OF_FORGOTTEN = ("forget_accuracy", "memorisation_gap")
OF_A_REQUEST = ("clients", "state", "received", "strategy", "round", "seconds", "reason")


def frame(rows: Sequence[Mapping[str, Any]], *, index: str, columns: Sequence[str] = ()) -> "DataFrame":
    """Make a table, with these columns first.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise UserError("tables need pandas: pip install 'fedunlearn[notebook]'") from error
    names = dict.fromkeys([index, *columns, *(name for row in rows for name in row)])
    return DataFrame(list(rows), columns=list(names)).set_index(index)


def of_rounds(rows: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> "DataFrame":
    """Make the table of rounds from rows of `metrics.jsonl`: accuracies are fractions, and NaN where nobody measured.

    A column `client_3`, or `client_hospital_b` where clients have names, has the class accuracy on the training images
    of a client, also when it is forgotten.
    """
    rounds = [row for row in rows if row["kind"] == "round"]
    clients = sorted({client for row in rounds for client in _of_clients(row)}, key=int)
    columns = {client: f"client_{names[int(client)] if int(client) < len(names) else client}" for client in clients}
    table = [
        {
            "round": row["round"],
            **_of_round(row),
            **{column: _of_clients(row).get(client, NAN) for client, column in columns.items()},
        }
        for row in rounds
    ]
    return frame(table, index="round", columns=[*OF_A_ROUND, *OF_FORGOTTEN, "seconds"])


def of_requests(requests: Sequence[Request], names: Sequence[str] = ()) -> "DataFrame":
    """Make the table of requests, with the accuracies before and after each that is completed."""
    table = [
        {
            "request": request.id,
            "clients": ", ".join(name_of(client, names) for client in request.clients),
            "state": str(request.state),
            "received": request.received_at,
            **{name: request.detail.get(name) for name in ("strategy", "round", "seconds")},
            "reason": request.detail.get("reason", ""),
            **_before_and_after(request),
        }
        for request in requests
    ]
    return frame(table, index="request", columns=OF_A_REQUEST)


def scores_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Give the accuracies of one model, as a row of `metrics.jsonl` or a request has them, under the tables' names."""
    return {
        "forget_accuracy": _of_forgotten(row.get("forgotten", {})),
        "memorisation_gap": _gap(row),
        "retain_accuracy": row.get("retain", {}).get("class", NAN),
        "test_accuracy": row.get("test", {}).get("class", NAN),
    }


def _of_round(row: Mapping[str, Any]) -> dict[str, Any]:
    trained = {"train_loss": row.get("loss", NAN), "train_accuracy": row.get("class_accuracy", NAN)}
    client_id = {"client_id_accuracy": row.get("retain", {}).get("client_id", NAN)}
    return trained | scores_of(row) | client_id | {"seconds": row.get("seconds", NAN)}


def _of_clients(row: Mapping[str, Any]) -> dict[str, float]:
    each = {**row.get("retain_clients", {}), **row.get("forgotten", {})}
    return {client: scores["class"] for client, scores in each.items()}


def _of_forgotten(each: Mapping[str, Mapping[str, Any]]) -> float:
    examples = sum(scores["examples"] for scores in each.values())
    return sum(scores["class"] * scores["examples"] for scores in each.values()) / examples if examples else NAN


def _gap(row: Mapping[str, Any]) -> float:
    gap = memorisation_gap(row.get("forgotten", {}), row.get("test", {}).get("examples", 0))
    return NAN if gap is None else gap.value


def _before_and_after(request: Request) -> dict[str, float]:
    return {
        f"{name}_{when}": value
        for when in ("before", "after")
        for name, value in scores_of(request.detail.get(when, {})).items()
    }
