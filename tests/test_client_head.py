import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fedunlearn.nn.client_head import embedding_statistics, train_client_head


def test_statistics_by_hand():
    z = torch.tensor([[1.0, 2.0], [3.0, -1.0], [5.0, 0.0]])
    found = embedding_statistics(z, torch.tensor([0, 2, 0]), 3)
    assert_close(found, torch.tensor([[2.0, 6, 2, 26, 4], [0, 0, 0, 0, 0], [1, 3, -1, 9, 1]]))


def test_statistics_add_up_over_batches():
    z, y = torch.randn(20, 4), torch.arange(20) % 3
    assert_close(
        embedding_statistics(z[:7], y[:7], 3) + embedding_statistics(z[7:], y[7:], 3), embedding_statistics(z, y, 3)
    )


def clouds(clients=3, classes=2, d=4, n=100):
    torch.manual_seed(0)
    centres = 3 * torch.randn(clients, classes, d)
    return {
        c: (
            centres[c].repeat_interleave(n, 0) + torch.randn(classes * n, d),
            torch.arange(classes).repeat_interleave(n),
        )
        for c in range(clients)
    }


def head(clients=3, d=4):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(d, 16), nn.ReLU(), nn.Linear(16, clients))


def train(network, data, steps=300):
    statistics = {c: embedding_statistics(z, y, 2) for c, (z, y) in data.items()}
    train_client_head(network, statistics, steps=steps, generator=torch.Generator().manual_seed(2))
    return network


def test_it_tells_clients_apart_whose_embeddings_differ_as_a_head_trained_on_all_embeddings_does():
    data, network = clouds(), head()
    train(network, data)
    z = torch.cat([z for z, _ in data.values()])
    owners = torch.arange(3).repeat_interleave(200)
    pooled = head()
    optimiser = torch.optim.Adam(pooled.parameters(), lr=0.01)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(pooled(z), owners).backward()
        optimiser.step()
    accuracies = [float((net(z).argmax(1) == owners).float().mean()) for net in (network, pooled)]
    assert accuracies[0] > accuracies[1] - 0.03
    assert accuracies[0] > 0.8


def test_clients_without_statistics_keep_their_outputs():
    data, network = clouds(), head()
    before = [p.clone() for p in network[2].parameters()]
    train(network, {c: data[c] for c in (0, 2)})
    for now, then in zip(network[2].parameters(), before, strict=True):
        assert torch.equal(now[1], then[1])
        assert not torch.equal(now[0], then[0])


@pytest.mark.parametrize("steps", [1, 5])
def test_the_same_draws_give_the_same_head(steps):
    first, second = (train(head(), clouds(), steps) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
