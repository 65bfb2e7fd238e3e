"""A client head that is trained where all clients meet: on the server, from what embeddings look like, class by class.

A client sees its own ID alone, for which "everything is mine" is a perfect answer: a head that learns locally stays at
chance. Count, mean and variance of its embeddings for each class are enough for the server to train the head on
embeddings drawn from all clients' Gaussians; the clients train their features against that head, which they leave as it
is.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

DRAWS, RATE = 256, 0.01  # embeddings a step, and Adam's learning rate at its first step


def embedding_moments(embeddings: Tensor, class_labels: Tensor, num_classes: int) -> Tensor:
    """Count, sum and sum of squares of embeddings [N, d] by class, [K, 1 + 2 d] in fp32; they add up over batches."""
    z = embeddings.detach().float()
    rows = torch.cat([torch.ones_like(z[:, :1]), z, z.square()], 1)
    return torch.zeros(num_classes, rows.shape[1], device=z.device).index_add_(0, class_labels, rows)


def train_client_head(head: nn.Module, moments: dict[int, Tensor], *, steps: int, generator: torch.Generator) -> None:
    """Adam on CE(head(z), c), z ~ N(mean, variance) of client c's class k, drawn as often as c has examples of k.

    In place. The softmax is over the clients in `moments` alone: a client that did not answer is neither learned nor
    unlearned.

    Args:
        moments: `embedding_moments` by client, at least one with examples.
        steps: of `DRAWS` embeddings each; the rate falls linearly to 0.
    """
    clients = sorted(moments)
    rows = torch.cat([moments[c] for c in clients])
    device, classes = rows.device, len(rows) // len(clients)
    columns = torch.tensor(clients, device=device)
    count, (total, squares) = rows[:, :1], rows[:, 1:].chunk(2, 1)
    mean = total / count.clamp(min=1)
    deviation = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    often = count[:, 0].cpu()
    optimiser = torch.optim.Adam(head.parameters(), lr=RATE)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * (1 - step / steps)
        drawn = torch.multinomial(often, DRAWS, replacement=True, generator=generator).to(device, non_blocking=True)
        noise = torch.randn(DRAWS, mean.shape[1], generator=generator).to(device, non_blocking=True)
        logits = head(mean[drawn] + deviation[drawn] * noise)[:, columns]
        optimiser.zero_grad()
        cross_entropy(logits, drawn // classes).backward()
        optimiser.step()
