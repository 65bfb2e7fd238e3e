"""Portions of clients at the boundaries between rounds: how many images they have, and with whom they are forgotten."""

from collections.abc import Iterable, Mapping, Set

from fedunlearn.data.selection import Portion, Selection
from fedunlearn.errors import NotNowError
from fedunlearn.federation.handle import Federation
from fedunlearn.runs.ledger import FORGOTTEN, TAKEN_UP, Ledger, Request, State
from fedunlearn.runs.run import Run

NOBODY_LEFT = "no client would be left"
"""Why a request is refused that would leave nobody to train."""
ALL_FORGOTTEN = "all that it means was forgotten with other requests meanwhile"
"""Why a request is refused after its clients have left whole."""


class Portions:
    """Takes portions of clients, as requests mean them, out of these clients' images.

    A client alone knows which of its images are meant, and says how many they are, of one portion after the other.
    """

    def __init__(self, run: Run, federation: Federation) -> None:
        self._ledger, self._federation, self._clients = run.ledger, federation, run.config.clients
        self._silent: set[int] = set()  # clients that have not said, at this boundary, which images are meant

    def at_boundary(self) -> None:
        """Ask from now on those too who were silent at the boundary before."""
        self._silent = set()

    def of(self, request: Request) -> dict[int, Portion]:
        """Give the portions that a request means, without those that were forgotten with other requests meanwhile."""
        gone = set(self._ledger.clients_in(FORGOTTEN))
        return {n: portion for n, portion in request.portions.items() if gone.isdisjoint({n, portion.client})}

    def whole(self, request: Request) -> set[int]:
        """Give the clients that leave whole, with those of their portions that others have set aside."""
        clients = set(request.clients) - request.portions.keys()
        return clients | self._aside(request).keys() if clients else clients

    def take_apart(self, request: Request) -> tuple[set[int], str]:
        """Learn how many images the portions have that a request is about, and take them out of training.

        Returns:
            Whom it is about, clients or portions, those among them that others have set aside; and why it cannot be
            applied, if so.

        Raises:
            NotNowError: a client does not reply. What the others have said is kept.
        """
        portions, nodes = self.of(request), self._federation.nodes
        if not portions:
            return self.whole(request), ALL_FORGOTTEN if request.portions else ""
        found = self._count(portions)
        known = found | {number: nodes.examples[number] for number in portions.keys() & nodes.portions.keys()}
        shared, silent = self._shared(request)
        missing = [portion.client for number, portion in portions.items() if number not in known] + silent
        leaves_anybody = self._leaves_anybody(portions, known)
        reason = ""
        if not missing:
            reason = self._not_there(request, known | shared) or ("" if leaves_anybody else NOBODY_LEFT)
        if leaves_anybody and (not reason or self.is_begun(request)):
            self._keep(found)
        if missing:
            raise self._silence(missing)
        return {*portions, *self._with_lower(shared)}, reason

    def is_begun(self, request: Request) -> bool:
        """Say whether images that a request is about have been counted, and are out of training."""
        return not request.portions.keys().isdisjoint(self._federation.nodes.portions)

    def count_again(self, request: Request) -> tuple[list[int], str]:
        """Let clients train again, without what a request that was set aside is about, that were silent about it.

        Returns:
            These clients; and why the request is to be refused after all, if so.
        """
        portions = self.of(request)
        found = self._count(portions)
        if not found:
            return [], ""
        if not self._leaves_anybody(portions, found):
            return [], "" if self.is_begun(request) else NOBODY_LEFT
        self._keep(found)
        return [portions[number].client for number in found], ""

    def takes_the_last(self, request: Request, selection: Selection) -> bool:
        """Say whether nobody has images of a request's classes beside it, since all others have forgotten them."""
        earlier = {
            portion.client
            for portion in self._ledger.portions(FORGOTTEN).values()
            if portion.selection.is_of_classes and set(selection.classes) <= set(portion.selection.classes)
        }
        without = {*request.owners, *earlier, *self._ledger.clients_in(FORGOTTEN)}
        return without.issuperset(range(self._clients))

    def _aside(self, request: Request) -> dict[int, Portion]:
        """Give the portions that may have some of a request's images, and that others have set aside."""
        portions = self._all_aside().items()
        return {n: portion for n, portion in portions if n not in request.clients and request.may_share(portion)}

    def _all_aside(self) -> dict[int, Portion]:
        """Give the portions that are out of their clients' images, and still in the model."""
        examples, gone = self._federation.nodes.examples, set(self._ledger.clients_in(FORGOTTEN))
        aside = self._ledger.portions([State.COLLECTING, State.QUARANTINED])
        return {n: p for n, p in aside.items() if examples.get(n) and gone.isdisjoint({n, p.client})}

    def _with_lower(self, numbers: Iterable[int]) -> set[int]:
        """Add to portions those of lower numbers that may have images which they select too, and theirs in turn."""
        found, aside = set(numbers), self._all_aside()
        selected = self._ledger.portions()
        while (
            lower := {
                n
                for n, portion in aside.items()
                for higher in (selected[number] for number in found if number > n)
                if higher.client == portion.client and higher.selection.may_share(portion.selection)
            }
            - found
        ):
            found |= lower
        return found

    def _not_there(self, request: Request, examples: Mapping[int, int]) -> str:
        """Say why there is nothing to forget, if so; what was forgotten with others counts, as far as it is known."""
        counted, others = self._ledger.examples(), request.portions.keys() - examples.keys()
        if not others <= counted.keys():
            return ""
        there = {**{number: counted[number] for number in others}, **examples}
        return unsuitable_portions(request.portions, there, named_before(self._ledger))

    def _shared(self, request: Request) -> tuple[dict[int, int], list[int]]:
        """Give how many of the images that a request selects are in portions that were set aside, by these.

        Returns:
            The numbers, and the clients that did not say it.
        """
        aside = self._aside(request)
        if not aside or request.selection is None:
            return {}, []
        found = self._federation.count(request.selection, aside)
        silent = [portion.client for n, portion in aside.items() if n not in found]
        return {n: images for n, images in found.items() if images}, silent

    def _count(self, portions: Mapping[int, Portion]) -> dict[int, int]:
        """Ask clients how many images portions have that nobody has counted yet; who is silent is left out.

        A client says it of one portion after the other, since each has what is left beside those before. So it is asked
        first about those of earlier requests, and what it says of them is kept.
        """
        found: dict[int, int] = {}
        while asked := self._next(portions, found):
            said: dict[int, int] = {}
            for selection in {portion.selection: None for portion in asked}:
                numbers = {portion.client: portion.number for portion in asked if portion.selection == selection}
                counts = self._federation.count(selection, numbers)
                said |= {numbers[client]: images for client, images in counts.items()}
            self._silent.update(portion.client for portion in asked if portion.number not in said)
            of_others = {
                portion.number: portion for portion in asked if portion.number in said.keys() - portions.keys()
            }
            if self._leaves_anybody(of_others, said):
                self._keep({number: said[number] for number in of_others})
            else:
                self._silent.update(portion.client for portion in of_others.values())
            found |= {number: images for number, images in said.items() if number in portions}
        return found

    def _next(self, portions: Mapping[int, Portion], found: Mapping[int, int]) -> list[Portion]:
        """Give of each client the first portion that nobody has counted, up to the one that is wanted."""
        last = {portion.client: number for number, portion in portions.items()}
        first: dict[int, Portion] = {}
        for number, portion in sorted(self._ledger.portions(TAKEN_UP).items()):
            is_counted = number in found or number in self._federation.nodes.portions
            if not is_counted and number <= last.get(portion.client, -1) and portion.client not in self._silent:
                first.setdefault(portion.client, portion)
        return [*first.values()]

    def _keep(self, found: Mapping[int, int]) -> None:
        """Keep how many examples portions have, and take them out of their clients' images."""
        self._ledger.keep_examples(found)
        self._federation.split()

    def _leaves_anybody(self, portions: Mapping[int, Portion], known: Mapping[int, int]) -> bool:
        """Say whether anybody can certainly be trained without portions, as far as their examples are known."""
        nodes, gone = self._federation.nodes, self._ledger.clients_in(TAKEN_UP)
        left = {c: nodes.examples[c] for c in self._federation.retain}
        for number, portion in portions.items():
            if portion.client in nodes.examples and portion.client not in gone:
                taken = 0 if number in nodes.portions else known.get(number, nodes.examples[portion.client])
                left[portion.client] = nodes.examples[portion.client] - taken
        return max(left.values(), default=0) >= 2

    def _silence(self, clients: Iterable[int]) -> NotNowError:
        who = self._federation.named([*clients][:1])
        return NotNowError(f"{who} did not say which of its images are meant")


def unsuitable_portions(
    portions: Mapping[int, Portion], examples: Mapping[int, int], before: Set[str] = frozenset()
) -> str:
    """Say why portions of clients cannot be forgotten; nothing where they can.

    Args:
        portions: by number, all of one selection.
        examples: that each has; and those of its images that were set aside before, by the numbers of these portions.
        before: names of images that were forgotten before.
    """
    selection, total = next(iter(portions.values())).selection, sum(examples.values())
    if not total:
        return f"no client that was asked trains on an image of {selection.in_words()} that is not forgotten"
    if (missing := len(set(selection.examples) - before) - total) > 0:
        return f"of the {len(selection.examples)} named images {missing} were not found, or are forgotten already"
    return ""


def nothing_left(ledger: Ledger, client: int, who: str, examples: int) -> str:
    """Say why a client cannot be forgotten that has too few images to be trained on.

    Args:
        who: its name in a sentence.
        examples: that it has beside what earlier requests are about.
    """
    earlier = [
        f"{request.id} ({request.state})"
        for request in ledger.requests()
        if request.state in TAKEN_UP and client in (portion.client for portion in request.portions.values())
    ]
    if earlier:
        return f"{who} has {examples} examples beside those of earlier requests: {', '.join(earlier)}"
    return f"{who} has {examples} examples and was never trained on"


def named_before(ledger: Ledger) -> set[str]:
    """Give the names of images that earlier requests have named, found and forgotten, whatever else they are."""
    selections = [request.selection for request in ledger.requests() if request.state in FORGOTTEN]
    return {name for selection in selections if selection and selection.is_of_examples for name in selection.examples}
