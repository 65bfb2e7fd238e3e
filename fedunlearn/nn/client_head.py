"""Train the client head on the server, from statistics of every client's embeddings.

A client sees its own id alone, and "every image is mine" is then a perfect prediction. A client head that is trained
locally therefore stays at chance. The server needs the count, mean and variance of each client's embeddings a class. It
draws embeddings from these Gaussians and trains the client head on them. The clients train their features against that
client head, which they freeze.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedunlearn.nn.descent import Adam

DRAWS = 256
"""Embeddings a step."""
RATE = 0.01
"""Adam's learning rate at its first step."""


def embedding_statistics(embeddings: Tensor, class_labels: Tensor, num_classes: int) -> Tensor:
    """Sum embeddings and their squares by class; statistics of several batches add up.

    Args:
        embeddings: z, [N, d].
        class_labels: y, integers [N].
        num_classes: K.

    Returns:
        Count, sums and sums of squares of each class, fp32 [K, 1 + 2 d].

    Example:
        >>> embedding_statistics(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 1, 0]), 2)
        tensor([[ 2.,  6., 26.],
                [ 1.,  3.,  9.]])
    """
    z = embeddings.detach().float()
    rows = torch.cat([torch.ones_like(z[:, :1]), z, z.square()], 1)
    return torch.zeros(num_classes, rows.shape[1], device=z.device).index_add_(0, class_labels, rows)


def train_client_head(
    head: nn.Module, statistics: Mapping[int, Tensor], *, steps: int, generator: torch.Generator
) -> None:
    """Train a client head by Adam on embeddings drawn from the clients' Gaussians, in place.

    Each step minimises CE(head(z), c) over `DRAWS` pairs of z ~ N(mean, variance) of client c's class k. A pair (c, k)
    is drawn as often as client c has examples of class k. The softmax is over the clients in `statistics` alone. The
    outputs of a client that is not among them neither learn nor unlearn. The learning rate falls linearly from `RATE`
    to 0.

    Args:
        head: from embeddings [N, d] to logits of all clients [N, C].
        statistics: `embedding_statistics` by client, at least one with examples.
        steps: of `DRAWS` embeddings each.
        generator: of the draws, on the CPU.

    Example:
        >>> head = nn.Linear(1, 2)
        >>> statistics = {0: torch.tensor([[9.0, -9.0, 9.0]]), 1: torch.tensor([[9.0, 9.0, 9.0]])}
        >>> train_client_head(head, statistics, steps=100, generator=torch.Generator().manual_seed(0))
        >>> head(torch.tensor([[-1.0], [1.0]])).argmax(1)
        tensor([0, 1])
    """
    clients = sorted(statistics)
    rows = torch.cat([statistics[c] for c in clients])
    device, classes = rows.device, len(rows) // len(clients)
    columns = torch.tensor(clients, device=device)
    count, (total, squares) = rows[:, :1], rows[:, 1:].chunk(2, 1)
    mean = total / count.clamp(min=1)
    deviation = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    often = count[:, 0].cpu()
    optimiser = Adam(head.parameters(), lr=RATE)
    for step in range(steps):
        optimiser.lr = RATE * (1 - step / steps)
        drawn = torch.multinomial(often, DRAWS, replacement=True, generator=generator).to(device, non_blocking=True)
        noise = torch.randn(DRAWS, mean.shape[1], generator=generator).to(device, non_blocking=True)
        logits = head(mean[drawn] + deviation[drawn] * noise)[:, columns]
        head.zero_grad()
        cross_entropy(logits, drawn // classes).backward()
        optimiser.step()
