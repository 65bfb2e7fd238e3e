"""The federation as a strategy sees it: clients to ask, a state to change, and the server's own data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging import getLogger
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from fedunlearn.build import is_evaluated, learning_rate_of, server_trains_client_head
from fedunlearn.config import Config
from fedunlearn.data.selection import Selection
from fedunlearn.errors import DestroyedError, NotNowError, unusable_replies
from fedunlearn.federation import server_state, tasks
from fedunlearn.federation.judge import Judge
from fedunlearn.federation.nodes import Nodes
from fedunlearn.federation.replies import RefusedError, Results, add_cost
from fedunlearn.federation.round_gate import RoundGate
from fedunlearn.federation.server_data import ServerData
from fedunlearn.federation.server_state import ServerState
from fedunlearn.federation.tasks import ClientTask
from fedunlearn.naming import named, with_portions
from fedunlearn.nn.client_head import train_client_head
from fedunlearn.nn.evaluate import Counts, Predictions
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.nn.rng import generator_of
from fedunlearn.runs.ledger import FORGOTTEN, TAKEN_UP
from fedunlearn.runs.run import Run
from fedunlearn.unlearning import batch_norm
from fedunlearn.unlearning.fisher import cost_in_words, said_anew
from fedunlearn.unlearning.retrain_estimate import estimate_retrained

SERVER = 2**32 - 1  # the place of the server's random draws: no client has this number

log = getLogger("fedunlearn")


@dataclass(frozen=True)
class ForgetSet:
    """Whose images are forgotten: those of whole clients, or of portions of clients, which have numbers of their own.

    Attributes:
        clients: in ascending order.
        classes: of which nobody has an image left.
    """

    clients: tuple[int, ...]
    classes: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[int]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)


class Federation:
    """What a strategy works with.

    It holds the state of the server, addresses clients through client tasks, and books what each task costs. Nothing
    of it gives access to a client's data.

    Attributes:
        config: settings of the run.
        server: the server's held-out images and its untrained models.
        nodes: who hosts whom, and how many examples each client has.
        state: the server's state; a strategy changes it through the methods, or assigns another one.
        folder: the run's, where a strategy may keep files of its own.
        grid: Flower's, set when a run starts.
        costs: of the request that is being applied, by name of the client task.
        round_gate: looks at updates of retain clients before the model moves by them.
    """

    def __init__(self, run: Run, server: ServerData, nodes: Nodes, state: ServerState) -> None:
        self.config, self.folder, self._ledger = run.config, run.folder, run.ledger
        self.server, self.nodes, self.state = server, nodes, state
        self.costs: dict[str, Any] = {}
        self._judge = judge = Judge(server)
        self.round_gate = RoundGate(
            nodes, lambda update: judge.loss(self.state, update), len(server.class_names), self.config.round_band
        )
        self._grid: Grid | None = None
        self._forget = ForgetSet(())
        self._class_counts: dict[int, Tensor] = {}
        self._counted: set[int] = set()  # whom the present request has asked for class counts, whether they replied
        self._classes: dict[int, Tensor] = {}  # [K] images of each class, of clients whose updates are looked at alone
        self._said: set[str] = set()
        nodes.check_update = self._check_direction
        self._trained = ""  # who trained last, in words
        self._state_before = state  # of the request that is being applied
        self._hard: ServerState | None = None  # the state, while clients work with a softened one

    # Who takes part ----------------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Rounds of training that are in the state."""
        return self.state.round

    @property
    def applied(self) -> int:
        """How many requests have been applied; the present one is not among them."""
        return self._ledger.applied()

    @property
    def applied_by(self) -> set[str]:
        """The strategies of the requests that have been applied."""
        applied = [request.detail for request in self._ledger.requests() if request.state in FORGOTTEN]
        return {detail["strategy"] for detail in applied if "strategy" in detail}

    @property
    def retain(self) -> list[int]:
        """The retain clients: those that can be trained and have no request that was taken up.

        Where a portion of a client's images is to be forgotten, the client comes back as soon as it has said how many.
        """
        portions = self._ledger.portions(TAKEN_UP)
        unknown = {portion.client for number, portion in portions.items() if number not in self.nodes.portions}
        return sorted(self.trainable - set(self._ledger.clients_in(TAKEN_UP)) - unknown)

    @property
    def trainable(self) -> set[int]:
        """The clients with the two examples that BatchNorm needs, whoever has been forgotten."""
        return {c for c, examples in self.nodes.examples.items() if examples >= 2 and c not in self.nodes.portions}

    @property
    def never_trained(self) -> set[int]:
        """The clients without the two examples that BatchNorm needs; not those of a node that does not work.

        What is left of a client beside its portions was trained on with them, even if it is one image, and so was each
        of these.
        """
        nodes, whole = self.nodes, dict(self.nodes.examples)
        for number, portion in nodes.portions.items():
            whole[portion.client] += nodes.examples[number]
        return {c for c, n in nodes.examples.items() if not n or (c not in nodes.portions and whole[c] < 2)}

    @property
    def forgotten(self) -> list[int]:
        """The clients whose requests have been applied, as far as they had been trained on."""
        return sorted((set(self._ledger.clients_in(FORGOTTEN)) & self.nodes.examples.keys()) - self.never_trained)

    def examples(self, clients: Iterable[int]) -> int:
        """Count the examples of clients."""
        return sum(self.nodes.examples[client] for client in clients)

    def count(self, selection: Selection, on: Iterable[int]) -> dict[int, int]:
        """Ask how many of their images are selected, of clients or portions; who is silent is left out."""
        about = {"selection": selection.content()}
        found = self.nodes.query(self.grid, tasks.selected_counts, self.round, on, self.state.params, arguments=about)
        return {client: int(counts.sum()) for client, counts in found.statistics.items()}

    def split(self) -> None:
        """Take everything out of the clients' images that requests were taken up about, into portions of their own."""
        examples = self._ledger.examples()
        for number, portion in sorted(self._ledger.portions(TAKEN_UP).items()):
            if number in examples and number not in self.nodes.portions:
                self.nodes.split(portion, examples[number])
                self._classes.pop(portion.client, None)
        self.server.leave_out(self._ledger.classes_left())

    def emptied(self, clients: Iterable[int]) -> list[int]:
        """Give the clients of which nothing is left beside these portions of them."""
        owners = {self.nodes.portions[c].client for c in clients if c in self.nodes.portions}
        return sorted(owner for owner in owners if not self.nodes.examples[owner])

    # Asking clients ----------------------------------------------------------------------------------------------

    @property
    def grid(self) -> Grid:
        """Flower's grid."""
        if self._grid is None:
            raise RuntimeError("the run has not started: there is no grid yet")
        return self._grid

    @grid.setter
    def grid(self, grid: Grid) -> None:
        self._grid = grid

    def run(
        self,
        task: ClientTask,
        *,
        on: Iterable[int],
        at_round: int | None = None,
        one_client_each: bool = False,
        on_reply: Callable[[Results], None] = lambda results: None,
        **arguments: Any,
    ) -> Results:
        """Run a client task where the clients' data is, on the model as it is now, and sum what they send back.

        Retain clients that trained are asked once more where their mean update would destroy the model, and the replies
        that do are left out.

        Args:
            on: the clients. Those that are to be forgotten must all reply.
            at_round: that the clients' random draws depend on; the present one by default.
            one_client_each: give every client a message, and so a reply, of its own.
            on_reply: is shown every reply alone.
            arguments: of the task: numbers, words, lists, tensors, dicts of tensors.

        Returns:
            Sums over the clients: `.mean()`, `.sum()`, `.counts`, `.statistics`.

        Raises:
            NotNowError: nobody replied, or not every client that is to be forgotten.
            DestroyedError: the model as it is now is of no use.

        Example:
            `federation.apply(federation.run(self.climb, on=forget, until=0.4).mean())`
        """
        asked, round_ = list(on), self.round if at_round is None else at_round

        def ask(on_reply: Callable[[Results], None]) -> Results:
            about: dict[str, Any] = {"arguments": arguments, "one_client_each": one_client_each, "on_reply": on_reply}
            if self._forget:  # in a request the model in between may be of no use
                about["is_of_use"] = self._is_of_use
            found = self.nodes.query(self.grid, task, round_, asked, self.state.params, **about)
            add_cost(self.costs, task.name, found.cost)
            return found

        if self.nodes.is_robust(task):
            self.know_classes(asked)
        try:
            server_state.check_finite(self.state)
            results = ask(on_reply)
        except DestroyedError as error:
            raise DestroyedError(f"{error}{self._trained}") from error
        missing = [client for client in asked if client in self._forget.clients and client not in results.counts]
        if missing:
            raise NotNowError(f"{self.named(missing[:1])} did not reply to {task.name}")
        if not results.counts:
            raise NotNowError(f"nobody who was asked replied to {task.name}")
        if task.kind == "train" and not set(asked) & set(self._forget):
            results, _ = self.round_gate.passed(results, round_, ask)
        if task.kind == "train":
            self._trained = f"; {self.named(sorted(results.counts))} had answered to {task.name} before"
        return results

    def evaluate(self, on: Iterable[int]) -> dict[int, Counts]:
        """Let clients count what the model gets right on their images."""
        return self.run(tasks.evaluate, on=on).counts

    def counts(self, on: Iterable[int]) -> Counts:
        """Let clients count what the model gets right on all their images together."""
        return self.run(tasks.evaluate, on=on).total

    def class_counts(self, clients: Iterable[int]) -> dict[int, Tensor]:
        """Ask clients how many images of each class they have, [K] each, once in a request; then it is dropped.

        Retain clients that do not reply are left out. Nobody is asked again in the same request.

        Raises:
            NotNowError: a client does not reply that is to be forgotten.
        """
        wanted = list(clients)
        found = self._known_class_counts(wanted)
        if absent := [client for client in wanted if client in self._forget.clients and client not in found]:
            raise NotNowError(f"{self.named(absent[:1])} did not reply to {tasks.class_counts.name}")
        return found

    def replying(self, clients: Iterable[int]) -> list[int]:
        """Give the clients that are there, and say their class counts when they are asked."""
        return sorted(self._known_class_counts([*clients]))

    def _known_class_counts(self, wanted: Sequence[int]) -> dict[int, Tensor]:
        if new := [client for client in wanted if client not in self._counted]:
            self._counted.update(new)
            self._class_counts |= self._ask_classes(new)
        return {client: self._class_counts[client] for client in wanted if client in self._class_counts}

    def know_classes(self, clients: Iterable[int]) -> None:
        """Ask clients that are about to train for their class counts, once, where `robust` looks at each update."""
        if unknown := sorted(set(clients) - self._classes.keys() - set(self._forget)):
            self._classes |= self.class_counts(unknown) if self._forget else self._ask_classes(unknown)

    def _ask_classes(self, clients: list[int]) -> dict[int, Tensor]:
        found = self.nodes.query(self.grid, tasks.class_counts, self.round, clients, self.state.params)
        add_cost(self.costs, tasks.class_counts.name, found.cost)
        return found.statistics

    # Changing the state ------------------------------------------------------------------------------------------

    def model(self) -> TwoHeadModel:
        """Give the server's model, loaded with the present parameters; changes of it change nothing else."""
        self.server.model.load_state_dict(self.state.params)
        return self.server.model

    @contextmanager
    def editing(self) -> Iterator[TwoHeadModel]:
        """Give the model to be changed in place; afterwards its parameters are the state's.

        Example:
            `with federation.editing() as model: model.class_head.out.reset_parameters()`
        """
        model = self.model()
        yield model
        self.state = replace(self.state, params={n: value.clone() for n, value in model.state_dict().items()})

    @contextmanager
    def softened(self, temperature: float) -> Iterator[None]:
        """Let clients meanwhile work with class logits that are divided by a temperature; the state stays as it is.

        Fishers and Kronecker factors of such a model are not those of a few badly known images alone.

        Example:
            `with federation.softened(4.0): results = federation.run(self.fisher, on=federation.retain)`
        """
        self._hard = state = self.state
        self.state = server_state.softened(state, temperature)
        try:
            yield
        finally:
            self.state, self._hard = state, None

    def apply(self, update: Mapping[str, Tensor]) -> None:
        """Add an update to the parameters: theta += update."""
        self.state = server_state.apply_update(self.state, update)

    def apply_round(self, results: Results, update: Mapping[str, Tensor], round_: int) -> dict[str, float]:
        """Do what a round of training does: momentum, frozen weights, the client head, BatchNorm statistics.

        Args:
            results: of the clients that trained.
            update: that the model moves by, as `results.mean()`.
            round_: whose learning rate and random draws are taken.

        Returns:
            What the BatchNorm statistics cost. Where there are none, the model keeps averages of the clients' running
            statistics.

        Raises:
            DestroyedError: the new model is not finite.
        """
        self.state = server_state.apply_round(
            self.state,
            update,
            parameters=[name for name, _ in self.server.model.named_parameters()],
            beta=self.config.train.server_momentum,
            frozen_lr_scale=self.frozen_lr_scale(round_),
        )
        server_state.check_finite(self.state)
        self.fit_client_head(results.statistics, round_)
        asked = self.retain if is_evaluated(self.config, round_) else results.counts
        try:
            return self.recalibrate_batch_norm(on=asked, at_round=round_)
        except (NotNowError, DestroyedError) as error:  # clients are silent, or have images unlike the server's
            log.warning("round %d: no BatchNorm statistics, averages in their place: %s", round_, error)
            return {}

    def train(self, *, on: Iterable[int], rounds: int, lr: float | None = None) -> None:
        """Let clients train for some rounds; the server adds their mean updates and trains the client head.

        Args:
            lr: in place of the schedule's learning rate.
        """
        clients = list(on)
        for round_ in range(self.round + 1, self.round + 1 + rounds):
            results = self.run(tasks.train, on=clients, at_round=round_, lr=lr)
            self.apply(results.mean())
            self.fit_client_head(results.statistics, round_)
            self.recalibrate_batch_norm(on=clients, at_round=round_)

    def recalibrate_batch_norm(
        self, *, on: Iterable[int] | None = None, at_round: int | None = None
    ) -> dict[str, float]:
        """Estimate BatchNorm statistics of the present model on a part of each client's images (`batch_norm_fraction`).

        The run does so after every round of training and at the end of every request, whatever the strategy: models
        are compared with statistics that were made in the same way. A strategy calls it where it needs a model in
        between that works in eval mode.

        Args:
            on: the clients; the retain clients by default.
            at_round: that the choice of images depends on; the present one by default.

        Returns:
            What it cost; nothing where there was nothing to do.

        Raises:
            NotNowError: nobody replied, or no statistics can be made of the replies.
        """
        fraction = self.config.batch_norm_part
        if not fraction or not batch_norm.no_statistics(self.server.model):
            return {}
        clients = self.retain if on is None else on
        results = self.run(
            tasks.batch_norm_statistics,
            on=clients,
            at_round=at_round,
            on_reply=self._judge.refusing_unlike_statistics(
                self.state, self.config.statistics_band, generator_of(self.config.seed, SERVER)
            ),
            fraction=fraction,
        )
        with self.editing() as model, unusable_replies():
            batch_norm.recalibrate(model, results.sum())
        return results.cost

    def held_out_batch_norm(self, images: int = 500) -> None:
        """Estimate BatchNorm statistics of the present model on held-out images: no client is asked.

        It is for models in between. In the end the run estimates them on the retain clients' images.

        Args:
            images: how many of the server's, at random; two at least.
        """
        generator = generator_of(self.config.seed, self.round, SERVER)
        with self.editing() as model:
            if self.config.batch_norm_fraction and batch_norm.no_statistics(model):
                sample = (images for images, _, _ in self.server.sample(max(2, images), generator))
                precision = self.config.train.precision
                batch_norm.recalibrate(model, batch_norm.batch_statistics(model, sample, precision=precision))

    def recalibrate_client_head(self) -> None:
        """Train the client head from the retain clients' embeddings as they are now, where the server trains it."""
        if server_trains_client_head(self.config):
            self.recalibrate_batch_norm()
            self.fit_client_head(self.run(tasks.embedding_statistics, on=self.retain).statistics, self.round)

    def fit_client_head(self, statistics: Mapping[int, Tensor], round_: int) -> None:
        """Train the client head from statistics of clients' embeddings, where they sent any; they are not kept."""
        if not statistics or self.server.model.client_head is None:
            return
        there = {client: value.to(self.server.device) for client, value in statistics.items()}
        generator = generator_of(self.config.seed, round_, SERVER)
        with self.editing() as model:
            steps = self.config.train.client_head_steps
            assert model.client_head is not None
            train_client_head(model.client_head, there, steps=steps, generator=generator)

    def _check_direction(self, one: Results) -> None:
        """Refuse the update of one retain client that points the wrong way, or of whose classes nothing is known."""
        (client,) = one.counts
        if client in self._forget.clients:
            return
        if client not in self._classes:
            raise RefusedError("it did not say how many images of each class it has (robust)")
        self._judge.check_direction(self.state, one.mean(), self._classes[client])

    def _is_of_use(self) -> bool:
        """Whether the model in between is about as good as before the request, and better than guessing.

        Of a worse one nobody is blamed. A model is not worse because clients meanwhile work with a softened one.
        """
        return self._judge.is_of_use(self._hard or self.state, self._state_before, self.config.forget.budget)

    def freeze(self, *, since: ServerState, fraction: float) -> None:
        """Freeze that fraction of the weights, those that changed most since an earlier state.

        Rounds of training move frozen weights by `frozen_lr_scale` only. The client head stays free: it has to follow
        the embeddings.
        """
        names = [name for name, _ in self.server.model.named_parameters() if not name.startswith("client_head.")]
        self.state = server_state.freeze(self.state, since.params, fraction, names)

    def frozen_lr_scale(self, round_: int) -> float:
        """Give the factor on updates of frozen weights: the part of the learning rate's fall to come, squared.

        While much is still to learn frozen weights move too, or learning would stop. At the end they do not move. A
        rate that never falls has no end to wait for: then they do not move from the request on.
        """
        first, now, last = (learning_rate_of(self.config, r) for r in (1, round_, self.config.rounds))
        return ((now - last) / (first - last)) ** 2 if first > last else 0.0

    def named(self, clients: Sequence[int], *, capital: bool = False) -> str:
        """Name clients in a sentence, as `client hospital_b`."""
        own, nodes = self.config.partition.names, self.nodes
        names = with_portions(own, nodes.portions, self.server.class_names, nodes.examples)
        return named(clients, names, capital=capital)

    def say_fisher_cost(self, loss_head: str = "class") -> None:
        """Log, once a run, what makes Fishers of this network slow: what clients log stays on their machines."""
        model = self.model()
        for images, labels, clients in self.server.sample(1, torch.Generator()):
            for line in cost_in_words(model, (images, labels, torch.zeros_like(clients)), loss_head=loss_head):
                if line not in self._said:
                    self._said.add(line)
                    said_anew(line)

    def begin_anew(self) -> None:
        """Go back to the run's initial weights, with nothing kept beside them."""
        model = self.model()
        model.load_state_dict(self.server.new_model().state_dict())
        clients = [client for client in self._forget if client not in self.nodes.portions]
        self.state = server_state.begin_anew(self.state, model.state_dict(), clients)

    # What can be known without the client --------------------------------------------------------------------------

    def predictions(self) -> Predictions:
        """Give the model's predictions on the server's held-out images."""
        return self.server.predict(self.model())

    def estimate_retrained(self, predictions: Predictions) -> Predictions:
        """Estimate what a model retrained on the retain clients alone would predict on the held-out images.

        Args:
            predictions: of the present model.

        Raises:
            NotNowError: no retain client has said how many images of each class it has.
        """
        retain = self.retain
        portions = self.nodes.portions.keys() - self.never_trained
        trained_on = sorted((self.trainable | portions) - set(self._ledger.clients_in(FORGOTTEN)))
        counts = self._known_class_counts(trained_on)
        if counts.keys().isdisjoint(retain):
            raise NotNowError(f"no retain client replied to {tasks.class_counts.name}")
        before = total_counts(counts[client] for client in trained_on if client in counts)
        after = total_counts(counts[client] for client in retain if client in counts)
        by_round = {int(round_): probs.cpu() for round_, probs in self.state.predictions.items()}
        by_round[self.round] = predictions.class_probs
        estimate = estimate_retrained(by_round, predictions.class_labels, before, after)
        return predictions._replace(class_probs=estimate)

    def estimated_accuracy(self, forget: Iterable[int]) -> dict[int, float]:
        """Estimate the retrained model's class accuracy on images of each client's class counts, 0..1."""
        estimate, counts = self.estimate_retrained(self.predictions()), self.class_counts(forget)
        return {client: estimate.expected_accuracy(counts[client]) for client in forget}

    # For the request that is being applied -----------------------------------------------------------------------

    @contextmanager
    def applying(self, forget: ForgetSet, config: Config | None = None) -> Iterator[None]:
        """Mark a request as the one that is being applied: its clients must reply, its costs are booked.

        Args:
            forget: who is to be forgotten.
            config: settings that the request is applied with, here and on the clients; the run's by default.
        """
        usual = self.config
        self._forget, self.costs, self._trained, self._state_before = forget, {}, "", self.state
        self.config = self.nodes.config = config or usual
        self.server.forget_classes = forget.classes
        try:
            yield
        finally:
            self._classes = {client: counts for client, counts in self._classes.items() if client not in forget.clients}
            self._forget, self._class_counts, self._state_before = ForgetSet(()), {}, self.state
            self._counted = set()
            self.config = self.nodes.config = usual
            self.server.forget_classes = frozenset()


def total_counts(counts: Iterable[Tensor]) -> Tensor:
    """Add up the class counts of clients, [K]."""
    return torch.stack(list(counts)).sum(0)
