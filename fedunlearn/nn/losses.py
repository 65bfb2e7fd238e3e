"""The training objective: two cross-entropies and the disentanglement loss (paper, Eq. 4-7)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedunlearn.nn.precision import at_least_fp32


def disentanglement_loss(
    embeddings: Tensor,
    client_ids: Tensor,
    *,
    margin: float = 1.0,
    pull: float = 1.0,
    push: float = 1.0,
    class_ids: Tensor | None = None,
) -> Tensor:
    """pull * L_pull + push * L_push: clients are drawn to their centroids, centroids pushed apart (Eq. 5-7).

    L_pull is the mean over the clients S in the batch of the mean squared distance to the client's centroid (Eq. 5);
    L_push the mean over ordered pairs of different clients of max(0, margin - distance of centroids)^2 (Eq. 6), and 0
    where the batch has one client. With `class_ids` both are taken within each class and averaged over the classes in
    the batch.

    Args:
        embeddings: z, [N, d].
        client_ids: s, [N], integers.
        class_ids: y, [N], integers, or None for the paper's equations.

    Returns:
        A scalar, in fp32 or wider.
    """
    z = at_least_fp32(embeddings)
    same_class = _equal(class_ids) if class_ids is not None else torch.ones(len(z), len(z), dtype=bool, device=z.device)
    same_group = same_class & _equal(client_ids)
    # a group is one client (within one class): each of its members carries an equal share, so that sums over
    # examples are sums over groups
    share = 1 / same_group.sum(1).to(z.dtype)
    centroids = (same_group.to(z.dtype) @ z) * share[:, None]
    clients = (same_class.to(z.dtype) @ share).round()
    classes = (share / clients).sum()

    pull_loss = (share / clients * (z - centroids).square().sum(1)).sum() / classes
    distances = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    pair_share = share[:, None] * share / (clients * (clients - 1).clamp(min=1))
    apart = (same_class & ~same_group) * pair_share
    push_loss = (apart * (margin - distances).clamp(min=0).square()).sum() / classes
    return pull * pull_loss + push * push_loss


def multi_task_loss(
    class_logits: Tensor,
    client_logits: Tensor | None,
    embeddings: Tensor,
    class_ids: Tensor,
    client_ids: Tensor,
    *,
    class_weight: float = 1.0,
    client_weight: float = 1.0,
    disentangle_weight: float = 0.1,
    margin: float = 1.0,
    pull: float = 1.0,
    push: float = 1.0,
    within_class: bool = False,
) -> Tensor:
    """lambda_1 CE(class) + lambda_2 CE(client) + lambda_dis L_disentangle (Eq. 4); a term of weight 0 is not computed.

    Args:
        class_logits: [N, K].
        client_logits: [N, C], or None for a model without a client head.
        embeddings: z, [N, d].
        class_ids, client_ids: [N], integers.
        within_class: take the disentanglement loss within each class.
    """
    loss = class_weight * cross_entropy(at_least_fp32(class_logits), class_ids)
    if client_logits is not None and client_weight:
        loss = loss + client_weight * cross_entropy(at_least_fp32(client_logits), client_ids)
    if client_logits is not None and disentangle_weight:
        loss = loss + disentangle_weight * disentanglement_loss(
            embeddings, client_ids, margin=margin, pull=pull, push=push, class_ids=class_ids if within_class else None
        )
    return loss


def _equal(ids: Tensor) -> Tensor:
    return ids[:, None] == ids
