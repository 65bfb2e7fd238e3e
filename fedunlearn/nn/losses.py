"""Compute the training objective: two cross-entropies and the disentanglement loss (paper, Eq. 4-7)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedunlearn.errors import UserError, printable
from fedunlearn.nn.model import Outputs
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
    """Draw the embeddings of each client to their centroid, and push the centroids apart (paper, Eq. 5-7).

    pull * L_pull + push * L_push. L_pull is the mean, over the clients in the batch, of the mean squared distance to
    the client's centroid (Eq. 5). L_push is the mean, over ordered pairs of different clients, of max(0, margin -
    distance of their centroids)^2 (Eq. 6). It is 0 where the batch has one client. With `class_ids` both are taken
    within each class and averaged over the classes in the batch.

    Args:
        embeddings: z, [N, d].
        client_ids: s, integers [N].
        margin: distance beyond which centroids do not repel each other, in the embedding's units.
        pull, push: weights of the two terms.
        class_ids: y, integers [N], or None for the paper's equations.

    Returns:
        A scalar, in fp32 or wider.

    Example:
        >>> z = torch.tensor([[0.0], [2.0], [1.5]])  # pull = (1 + 0) / 2, push = (1 - 0.5)^2
        >>> disentanglement_loss(z, torch.tensor([0, 0, 1])).item()
        0.75
    """
    z = at_least_fp32(embeddings)
    same_class = _equal(class_ids) if class_ids is not None else _all_equal(z)
    same_group = same_class & _equal(client_ids)
    # a group is one client (within one class): its members weigh as much as one example together, so that sums over
    # examples are sums over groups
    weight = 1 / same_group.sum(1).to(z.dtype)
    centroids = (same_group.to(z.dtype) @ z) * weight[:, None]
    clients = (same_class.to(z.dtype) @ weight).round()
    classes = (weight / clients).sum()

    pull_loss = (weight / clients * (z - centroids).square().sum(1)).sum() / classes
    distances = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    pair_weight = weight[:, None] * weight / (clients * (clients - 1).clamp(min=1))
    pairs = (same_class & ~same_group) * pair_weight
    push_loss = (pairs * (margin - distances).clamp(min=0).square()).sum() / classes
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
    """Add up the class loss, the client loss and the disentanglement loss (paper, Eq. 4).

    lambda_1 CE(class) + lambda_2 CE(client) + lambda_dis L_disentangle. A client or disentanglement term of weight 0
    is not computed, nor is either for a model without a client head.

    Args:
        class_logits: [N, K].
        client_logits: [N, C], or None for a model without a client head.
        embeddings: z, [N, d].
        class_ids, client_ids: integers [N].
        class_weight, client_weight, disentangle_weight: lambda_1, lambda_2, lambda_dis.
        margin, pull, push: of `disentanglement_loss`.
        within_class: take the disentanglement loss within each class.

    Returns:
        A scalar, in fp32 or wider.

    Example:
        >>> logits, ids = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
        >>> loss = multi_task_loss(logits, logits, torch.zeros(4, 3), ids, ids, disentangle_weight=0)
        >>> round(loss.item(), 4)  # 2 log 2
        1.3863
    """
    loss = class_weight * cross_entropy(at_least_fp32(class_logits), class_ids)
    if client_logits is not None and client_weight:
        loss = loss + client_weight * cross_entropy(at_least_fp32(client_logits), client_ids)
    if client_logits is not None and disentangle_weight:
        loss = loss + disentangle_weight * disentanglement_loss(
            embeddings, client_ids, margin=margin, pull=pull, push=push, class_ids=class_ids if within_class else None
        )
    return loss


def check_loss(
    function: Callable[..., Tensor],
    outputs: Outputs,
    class_ids: Tensor,
    client_ids: Tensor,
    *,
    params: Sequence[Tensor],
    weights: Mapping[str, Any],
) -> None:
    """Call a loss of somebody's own once, as a step of training does, and see that a model can learn from it.

    Args:
        function: takes what `multi_task_loss` takes.
        outputs: of a model, of N examples.
        class_ids, client_ids: integers [N].
        params: that are trained.
        weights: keyword arguments.

    Raises:
        UserError: it fails, or gives anything but one finite number with finite gradients.

    Example:
        >>> outputs = Outputs(torch.zeros(4, 2, requires_grad=True), None, torch.zeros(4, 3))
        >>> ids = torch.tensor([0, 1, 0, 1])
        >>> check_loss(lambda *batch, **weights: 1.5, outputs, ids, ids, params=[outputs.class_logits], weights={})
        Traceback (most recent call last):
        fedunlearn.errors.UserError: it gives a float, and no tensor
    """
    try:
        loss = function(*outputs, class_ids, client_ids, **weights)
    except Exception as error:
        raise UserError(f"{_in_one_line(error)} ({_called_with(weights)})") from error
    if not isinstance(loss, Tensor):
        raise UserError(f"it gives a {type(loss).__name__}, and no tensor")
    if loss.ndim or not loss.is_floating_point():
        given = f"{loss.dtype} {list(loss.shape)}".removeprefix("torch.")
        raise UserError(
            f"of {len(class_ids)} images it gives {given}, and not one number: take the mean over the batch"
        )
    if not loss.isfinite():
        raise UserError(f"it gives {loss.item()} on {len(class_ids)} held-out images")
    if not loss.requires_grad:
        raise UserError(
            "it has no gradient: compute it of the tensors themselves, not of numbers that are read from them"
        )
    try:
        gradients = torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)
    except Exception as error:
        raise UserError(f"{_in_one_line(error)} where its gradients are computed") from error
    reached = [gradient for gradient in gradients if gradient is not None]
    if not reached:
        raise UserError("its gradient reaches no weight of the model")
    if not all(gradient.isfinite().all() for gradient in reached):
        raise UserError(f"its gradients are not finite on {len(class_ids)} held-out images")


def _in_one_line(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}".splitlines()[0])


def _called_with(weights: Mapping[str, Any]) -> str:
    places = ", ".join((*Outputs._fields[:2], "embeddings", "class_ids", "client_ids"))
    return f"it is called with {places}, and by name with {', '.join(weights)}"


def _equal(ids: Tensor) -> Tensor:
    return ids[:, None] == ids


def _all_equal(z: Tensor) -> Tensor:
    return torch.ones(len(z), len(z), dtype=torch.bool, device=z.device)
