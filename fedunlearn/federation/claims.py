"""What nodes say of how many examples clients have, compared: who contradicts the others, and who claims too many."""

from collections import Counter
from collections.abc import Callable, Mapping

NOTHING: Mapping[int, int] = {}
FEWEST = 3
"""Clients, of which one can have too large a share."""


def contradictions(
    claims: Mapping[int, Mapping[int, int]], known: Mapping[int, int], name: Callable[[int], str] = str
) -> dict[int, str]:
    """Say which nodes are not believed, and why; where no number is that of most, nobody knows who is wrong.

    Args:
        claims: by node, the examples of the clients that it says it can answer for.
        known: the examples of clients that are certain.
        name: of a client, for the reason.
    """
    said = _said(claims)
    sure = {client: most_said(values) for client, values in said.items()} | dict(known)
    found = {}
    for node, claim in claims.items():
        wrong = {client: examples for client, examples in claim.items() if sure[client] not in (None, examples)}
        for client, examples in list(wrong.items())[:1]:
            said_of = f"client {name(client)} has {examples} examples"
            found[node] = f"it says that {said_of}, and the client has {sure[client]}"
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


def too_many(
    claims: Mapping[int, Mapping[int, int]],
    share: float,
    known: Mapping[int, int] = NOTHING,
    name: Callable[[int], str] = str,
) -> dict[int, str]:
    """Say which nodes claim more examples for a client than that share of all: no other client would count.

    Args:
        claims: by node, the examples of the clients that it says it can answer for.
        share: of all examples, that one of three or more clients may have.
        known: the examples of clients that are certain: of these, nothing is a lie.
        name: of a client, for the reason, which says what to do if the claim is true.

    Example:
        >>> too_many({10: {0: 5, 1: 7}, 11: {2: 300}}, 0.9).keys()
        dict_keys([11])
        >>> too_many({10: {0: 5, 1: 7}, 11: {2: 300}}, 0.9, known={2: 300})
        {}
    """
    examples = {client: max(values) for client, values in _said(claims).items()}
    everything = sum(examples.values())
    large = [
        client
        for client, count in examples.items()
        if count > share * everything and len(examples) >= FEWEST and known.get(client) != count
    ]
    return {
        node: f"it says that client {name(client)} has {examples[client]} examples, more than {share:g} of all "
        f"{everything} (client_share); if it has them, start again with client_share=1"
        for node, claim in claims.items()
        for client in large
        if claim.get(client) == examples[client]
    }


def most_said(values: list[int]) -> int | None:
    """Give what more than half of them are; None where nothing is."""
    value, times = Counter(values).most_common(1)[0]
    return value if 2 * times > len(values) else None
