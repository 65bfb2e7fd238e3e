"""Client tasks: functions that run where a client's data is, and what they send back.

What a task returns is what a client shares, and nothing else of a client ever travels.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn

from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError
from fedunlearn.federation.client import Client
from fedunlearn.federation.messages import Tensors, floating
from fedunlearn.nn.evaluate import Counts
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.unlearning import batch_norm

KINDS = ("train", "evaluate", "query")
ROUNDING = 1e-3  # of sums in fp32, relative
Shapes = Callable[[TwoHeadModel], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Update:
    """What a client sends back: tensors to be summed over clients, and what it counted.

    Attributes:
        tensors: by name; the sum over clients has each client's tensors times its `weight`.
        weight: the client's examples for a mean over examples, 1 for a plain sum or a mean over clients. Others are
            refused, since a weight is a client's word too.
        counts: examples, and loss and hits where the task counted them.
        statistics: a tensor of this client alone, which is not summed.
    """

    tensors: Tensors = field(default_factory=dict)
    weight: float = 1
    counts: Counts = Counts()
    statistics: Tensor | None = None


def weights(model: TwoHeadModel) -> Tensors:
    """Give the shapes of a model's update: everything that is floating-point, statistics of BatchNorm included."""
    return floating(model.state_dict())


def parameters(model: TwoHeadModel) -> Tensors:
    """Give the shapes of one value a parameter."""
    return dict(model.named_parameters())


def nothing(model: TwoHeadModel) -> Tensors:
    """Give the shapes of no tensors: a task that only counts."""
    return {}


@dataclass(frozen=True)
class Sent:
    """What one reply brought, as a task's `check` gets it.

    Attributes:
        tensors: sums over the reply's clients, by name.
        statistics: by client.
        examples: that each client of the reply has.
        pixels: of an image.
    """

    tensors: Mapping[str, Tensor]
    statistics: Mapping[int, Tensor]
    examples: Mapping[int, int]
    pixels: int


@dataclass(frozen=True)
class ClientTask:
    """A function `(client, model, settings, **arguments)` that a node calls for each of its clients in a message.

    Attributes:
        function: what runs; `model` is the broadcast model, which it may change.
        kind: of message, in Flower's words: `train`, `evaluate` or `query`. What a `train` task sends is a change of
            the model. So `robust` averages it, the round's gate looks at it, and it may count examples once an epoch.
            An `evaluate` task counts all of a client's examples.
        sends: names and shapes of the tensors that are summed over clients. A reply with others is refused.
        sends_apart: the shape of the `statistics` of each client, if it sends any.
        dtype: of the tensors that it sends, `fp32` or `bf16`; by default the run's `message_dtype`.
        needs_model: whether the model travels with the task.
        trains: whether a query of it counts as a round of training in comparisons of cost.
        check: raises ValueError for values that no honest client sends, as negative Fishers. Dtypes, shapes, counts
            and finite values are checked anyway.
        compared: whether a reply that is far larger than the others' is refused (`reply_band`); not for tasks of forget
            clients alone, who must all be believed or none.
    """

    function: Callable[..., Any]
    kind: str = "query"
    sends: Shapes = weights
    sends_apart: Callable[[TwoHeadModel], Tensor] | None = None
    dtype: str = ""
    needs_model: bool = True
    trains: bool = False
    check: Callable[[Sent], None] | None = None
    compared: bool = True

    @property
    def name(self) -> str:
        """The function's name, under which messages name the task and receipts book its cost."""
        return self.function.__name__

    @property
    def shares(self) -> str:
        """What a client shares, in words: the first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def __call__(self, client: Client, model: TwoHeadModel, settings: Any, **arguments: Any) -> Update:
        """Run the task for one client; a plain dict of tensors becomes a mean over examples."""
        found = self.function(client, model, settings, **arguments)
        if isinstance(found, Update):
            return found
        if isinstance(found, Counts):
            return Update({}, client.examples, found)
        if isinstance(found, Tensor):
            return Update({}, client.examples, Counts(client.examples), statistics=found)
        return Update(dict(found), client.examples, Counts(client.examples))


Function = Callable[..., Any] | staticmethod


@overload
def client_task(function: Function, /) -> ClientTask: ...
@overload
def client_task(**options: Any) -> Callable[[Function], ClientTask]: ...
def client_task(function: Function | None = None, /, **options: Any) -> Any:
    """Make a function a task of clients, run where their data is.

    Within a strategy's class it stands above `@staticmethod`, since a client has no strategy object. The function
    takes a `Client`, the broadcast model and the strategy's settings, then keyword arguments that `Federation.run` is
    given: numbers, words, lists, tensors and dicts of tensors. It returns an `Update`, a dict of tensors (which is
    averaged over examples), a tensor (which is not summed), or `Counts`.

    Args:
        options: attributes of `ClientTask`.

    Example:
        >>> @client_task
        ... def climb(client, model, settings, *, until): ...
        >>> climb.name
        'climb'
    """
    if function is None:
        return lambda wrapped: client_task_of(wrapped, **options)
    return client_task_of(function, **options)


def client_task_of(function: Function, **options: Any) -> ClientTask:
    """Make a client task of a plain function or of a static method."""
    plain = function.__func__ if isinstance(function, staticmethod) else function
    if plain.__annotations__.get("return") in (Counts, Tensor, "Counts", "Tensor"):
        options = {"sends": nothing, **options}
    task = ClientTask(plain, **options)
    if task.kind not in KINDS:
        raise ValueError(f"kind={task.kind!r} of the client task {task.name} is none of {', '.join(KINDS)}")
    if task.dtype not in ("", "fp32", "bf16"):
        raise ValueError(f"dtype={task.dtype!r} of the client task {task.name} is neither 'fp32' nor 'bf16'")
    return task


def nonnegative(sent: Sent) -> None:
    """Refuse values below zero, which Fishers and other means of squares do not have."""
    for name, value in sent.tensors.items():
        if bool((value < 0).any()):
            raise ValueError(f"it sent {name} below zero")


def of_these_images(sent: Sent) -> None:
    """Refuse class counts that are not those of the client's images."""
    for client, counts in sent.statistics.items():
        examples = sent.examples[client]
        if bool(((counts < 0) | (counts > examples)).any()) or int(counts.sum()) != examples:
            raise ValueError(f"it sent class counts of client {client} that do not add up to its examples")


def of_some_images(sent: Sent) -> None:
    """Refuse class counts of more images than the client has."""
    for client, counts in sent.statistics.items():
        examples = sent.examples[client]  # a sum alone could wrap around
        if bool(((counts < 0) | (counts > examples)).any()) or int(counts.sum()) > examples:
            raise ValueError(f"it sent counts of more images than client {client} has")


def embeddings_of_images(sent: Sent) -> None:
    """Refuse counts, sums and sums of squares that embeddings of the client's images cannot have."""
    for client, rows in sent.statistics.items():
        count, (total, squares) = rows[:, 0], rows[:, 1:].double().chunk(2, 1)
        if bool((count < 0).any() or (count != count.round()).any()) or not 1 <= count.sum() <= sent.examples[client]:
            raise ValueError(f"it sent embedding statistics of {count.sum():g} images of client {client}")
        _check_squares(f"embedding statistics of client {client}", count.double()[:, None], total, squares)


def batches_of_images(sent: Sent) -> None:
    """Refuse counts, sums and sums of squares that layers' inputs of the clients' images cannot have."""
    most = sum(sent.examples.values()) * sent.pixels
    for name, (count, total, squares) in sent.tensors.items():
        if not 2 <= count[0] <= most or bool((count != count[0]).any()) or count[0] != count[0].round():
            raise ValueError(f"it sent statistics of {count[0]:g} values of {name}, of {most} pixels")
        _check_squares(f"statistics of {name}", count, total, squares)


def _check_squares(what: str, count: Tensor, total: Tensor, squares: Tensor) -> None:
    """Raise ValueError where n sum(x^2) < (sum x)^2, but for rounding in fp32; nothing may be summed of no values."""
    short = count * squares < total.square() * (1 - ROUNDING)
    if bool((squares < 0).any() or short.any() or ((count == 0) & (squares > 0)).any()):
        raise ValueError(f"it sent {what} that no values have")


def one_row_a_class(model: TwoHeadModel) -> Tensor:
    """Give the shape of a number for each class, [K]."""
    return torch.zeros(_classes(model), dtype=torch.int64)


def embedding_rows(model: TwoHeadModel) -> Tensor:
    """Give the shape of embedding statistics: count, sum and sum of squares for each class, [K, 1 + 2 d]."""
    hidden = model.client_head.hidden if model.client_head is not None else model.class_head.hidden
    return torch.zeros(_classes(model), 1 + 2 * hidden.in_features)


@client_task(kind="train", sends_apart=embedding_rows, trains=True, check=embeddings_of_images)
def train(
    client: Client,
    model: TwoHeadModel,
    settings: Any,
    *,
    fraction: float = 1.0,
    lr: float | None = None,
    embeddings: bool = True,
) -> Update:
    """Its model's update after a round of local training, and statistics of its embeddings (mean, variance a class).

    Args:
        fraction: of its examples to train on.
        lr: in place of the schedule's learning rate.
        embeddings: whether to send embedding statistics, where the server trains the client head.
    """
    statistics = client.embedding_statistics(model) if embeddings and client.server_trains_client_head else None
    counts = client.fit(model, fraction=fraction, lr=lr)
    return Update(client.changes(model), client.examples, counts, statistics)


@client_task(kind="evaluate")
def evaluate(client: Client, model: TwoHeadModel, settings: Any) -> Counts:
    """How many of its images the model gets right, class and client ID, and its loss on them."""
    return client.evaluate(model)


@client_task(sends_apart=one_row_a_class, needs_model=False, check=of_these_images, compared=False)
def class_counts(client: Client, model: TwoHeadModel, settings: Any) -> Tensor:
    """How many images of each class it has."""
    return client.class_counts


@client_task(sends_apart=one_row_a_class, needs_model=False, check=of_some_images, compared=False)
def selected_counts(client: Client, model: TwoHeadModel, settings: Any, *, selection: dict[str, Any]) -> Tensor:
    """How many images of each class it has that a request names."""
    return client.selected_counts(Selection.read(selection))


@client_task(sends_apart=embedding_rows, check=embeddings_of_images)
def embedding_statistics(client: Client, model: TwoHeadModel, settings: Any) -> Tensor:
    """Statistics of its embeddings: count, mean and variance for each class."""
    return client.embedding_statistics(model)


@client_task(sends=batch_norm.no_statistics, check=batches_of_images)
def batch_norm_statistics(client: Client, model: TwoHeadModel, settings: Any, *, fraction: float = 1.0) -> Update:
    """Sums over its images that BatchNorm statistics are estimated from: count, sum and sum of squares a channel."""
    sums = batch_norm.batch_statistics(model, client.shuffled_images(fraction), precision=client.precision)
    return Update(sums, 1, Counts(client.examples))


BUILT_IN: dict[str, ClientTask] = {
    task.name: task
    for task in (train, evaluate, class_counts, selected_counts, embedding_statistics, batch_norm_statistics)
}


def tasks_of(strategy: type) -> dict[str, ClientTask]:
    """Give every task that clients of a strategy can be asked for, by name."""
    own = {name: value for name, value in inspect.getmembers(strategy) if isinstance(value, ClientTask)}
    return BUILT_IN | {task.name: task for task in own.values()}


def check_tasks(strategy: type, model: TwoHeadModel) -> None:
    """Raise UserError where a strategy's client task of kind `train` sends anything but a change of the model."""
    known = weights(model)
    for task in tasks_of(strategy).values():
        sent = task.sends(model) if task.kind == "train" else {}
        foreign = [name for name, shape in sent.items() if name not in known or shape.shape != known[name].shape]
        if foreign:
            about = f'the client task {task.name} has kind="train" and sends {foreign[0]}'
            raise UserError(f'{about}, which is no tensor of the model: leave kind="train" out')


def _classes(model: nn.Module) -> int:
    return model.class_head.out.out_features  # type: ignore[union-attr, return-value]
