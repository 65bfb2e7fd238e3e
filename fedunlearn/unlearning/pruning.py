"""Pruning of client-head outputs: the forgotten is not learned again (paper, Section 4.4; Algorithm 1, line 5)."""

from collections.abc import Iterable

import torch

from fedunlearn.errors import UserError
from fedunlearn.nn.model import TwoHeadResNet18


@torch.no_grad()
def prune_clients(model: TwoHeadResNet18, clients: Iterable[int]) -> None:
    """Switch off the client head's neurons of `clients`, in place and for good.

    A pruned client's logit is -inf from then on, its row of weights and its bias are zero, and no gradient reaches
    them. The mark is a buffer, so it survives saving, averaging and every further round. A model without a client
    head has nothing to prune.

    Raises:
        UserError: a client is out of range.
    """
    if model.client_head is None:
        return
    for client in clients:
        if not 0 <= client < len(model.pruned):
            raise UserError(f"client {client} is not in 0..{len(model.pruned) - 1}")
        model.pruned[client] = True
        model.client_head.out.weight[client] = 0
        model.client_head.out.bias[client] = 0
