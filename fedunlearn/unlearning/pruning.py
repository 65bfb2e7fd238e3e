"""Prune client-head outputs, so that no later round learns a forget client again (paper, Section 4.4)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedunlearn.nn.model import TwoHeadModel

PRUNED, WEIGHT, BIAS = "pruned", "client_head.out.weight", "client_head.out.bias"
PRUNED_CLASSES, CLASS_WEIGHT, CLASS_BIAS = "pruned_classes", "class_head.out.weight", "class_head.out.bias"


def pruned(params: Mapping[str, Tensor], clients: Iterable[int]) -> dict[str, Tensor]:
    """Switch off clients' outputs of the client head in a state (paper, Algorithm 1, line 5).

    The clients' rows of weights and their biases become zero, and the buffer `pruned` marks them. A model with that
    mark gives a logit of minus infinity for them, so that no gradient reaches the rows. The mark survives saving,
    averaging and every further round.

    Args:
        params: a state of `TwoHeadModel`, with names `pruned`, `client_head.out.weight` and `client_head.out.bias`.
            A state without a client head comes back unchanged.
        clients: their numbers, 0..C-1.

    Returns:
        A new dict; the argument is unchanged.

    Raises:
        ValueError: a client is out of range.

    Example:
        >>> state = {PRUNED: torch.zeros(2, dtype=torch.bool), WEIGHT: torch.ones(2, 1), BIAS: torch.ones(2)}
        >>> pruned(state, [1])[BIAS]
        tensor([1., 0.])
    """
    return _pruned(params, clients, "client", PRUNED, WEIGHT, BIAS) if WEIGHT in params else dict(params)


def pruned_classes(params: Mapping[str, Tensor], classes: Iterable[int]) -> dict[str, Tensor]:
    """Switch off outputs of the class head, of classes that nobody has an image of any more; as `pruned` does.

    Args:
        params: a state of a two-head model.
        classes: their numbers, 0..K-1.

    Returns:
        A new dict; the argument is unchanged.

    Raises:
        ValueError: a class is out of range.
    """
    return _pruned(params, classes, "class", PRUNED_CLASSES, CLASS_WEIGHT, CLASS_BIAS)


@torch.no_grad()
def _pruned(
    params: Mapping[str, Tensor], outputs: Iterable[int], kind: str, mark: str, weight: str, bias: str
) -> dict[str, Tensor]:
    chosen = torch.zeros_like(params[mark])
    for output in outputs:
        if not 0 <= output < len(chosen):
            raise ValueError(f"{kind} {output} is not in 0..{len(chosen) - 1}")
        chosen[output] = True
    return {
        **params,
        mark: params[mark] | chosen,
        weight: params[weight].masked_fill(chosen[:, None], 0),
        bias: params[bias].masked_fill(chosen, 0),
    }


def prune_clients(model: TwoHeadModel, clients: Iterable[int]) -> None:
    """Switch off clients' outputs of a model's client head, in place and for good (`pruned`).

    Args:
        model: one without a client head stays as it is.
        clients: their numbers, 0..C-1.

    Raises:
        ValueError: a client is out of range.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> model = TwoHeadResNet18(num_classes=3, num_clients=4, width=8)
        >>> prune_clients(model, [2])
        >>> model(torch.zeros(2, 3, 8, 8)).client_logits[0, 2]
        tensor(-inf, grad_fn=<SelectBackward0>)
    """
    state = {name: value for name, value in model.state_dict().items() if name in (PRUNED, WEIGHT, BIAS)}
    model.load_state_dict(pruned(state, clients), strict=False)
