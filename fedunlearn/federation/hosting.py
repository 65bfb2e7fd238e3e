"""Whether nodes that have their own clients' images are believed: one node a client, with the images it began with."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping

from fedunlearn.federation.replies import Introduction


def unbelieved(
    found: Mapping[int, Introduction],
    *,
    known: Mapping[int, str],
    gone: Mapping[str, str],
    forgotten: Collection[int],
    name: Callable[[int], str],
) -> dict[int, str]:
    """Say which nodes are not believed about their own clients, and why.

    Where two nodes say that they are one client, nobody knows who is right, and neither is believed.

    Args:
        found: by node, what it says of itself.
        known: SHA-256 of clients' images, as they were before.
        gone: by SHA-256 of images that must not come back, who has forgotten them.
        forgotten: clients that are not asked.
        name: of a client, in words.
    """
    wrong = {node: reason for node, said in found.items() if (reason := _wrong(said, known, gone, forgotten, name))}
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
