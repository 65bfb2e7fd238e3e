"""Who owns which training image: the clients' slices of a labelled data set (paper, Section 3.1)."""

from functools import lru_cache
from heapq import heappop, heappush

import numpy as np

from fedunlearn.errors import UserError

KINDS = ("dirichlet", "iid", "class")


def partition(
    kind: str, labels: np.ndarray, num_clients: int, *, dirichlet_alpha: float = 0.6, seed: int = 42
) -> list[np.ndarray]:
    """Split `labels` [N] by the scheme `kind`; see the function of that name."""
    if num_clients < 2:
        raise UserError(f"clients={num_clients} is too few: a federation has at least 2")
    if kind == "dirichlet":
        return dirichlet_partition(labels, num_clients, dirichlet_alpha=dirichlet_alpha, seed=seed)
    if kind == "iid":
        return iid_partition(labels, num_clients, seed=seed)
    return class_partition(labels, num_clients)


def dirichlet_partition(
    labels: np.ndarray, num_clients: int, *, dirichlet_alpha: float = 0.6, seed: int = 42
) -> list[np.ndarray]:
    """pi_k ~ Dirichlet(dirichlet_alpha 1_C) for each class k, dealt out in data-set order (Eq. 1).

    Returns one index array a client, ordered by class. Proportions come from NumPy's legacy generator, seeded once,
    and their cumulative sums times the class size are floored: with the defaults and ten clients these are the
    paper's clients (Table 1), to the sample.
    """
    if not dirichlet_alpha > 0:
        raise ValueError(f"dirichlet_alpha={dirichlet_alpha} is not above 0")
    legacy = np.random.RandomState(seed)
    slices: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for k in np.unique(labels):
        of_class = np.flatnonzero(labels == k)
        proportions = legacy.dirichlet(np.full(num_clients, dirichlet_alpha))
        cuts = (np.cumsum(proportions)[:-1] * len(of_class)).astype(int)
        for owned, part in zip(slices, np.split(of_class, cuts), strict=True):
            owned.append(part)
    return [np.concatenate(owned) for owned in slices]


def iid_partition(labels: np.ndarray, num_clients: int, *, seed: int = 42) -> list[np.ndarray]:
    """A seeded shuffle of all examples, dealt out in equal shares (sizes differ by at most one)."""
    order = np.random.RandomState(seed).permutation(len(labels))
    return [np.sort(share) for share in np.array_split(order, num_clients)]


def class_partition(labels: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """Client c owns the classes k with k mod C = c: one class a client where C equals the number of classes."""
    ranks = np.unique(labels, return_inverse=True)[1]
    return [np.flatnonzero(ranks % num_clients == c) for c in range(num_clients)]


@lru_cache(maxsize=8)
def hosted(examples: tuple[int, ...], nodes: int) -> list[list[int]]:
    """The clients of each node, so that nodes have about as many examples each: largest first, to who has fewest.

    With as many nodes as clients, node c hosts client c; more nodes than clients stay empty.
    """
    groups: list[list[int]] = [[] for _ in range(nodes)]
    by_load = [(0, node) for node in range(nodes)]
    for client in sorted(range(len(examples)), key=lambda c: -examples[c]):
        load, node = heappop(by_load)
        groups[node].append(client)
        heappush(by_load, (load + max(1, examples[client]), node))
    return sorted(map(sorted, groups), key=lambda group: (not group, group))
