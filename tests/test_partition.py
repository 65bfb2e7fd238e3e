import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedunlearn.data.partition import KINDS, class_partition, dirichlet_partition, hosted, iid_partition, partition

TABLE_1 = {
    "CIFAR-10": (10, 5000, [2575, 5913, 3263, 5538, 6895, 2359, 7847, 7200, 3226, 5184]),
    "CIFAR-100": (100, 500, [5259, 5105, 4306, 4391, 4995, 3820, 5442, 5365, 5281, 6036]),
}


@pytest.mark.parametrize(("classes", "per_class", "sizes"), TABLE_1.values(), ids=TABLE_1)
def test_default_split_is_the_papers_table_1(classes, per_class, sizes):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class))
    assert [len(owned) for owned in dirichlet_partition(labels, 10)] == sizes


def test_dirichlet_deals_each_class_in_data_set_order():
    labels = np.array([0, 1] * 50)
    owned = dirichlet_partition(labels, 3, seed=7)
    of_class_0 = np.concatenate([indices[labels[indices] == 0] for indices in owned])
    assert (of_class_0 == np.flatnonzero(labels == 0)).all()


@pytest.mark.parametrize("kind", ["dirichlet", "iid", "class"])
def test_every_split_owns_every_example_once(kind):
    labels = np.random.default_rng(1).integers(0, 5, 203)
    owned = partition(kind, labels, 7, dirichlet_alpha=0.1, seed=3)
    assert len(owned) == 7
    assert (np.sort(np.concatenate(owned)) == np.arange(203)).all()


def test_dirichlet_with_a_large_alpha_is_nearly_even():
    owned = dirichlet_partition(np.repeat(np.arange(4), 250), 10, dirichlet_alpha=1e6)
    assert max(abs(len(indices) - 100) for indices in owned) <= 4


def test_iid_sizes_differ_by_at_most_one():
    sizes = [len(indices) for indices in iid_partition(np.zeros(103), 10)]
    assert sorted(set(sizes)) == [10, 11]


def test_one_class_a_client():
    labels = np.array([3, 1, 2, 1, 3])
    assert [indices.tolist() for indices in class_partition(labels, 3)] == [[1, 3], [2], [0, 4]]


def test_fewer_than_two_clients_are_refused():
    with pytest.raises(ValueError, match="clients=1 is too few"):
        partition("iid", np.zeros(4), 1)


def test_nodes_host_about_equally_many_examples():
    sizes = (2575, 5913, 3263, 5538, 6895, 2359, 7847, 7200, 3226, 5184)  # Table 1
    for nodes in (2, 3, 4):
        groups = hosted(sizes, nodes)
        assert sorted(client for group in groups for client in group) == list(range(10))
        loads = [sum(sizes[client] for client in group) for group in groups]
        assert max(loads) < 1.08 * sum(sizes) / nodes
    assert hosted(sizes, 10) == [[client] for client in range(10)]
    assert hosted((5, 1, 1), 5) == [[0], [1], [2], [], []]
    assert hosted((5, 0, 4, 1), 2) == [[0, 1], [2, 3]]


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    clients=st.integers(2, 9),
    alpha=st.floats(0.05, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_partition_covers_every_index_once(kind, labels, clients, alpha, seed):
    owned = partition(kind, np.array(labels), clients, dirichlet_alpha=alpha, seed=seed)
    assert len(owned) == clients
    assert np.sort(np.concatenate(owned)).tolist() == list(range(len(labels)))


@settings(deadline=None)
@given(examples=st.lists(st.integers(0, 1000), min_size=1, max_size=30), nodes=st.integers(1, 40))
def test_every_client_has_one_node_and_no_node_much_more_than_the_mean(examples, nodes):
    groups = hosted(tuple(examples), nodes)
    assert len(groups) == nodes
    assert sorted(client for group in groups for client in group) == list(range(len(examples)))
    loads = [sum(max(1, examples[client]) for client in group) for group in groups]
    assert max(loads) <= sum(loads) / nodes + max(1, *examples)


@pytest.mark.parametrize("alpha", [1e-4, 1e-5, 1e-6, 1e-300])
def test_a_concentration_too_small_for_floating_point_gives_each_class_to_one_random_client(alpha):
    labels = np.repeat(np.arange(1000), 3)
    owned = dirichlet_partition(labels, 10, dirichlet_alpha=alpha)
    owner = np.empty(len(labels), int)
    for client, indices in enumerate(owned):
        owner[indices] = client
    assert (np.sort(np.concatenate(owned)) == np.arange(len(labels))).all()
    split = (owner.reshape(1000, 3) != owner.reshape(1000, 3)[:, :1]).any(1)
    assert split.mean() < 0.03  # a second client has more than a billionth now and then
    classes = np.bincount(owner, minlength=10) / 3
    assert 50 < classes.min() <= classes.max() < 150  # of 1,000, six standard deviations around 100
    again = dirichlet_partition(labels, 10, dirichlet_alpha=alpha)
    assert all((a == b).all() for a, b in zip(owned, again, strict=True))
