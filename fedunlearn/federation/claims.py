"""What nodes say of how many examples clients have, compared: who contradicts the others, and who claims too many."""

from collections import Counter
from collections.abc import Mapping

FEWEST = 3
"""Clients, of which one can have too large a share."""


def contradictions(claims: Mapping[int, Mapping[int, int]], known: Mapping[int, int]) -> dict[int, str]:
    """Say which nodes are not believed, and why; where no number is that of most, nobody knows who is wrong.

    Args:
        claims: by node, the examples of the clients that it says it can answer for.
        known: the examples of clients that are certain.
    """
    said = _said(claims)
    sure = {client: most_said(values) for client, values in said.items()} | dict(known)
    found = {}
    for node, claim in claims.items():
        wrong = {client: examples for client, examples in claim.items() if sure[client] not in (None, examples)}
        for client, examples in list(wrong.items())[:1]:
            found[node] = f"it says that client {client} has {examples} examples, and the client has {sure[client]}"
    return found


def disputed(claims: Mapping[int, Mapping[int, int]]) -> set[int]:
    """Give the clients of which nodes say different numbers of examples."""
    return {client for client, values in _said(claims).items() if len(set(values)) > 1}


def _said(claims: Mapping[int, Mapping[int, int]]) -> dict[int, list[int]]:
    said: dict[int, list[int]] = {}
    for claim in claims.values():
        for client, examples in claim.items():
            said.setdefault(client, []).append(examples)
    return said


def too_many(claims: Mapping[int, Mapping[int, int]], share: float) -> dict[int, str]:
    """Say which nodes claim more examples for a client than that share of all: no other client would count."""
    examples = {client: max(values) for client, values in _said(claims).items()}
    most = share * sum(examples.values())
    large = [client for client, count in examples.items() if count > most and len(examples) >= FEWEST]
    return {
        node: f"it says that client {client} has {examples[client]} examples, more than {share:g} of all (client_share)"
        for node, claim in claims.items()
        for client in large
        if claim.get(client) == examples[client]
    }


def most_said(values: list[int]) -> int | None:
    """Give what more than half of them are; None where nothing is."""
    value, times = Counter(values).most_common(1)[0]
    return value if 2 * times > len(values) else None
