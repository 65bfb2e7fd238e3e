"""Whether nodes with their own clients' images are believed: one node a client, by its key, with the same images."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from logging import getLogger

from fedunlearn.federation.replies import Introduction
from fedunlearn.runs.keys import public_id

log = getLogger("fedunlearn")


class Entrance:
    """Lets nodes in by their keys, before anything is asked of them; who is kept out gets no message.

    Args:
        keys: the id of each client's key; without any all nodes may come in.
        gone: by the id of a key, or the SHA-256 of images, who has forgotten its client.
        forgotten: clients that are not asked.
        name: of a client, in words.
        ask: gives the command that asks for clients to be forgotten.

    Attributes:
        key_of: the id of the key of every node that has come; nothing where nobody knows it.
    """

    def __init__(
        self,
        keys: Mapping[int, str],
        gone: Mapping[str, str],
        forgotten: Collection[int],
        name: Callable[[int], str],
        ask: Callable[[Sequence[int]], str],
    ) -> None:
        self._keys, self._gone, self._forgotten, self._name, self._ask = keys, gone, forgotten, name, ask
        self.key_of: dict[int, str] = {}
        self._refused: set[int] = set()

    def admitted(self, nodes: Iterable[int], public_keys: Mapping[int, bytes]) -> list[int]:
        """Give the nodes that may be asked; the others are named in the log, once.

        Args:
            nodes: that are connected.
            public_keys: of nodes, in PEM.
        """
        found = []
        for node in nodes:
            self.key_of[node] = public_id(public_keys.get(node, b""))
            reason = self._refusal(self.key_of[node])
            if not reason:
                found.append(node)
            elif node not in self._refused:
                log.warning("node %s is asked nothing: %s", node, reason)
                self._refused.add(node)
        return found

    def _refusal(self, key: str) -> str:
        if key in self._gone:
            here = [client for client, owner in self._keys.items() if owner == key and client not in self._forgotten]
            way_on = f": `{self._ask(here)}` has this run forget it too" if here else ""
            return f"its key is that of a client that was forgotten ({self._gone[key]}){way_on}"
        if not self._keys:
            return ""
        if not key:
            return "nobody knows its key, and partition.keys says who may come"
        return "" if key in self._keys.values() else f"its key {key} is no client's (partition.keys)"

    def check(self, node: int, said: Introduction) -> str:
        """Say which client a node says that it is and is not, by its key."""
        for client in sorted(said.examples.keys() - set(self._forgotten)):
            if self._keys and self._keys[client] != self.key_of[node]:
                return f"it says that it is client {self._name(client)}, whose key is another (partition.keys)"
        return ""


def unbelieved(
    found: Mapping[int, Introduction],
    *,
    entrance: Entrance,
    known: Mapping[int, str],
    gone: Mapping[str, str],
    forgotten: Collection[int],
    name: Callable[[int], str],
) -> dict[int, str]:
    """Say which nodes are not believed about their own clients, and why.

    Where two nodes say that they are one client, nobody knows who is right, and neither is believed.

    Args:
        found: by node, what it says of itself.
        entrance: that has let them in.
        known: SHA-256 of clients' images, as they were before.
        gone: by SHA-256 of images that must not come back, who has forgotten them.
        forgotten: clients that are not asked.
        name: of a client, in words.
    """
    wrong = {
        node: reason
        for node, said in found.items()
        if (reason := entrance.check(node, said) or _wrong(said, known, gone, forgotten, name))
    }
    claimed = Counter(client for node, said in found.items() if node not in wrong for client in said.examples)
    for node, said in found.items():
        twice = [client for client in said.examples if claimed[client] > 1 and client not in forgotten]
        if twice and node not in wrong:
            wrong[node] = f"{claimed[twice[0]]} nodes say that they are client {name(twice[0])}"
    return wrong


def _wrong(
    said: Introduction,
    known: Mapping[int, str],
    gone: Mapping[str, str],
    forgotten: Collection[int],
    name: Callable[[int], str],
) -> str:
    for client in sorted(said.examples.keys() - set(forgotten)):
        images = said.fingerprints.get(client, "")
        if not images:
            return f"it does not say which images client {name(client)} has"
        if images in gone:
            return f"what it calls client {name(client)} are images that were forgotten ({gone[images]})"
        if known.get(client, images) != images:
            return f"client {name(client)} has other images than when the run began: put the files back as they were"
    return ""


def missing(found: Mapping[int, Introduction], clients: int, forgotten: Collection[int]) -> list[int]:
    """Give the clients that no node has named so far, but for those that are not asked."""
    named = {client for said in found.values() for client in said.examples}
    return sorted(set(range(clients)) - named - set(forgotten))
