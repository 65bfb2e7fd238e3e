"""Split a labelled data set among clients, and clients among nodes (paper, Section 3.1)."""

from functools import lru_cache
from heapq import heappop, heappush

import numpy as np

KINDS = ("dirichlet", "iid", "class")


def partition(
    kind: str, labels: np.ndarray, num_clients: int, *, dirichlet_alpha: float = 0.6, seed: int = 42
) -> list[np.ndarray]:
    """Split examples among clients by the scheme `kind`; see the function of that name.

    Args:
        kind: one of `KINDS`.
        labels: class of every example, [N].
        num_clients: C, 2 or more.
        dirichlet_alpha: of `dirichlet_partition`.
        seed: of the draws.

    Returns:
        Each client's indices into `labels`; every example has one owner.

    Raises:
        ValueError: fewer than two clients.

    Example:
        >>> [owned.tolist() for owned in partition("class", np.array([0, 1, 0, 1]), 2)]
        [[0, 2], [1, 3]]
    """
    if num_clients < 2:
        raise ValueError(f"clients={num_clients} is too few: a federation has at least 2")
    if kind == "dirichlet":
        return dirichlet_partition(labels, num_clients, dirichlet_alpha=dirichlet_alpha, seed=seed)
    if kind == "iid":
        return iid_partition(labels, num_clients, seed=seed)
    return class_partition(labels, num_clients)


def dirichlet_partition(
    labels: np.ndarray, num_clients: int, *, dirichlet_alpha: float = 0.6, seed: int = 42
) -> list[np.ndarray]:
    """Deal each class out to clients in proportions that a Dirichlet distribution draws (paper, Eq. 1).

    pi_k ~ Dirichlet(dirichlet_alpha 1_C) for each class k, whose examples are dealt out in data-set order. Proportions
    come from NumPy's legacy generator, seeded once. Their cumulative sums times the class size are floored. With the
    defaults and ten clients these are the paper's clients (Table 1), to the sample.

    Args:
        labels: class of every example, [N].
        num_clients: C.
        dirichlet_alpha: concentration, above 0; lower is less even. One too small for floating point gives each class
            to one random client.
        seed: of the draws.

    Returns:
        Each client's indices, ordered by class.

    Raises:
        ValueError: a concentration that is not above 0.

    Example:
        >>> [len(owned) for owned in dirichlet_partition(np.repeat(np.arange(10), 5000), 10)]
        [2575, 5913, 3263, 5538, 6895, 2359, 7847, 7200, 3226, 5184]
    """
    if not dirichlet_alpha > 0:
        raise ValueError(f"dirichlet_alpha={dirichlet_alpha} is not above 0")
    legacy = np.random.RandomState(seed)
    slices: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for k in np.unique(labels):
        of_class = np.flatnonzero(labels == k)
        proportions = _proportions(legacy, num_clients, dirichlet_alpha)
        cuts = (np.cumsum(proportions)[:-1] * len(of_class)).astype(int)
        for owned, part in zip(slices, np.split(of_class, cuts), strict=True):
            owned.append(part)
    return [np.concatenate(owned) for owned in slices]


def _proportions(legacy: np.random.RandomState, num_clients: int, dirichlet_alpha: float) -> np.ndarray:
    """Draw from a symmetric Dirichlet distribution, or from its limit where floating point has no more to say.

    As the concentration goes to 0, all goes to one client, and each is as likely as another. A client that has all but
    a billionth has all: else rounding down would leave an image of the class to another client.
    """
    drawn = legacy.dirichlet(np.full(num_clients, dirichlet_alpha))
    if not np.isfinite(drawn).all():
        return np.eye(num_clients)[legacy.randint(num_clients)]
    return np.eye(num_clients)[drawn.argmax()] if drawn.max() > 1 - 1e-9 else drawn


def iid_partition(labels: np.ndarray, num_clients: int, *, seed: int = 42) -> list[np.ndarray]:
    """Shuffle all examples and deal them out in equal numbers (sizes differ by at most one).

    Args:
        labels: class of every example, [N].
        num_clients: C.
        seed: of the shuffle.

    Returns:
        Each client's indices, in data-set order.

    Example:
        >>> [len(owned) for owned in iid_partition(np.zeros(10), 4)]
        [3, 3, 2, 2]
    """
    order = np.random.RandomState(seed).permutation(len(labels))
    return [np.sort(owned) for owned in np.array_split(order, num_clients)]


def class_partition(labels: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """Give client c the classes k with k mod C = c: one class a client where C equals the number of classes.

    Args:
        labels: class of every example, [N].
        num_clients: C.

    Returns:
        Each client's indices, in data-set order.

    Example:
        >>> [owned.tolist() for owned in class_partition(np.array([3, 1, 2, 1, 3]), 3)]
        [[1, 3], [2], [0, 4]]
    """
    ranks = np.unique(labels, return_inverse=True)[1]
    return [np.flatnonzero(ranks % num_clients == c) for c in range(num_clients)]


@lru_cache(maxsize=8)
def hosted(examples: tuple[int, ...], nodes: int) -> list[list[int]]:
    """Assign clients to nodes, so that nodes have about equally many examples.

    The client with the most examples goes first, to the node with the fewest. With as many nodes as clients, node c
    hosts client c; more nodes than clients stay empty.

    Args:
        examples: how many each client has, [C].
        nodes: how many there are.

    Returns:
        The clients of each node.

    Example:
        >>> hosted((5, 0, 4, 1), 2)
        [[0, 1], [2, 3]]
    """
    groups: list[list[int]] = [[] for _ in range(nodes)]
    by_load = [(0, node) for node in range(nodes)]
    for client in sorted(range(len(examples)), key=lambda c: -examples[c]):
        load, node = heappop(by_load)
        groups[node].append(client)
        heappush(by_load, (load + max(1, examples[client]), node))
    return sorted(map(sorted, groups), key=lambda group: (not group, group))
