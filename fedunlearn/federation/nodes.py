"""The nodes behind a grid: which clients each hosts, what they are sent, and the sums of what they reply."""

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from logging import getLogger
from statistics import multimode
from typing import Any

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedunlearn.config import Config, Forget, state_home, to_json
from fedunlearn.data.folders import hidden
from fedunlearn.data.partition import hosted
from fedunlearn.data.selection import Portion
from fedunlearn.errors import DestroyedError, UserError
from fedunlearn.federation import messages
from fedunlearn.federation import robust as averaging
from fedunlearn.federation.band import judged
from fedunlearn.federation.claims import NOTHING, contradictions, disputed, too_many
from fedunlearn.federation.hosting import Entrance, missing, unbelieved
from fedunlearn.federation.messages import Task, Tensors
from fedunlearn.federation.ordered_grid import OrderedGrid
from fedunlearn.federation.replies import (
    AstrayError,
    Expected,
    Introduction,
    RefusedError,
    Results,
    introduction,
    listed,
)
from fedunlearn.federation.tasks import ClientTask
from fedunlearn.federation.withdrawals import Withdrawals
from fedunlearn.log import waiting
from fedunlearn.naming import name_of
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.runs.hints import forget_command
from fedunlearn.runs.home import runs_folder

WAIT_SECONDS = 600
ATTEMPTS = 3

NO_IMAGES: Mapping[Any, str] = {}

ALONE = {
    "batch_norm_statistics": "; only the BatchNorm statistics are made without it",
    "evaluate": "; only the scores are without it",
}
"""What a reply is missing from that is left out, by task, where a round's training goes on with its client."""

Refused = list[tuple[Message, ValueError]]

log = getLogger("fedunlearn")


class Nodes:
    """Addresses clients through the nodes that host them.

    Args:
        config: settings of the run.
        model: that says which shapes replies have.
        pixels: of an image.
        run: id of the run's key, where machines with their own images are told it.
        counted: the examples of clients, where all images lie on the server's machine too, as in a simulation.

    Attributes:
        config: settings that travel with the messages.
        nodes: Flower's node ids, by position in the federation.
        clients_of: by Flower's node id, its clients in order.
        examples: of each client, and of each portion of one that was asked to be forgotten.
        portions: of clients, by number.
        disputed: clients of which nodes say different numbers of examples.
        gpu: whether a node has one.
        fingerprints: SHA-256 of the images of clients that have them on machines of their own.
        keys: ids of the keys of these machines, by client; empty where nobody knows one.
        check_update: raises RefusedError for one client's update that is to be left out, where `robust` is on.
        withdrawals: what replies have carried of clients that ask on their own machines to be forgotten.
    """

    def __init__(
        self,
        config: Config,
        model: TwoHeadModel,
        *,
        pixels: int,
        run: str = "",
        counted: Mapping[int, int] = NOTHING,
    ) -> None:
        self.config, self._model, self._pixels, self._run = config, model, pixels, run
        self._counted = counted
        self.keys, self._key_of = dict[int, str](), dict[int, str]()
        self.withdrawals = Withdrawals()
        self.nodes: list[int] = []
        self.clients_of: dict[int, list[int]] = {}
        self.examples: dict[int, int] = {}
        self.portions: dict[int, Portion] = {}
        self.disputed: list[int] = []
        self.fingerprints: dict[int, str] = {}
        self.gpu = False
        self.check_update: Callable[[Results], None] = lambda one: None
        self._patience = min(config.timeout, WAIT_SECONDS)

    def identify(
        self,
        grid: OrderedGrid,
        known: Mapping[int, int],
        forgotten: Collection[int] = (),
        portions: Collection[Portion] = (),
        *,
        images: Mapping[int, str] = NO_IMAGES,
        gone: Mapping[str, str] = NO_IMAGES,
    ) -> None:
        """Learn which clients each node can answer for, and share them out, when all nodes are there.

        A node that three times says nothing, or what cannot be true, is named in the log and left out. So is one that
        contradicts what is known of a client, or what most others say of it. Where nodes contradict each other, and
        neither is most of them, a client has as many examples as the node that hosts it says.

        Args:
            known: the examples of clients, from earlier starts of the run.
            images: SHA-256 of the images of clients that have them on machines of their own, as far as it is known.
            gone: by SHA-256 of images and by keys that must not come back, who has forgotten them.
            forgotten: clients whose images may be gone. The others are shared out as if they were still there, since
                sums depend in their last bits on who shares a node.
            portions: of clients that were forgotten: their files may be gone too.

        Raises:
            UserError: no node works, or not all are connected in time.
        """
        is_alone = self.config.partition.is_on_nodes
        with waiting("the nodes' first answers", limit=self._patience if is_alone else WAIT_SECONDS):
            entrance = Entrance(self.config.partition.keys, gone, forgotten, self.name_of, self.forget_command)
            self._key_of = entrance.key_of
            found = self._introduced(grid, forgotten, entrance)
        if is_alone:
            about = {"known": images, "gone": gone, "forgotten": forgotten, "name": self.name_of}
            for node, reason in unbelieved(found, entrance=entrance, **about).items():
                log.warning("%s is left out: %s", self._called(node), reason)
                del found[node]
        past = {client: known[client] for client in forgotten if client in known}
        less = without_portions(known, portions)
        claims = {node: as_before(found[node].examples, known, past, less) for node in sorted(found)}
        certain = {**self._counted, **known}
        unlikely = too_many(claims, self.config.client_share, certain, self.name_of)
        for node, reason in (contradictions(claims, known, self.name_of) | unlikely).items():
            log.warning("%s is left out: %s", self._called(node), reason)
            del claims[node]
        if not claims:
            raise UserError("no node works: the reasons are in the log above")
        self.nodes, self.gpu = list(claims), any(found[node].gpu for node in claims)
        self.clients_of = dict(zip(claims, assigned(list(claims.values())), strict=True))
        self.examples = {client: claims[node][client] for node, own in self.clients_of.items() for client in own}
        self.fingerprints = {c: sha256 for node in claims for c, sha256 in found[node].fingerprints.items() if sha256}
        self.keys = {
            c: self._key_of[node] for node, own in self.clients_of.items() for c in own if node in self._key_of
        }
        self.disputed = sorted(disputed(claims) - known.keys())
        if self.disputed:
            log.warning(
                "nodes contradict each other about clients %s: who hosts one is believed", self.listed(self.disputed)
            )

    def split(self, portion: Portion, examples: int) -> None:
        """Address a portion of a client's images by its own number from now on, and the client for what is left.

        Args:
            portion: of a client; where nobody hosts that, nothing happens.
            examples: that the portion has.
        """
        if portion.number in self.portions or portion.client not in self.examples:
            return
        self.portions[portion.number], self.examples[portion.number] = portion, examples
        self.examples[portion.client] -= examples
        for own in self.clients_of.values():
            if portion.client in own:
                own.append(portion.number)

    def _portions_of(self, clients: Collection[int]) -> str:
        """Say as JSON which portions of the clients, or of the clients that they are portions of, there are."""
        owners = {self.portions[c].client if c in self.portions else c for c in clients}
        return json.dumps(
            {number: portion.content() for number, portion in self.portions.items() if portion.client in owners}
        )

    def _introduced(self, grid: OrderedGrid, forgotten: Collection[int], entrance: Entrance) -> dict[int, Introduction]:
        """Give what every node says of itself, by Flower's id, when there are as many as most of them speak of.

        Machines of their own speak of themselves alone. They are there when every client is that is not forgotten; who
        does not come within `timeout` is left out.
        """
        if self.config.partition.is_on_nodes:
            return self._introduced_alone(grid, forgotten, entrance)
        found: dict[int, Introduction] = {}
        failures: Counter[int] = Counter()
        expected, deadline = 1, time.monotonic() + WAIT_SECONDS
        while len(found) + sum(count == ATTEMPTS for count in failures.values()) < expected:
            if time.monotonic() > deadline:
                raise UserError(f"{len(found)} of {expected} nodes are connected after {WAIT_SECONDS} s")
            self._ask_who(grid, grid.get_node_ids(), found, failures)
            if found:
                expected = min(multimode(about.nodes for about in found.values()))
        if not found:
            raise UserError("no node works: the reasons are in the log above")
        return found

    def _introduced_alone(
        self, grid: OrderedGrid, forgotten: Collection[int], entrance: Entrance
    ) -> dict[int, Introduction]:
        found: dict[int, Introduction] = {}
        failures: Counter[int] = Counter()
        deadline = time.monotonic() + self._patience
        while absent := missing(found, self.config.clients, forgotten):
            if time.monotonic() > deadline:
                way_on = "the run goes on without them until it is started again"
                log.warning("clients %s are not connected: %s", self.listed(absent), way_on)
                break
            self._ask_who(grid, entrance.admitted(grid.get_node_ids(), grid.public_keys()), found, failures)
        return found

    def _ask_who(
        self, grid: OrderedGrid, nodes: Iterable[int], found: dict[int, Introduction], failures: Counter[int]
    ) -> None:
        """Ask the nodes that have come who they are, and note what they say."""
        unknown = [node for node in nodes if node not in found and failures[node] < ATTEMPTS]
        if not unknown:
            time.sleep(0.5 if self.config.partition.is_on_nodes else 0.1)
        task = Task(for_clients(self.config), "identify", 0, [], run=self._run)
        tasks = [replace(task, signers=self._signers(node)) for node in unknown]
        sent = [
            Message(messages.request(one, {}), node, "query.identify") for one, node in zip(tasks, unknown, strict=True)
        ]
        for node, reply in zip(unknown, grid.send_and_receive(sent, timeout=self._patience), strict=True):
            self._take_withdrawals(node, reply)
            try:
                found[node] = introduction(reply, self.config.clients)
            except ValueError as error:
                failures[node] += 1
                log.warning("%s, attempt %d of %d: %s", self._called(node), failures[node], ATTEMPTS, error)

    def _called(self, node: int) -> str:
        """Give a node's number in Flower, and whose key it has where `partition.keys` says that."""
        keys = self.config.partition.keys
        whose = [client for client, key in keys.items() if key == self._key_of.get(node)]
        return f"node {node} (key of {self.listed(whose)})" if whose else f"node {node}"

    def messages(
        self,
        task: ClientTask,
        round_: int,
        clients: Iterable[int],
        state: Mapping[str, Tensor],
        *,
        arguments: Mapping[str, Any] | None = None,
        one_client_each: bool = False,
    ) -> list[Message]:
        """Make one message to every node that hosts some of `clients`: those with most examples first.

        So workers that take one message after another end at about the same time, and the order depends on the data
        alone.

        Args:
            state: of the model that is broadcast.
            arguments: of the client task.
            one_client_each: give every client a message of its own.
        """
        wanted = set(clients)
        one_client_each = one_client_each or self.is_robust(task)
        hosted = [(node, [c for c in self.clients_of[node] if c in wanted]) for node in self.nodes]
        groups = [pair for pair in hosted if pair[1]]
        if one_client_each:
            groups = [(node, [client]) for node, own in hosted for client in own]
        groups.sort(key=lambda pair: -sum(self.examples[c] for c in pair[1]))
        text, records = messages.pack_arguments(arguments or {})
        if task.needs_model:
            records = {"arrays": self.packed(state), **records}
        return [
            Message(
                messages.request(
                    Task(for_clients(self.config), task.name, round_, own, text, self._portions_of(own), self._run),
                    records,
                ),
                node,
                task.kind,
                group_id=str(round_),
            )
            for node, own in groups
        ]

    def add_up(
        self,
        task: ClientTask,
        sent: Iterable[Message],
        replies: Iterable[Message],
        *,
        on_reply: Callable[[Results], None] = lambda results: None,
        is_of_use: Callable[[], bool] = lambda: True,
    ) -> Results:
        """Sum the replies to `sent` as they come, in their order (`OrderedGrid`).

        A reply that has other names or shapes than the task sends, is not finite, lacks a client or is an error is
        named in the log and left out.

        Args:
            on_reply: is shown every reply alone, and raises RefusedError for one that is to be left out too.
            is_of_use: whether something can be learned from the model that was sent. Of another one nobody is blamed.

        Raises:
            DestroyedError: most replies are what honest clients send too if the model that they got is of no use.
        """
        results, started, sent = Results(), time.monotonic(), list(sent)
        parts: list[Results] = []
        refused = Refused()
        believed = self._believed(task, sent, replies, refused)
        band = self.config.reply_band if task.compared else 0.0
        for message, one, reason in judged(believed, band, self.examples):
            try:
                if reason:
                    raise AstrayError(reason)
                if self.is_robust(task):
                    self.check_update(one)
                on_reply(one)
            except RefusedError as error:
                refused.append((message, error))
                continue
            if self.is_robust(task):
                parts.append(one)
            results.include(one)
        check_model_is_of_use(refused, task, len(sent))
        for message, error in refused:
            is_blamed = not isinstance(error, AstrayError) or is_of_use()
            self._refuse(message, str(error) if is_blamed else f"the model has gone astray, and {error}", is_blamed)
        if parts:
            results.tensors = {name: results.weight * value for name, value in self.mean(parts).items()}
        results.seconds = time.monotonic() - started
        return results

    def mean(self, replies: Sequence[Results]) -> Tensors:
        """Give the mean update of some replies, in the way in which this federation averages."""
        if self.config.robust != "none" and len(replies) >= averaging.FEWEST:
            return averaging.mean(replies, self.config.robust)
        total = Results()
        for one in replies:
            total.include(one)
        return total.mean()

    def is_robust(self, task: ClientTask) -> bool:
        """Whether a task's updates are averaged so that a few dishonest ones cannot turn the mean."""
        return self.config.robust != "none" and task.kind == "train"

    def node_of(self, clients: Iterable[int]) -> int:
        """Give the position of the node that hosts clients."""
        hosted = [set(self.clients_of[node]) for node in self.nodes]
        return next(place for place, own in enumerate(hosted) if own >= set(clients))

    def _believed(
        self, task: ClientTask, sent: Sequence[Message], replies: Iterable[Message], refused: Refused
    ) -> Iterator[tuple[Message, Results]]:
        """Give the replies that are what was asked for and can be true, each with the message that it answers."""
        variances = messages.unpack(sent[0], only="running_var") if sent else {}  # the same model in all of them
        expected = Expected(task, self._model, self.config.message_dtype, self.examples, self._pixels, variances)
        for message, reply in zip(sent, replies, strict=True):
            self._take_withdrawals(message.metadata.dst_node_id, reply)
            try:
                yield message, expected.read(reply, message)
            except ValueError as error:
                refused.append((message, error))

    def _take_withdrawals(self, node: int, reply: Message) -> None:
        if self.config.partition.is_on_nodes:  # in a simulation nobody may send any
            self.withdrawals.take(node, reply)

    def owners(self, node: int) -> dict[int, str]:
        """Give the clients that a node may speak for, each with the id of the key that signs for it.

        Those are the clients of the node's own key, or without `partition.keys` those that it hosts.
        """
        key, keys = self._key_of.get(node, ""), self.config.partition.keys
        own = [c for c, owner in keys.items() if owner == key] if keys else self.clients_of.get(node, [])
        return {c: self._signer(c, key) for c in own if c < self.config.clients}

    def _signers(self, node: int) -> str:
        """Say as JSON whose signature is believed of the clients that a machine of its own may have."""
        if not self.config.partition.is_on_nodes:
            return ""
        key, keys = self._key_of.get(node, ""), self.config.partition.keys
        own = [c for c in range(self.config.clients) if not keys or keys.get(c) == key]
        return json.dumps({c: self._signer(c, key) for c in own})

    def _signer(self, client: int, key: str) -> str:
        """Give the id of the key that must sign for a client of a node with this key; empty where none would do."""
        return self.config.owner_keys.get(client, "" if self.config.forget.signed else key)

    def _refuse(self, message: Message, reason: str, is_blamed: bool) -> None:
        asked, node = messages.task_of(message), self.nodes.index(message.metadata.dst_node_id)
        fate = "is left out" if is_blamed else "could not take part"
        who, alone = self.listed(asked.clients), ALONE.get(asked.name, "")
        log.warning("round %d: node %d (clients %s) %s: %s%s", asked.round, node, who, fate, reason, alone)

    def listed(self, clients: Iterable[int]) -> str:
        """Give the names of clients, or their numbers, not more than can be read."""
        return listed(map(self.name_of, clients))

    def name_of(self, client: int) -> str:
        """Give a client's name as text can show it."""
        return name_of(client, self.config.partition.names)

    def forget_command(self, clients: Sequence[int]) -> str:
        """Write the command that asks for clients to be forgotten."""
        folder = runs_folder(state_home(self.config.home)) / self.config.run
        return forget_command(clients, self.config.partition.names, folder)

    def query(
        self,
        grid: Grid,
        task: ClientTask,
        round_: int,
        clients: Iterable[int],
        state: Mapping[str, Tensor],
        *,
        on_reply: Callable[[Results], None] = lambda results: None,
        is_of_use: Callable[[], bool] = lambda: True,
        **content: Any,
    ) -> Results:
        """Send `messages` and `add_up` what comes back; `content` is further content of the messages."""
        sent = self.messages(task, round_, clients, state, **content)
        replies = grid.send_and_receive(sent, timeout=self.config.timeout)
        return self.add_up(task, sent, replies, on_reply=on_reply, is_of_use=is_of_use)

    def packed(self, state: Mapping[str, Tensor]) -> ArrayRecord:
        """Pack a model as it is broadcast."""
        return messages.pack(state, self.config.message_dtype)


def for_clients(config: Config) -> str:
    """Give the settings as clients get them: who is to be forgotten, and which run it is, is nobody's business.

    Of clients' names they get digests, by which a machine knows those whose images it has. Nor is where files lie on
    the server anybody's business, where every machine has its own.
    """
    names = list(map(hidden, config.partition.names))
    update: dict[str, Any] = {"forget": Forget(), "run": ""}
    update["partition"] = config.partition.model_copy(update={"names": names, "keys": {}})
    if config.partition.is_on_nodes:
        update |= {"home": "", "data": config.data.model_copy(update={"root": ""})}
    return to_json(config.model_copy(update=update))


def check_model_is_of_use(refused: Refused, task: ClientTask, asked: int) -> None:
    """Raise DestroyedError where more than half of two or more clients cannot use the model that they were sent."""
    astray = [error for _, error in refused if isinstance(error, AstrayError)]
    if len(astray) > max(1, asked / 2):
        who = f"{len(astray)} of {asked} nodes could not use it"
        raise DestroyedError(f"the model has gone astray: {who} ({task.name}: {astray[0]})")


def without_portions(known: Mapping[int, int], portions: Iterable[Portion]) -> dict[int, int]:
    """Give how many examples clients have once the files of portions are deleted, by client.

    Example:
        >>> from fedunlearn.data.selection import Selection
        >>> without_portions({3: 20, 10: 5}, [Portion(10, 3, Selection((5,)))])
        {3: 15}
    """
    left: dict[int, int] = {}
    for portion in portions:
        if portion.client in known and portion.number in known:
            left[portion.client] = left.get(portion.client, known[portion.client]) - known[portion.number]
    return left


def as_before(
    said: Mapping[int, int], known: Mapping[int, int], past: Mapping[int, int], less: Mapping[int, int]
) -> dict[int, int]:
    """Give what a node says of clients' examples, as if nothing that was forgotten had been deleted.

    Args:
        said: examples by client.
        known: from earlier starts of the run.
        past: the same of forgotten clients alone.
        less: what is left of clients whose portions are out of training, if the files of all of these are deleted.
    """
    deleted = {c: known[c] for c in said.keys() & less.keys() if less[c] <= said[c] <= known[c]}
    return {**said, **{client: past[client] for client in said.keys() & past.keys()}, **deleted}


def assigned(claims: list[Mapping[int, int]]) -> list[list[int]]:
    """Share clients out to the nodes that can answer for them.

    Nodes that can all answer for the same ones get about equally many examples each (`partition.hosted`). Otherwise
    those clients go first that fewest nodes can answer for, then those with most examples. Each goes to the node that
    has the fewest examples so far.

    Example:
        >>> assigned([{0: 5, 1: 1}, {0: 5, 1: 1}]), assigned([{0: 5}, {0: 5, 1: 1}])
        ([[0], [1]], [[0], [1]])
    """
    if all(claim.keys() == claims[0].keys() for claim in claims):
        clients = sorted(claims[0])
        groups = hosted(tuple(claims[0][client] for client in clients), len(claims))
        return [[clients[place] for place in group] for group in groups]
    examples = {client: count for claim in claims for client, count in claim.items()}
    groups: list[list[int]] = [[] for _ in claims]
    able = {client: [place for place, claim in enumerate(claims) if client in claim] for client in examples}
    for client in sorted(examples, key=lambda c: (len(able[c]), -examples[c], c)):
        groups[min(able[client], key=lambda place: sum(examples[c] for c in groups[place]))].append(client)
    return [sorted(group) for group in groups]
