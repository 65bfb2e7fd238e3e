"""Steps of SGD and Adam by torch's own functions.

torch's classes import its compiler with the first of them, which takes every process seconds.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class SGD:
    """Moves parameters that have a gradient, with momentum that starts at zero.

    Args:
        lr: learning rate; a tensor is read where it lies.
        weight_decay: added to the gradient.
        fused: take torch's fused step.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimiser = SGD([weight], lr=0.5, momentum=0.5)
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([1.0, 2.0])
        ...     optimiser.step()
        >>> weight.tolist()
        [-0.25, -1.5]
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float = 0.0,
        fused: bool = False,
    ) -> None:
        self.parameters, self.lr, self.fused = list(parameters), lr, fused
        self.momentum, self.weight_decay = momentum, weight_decay
        self.momenta = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters against their gradients."""
        rows = [(p, p.grad, m) for p, m in zip(self.parameters, self.momenta, strict=True) if p.grad is not None]
        sgd(
            [parameter for parameter, _, _ in rows],
            [gradient for _, gradient, _ in rows],
            [momentum for _, _, momentum in rows],
            fused=self.fused or None,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            dampening=0,
            nesterov=False,
            maximize=False,
        )


class Adam:
    """Moves parameters that have a gradient by Adam with its usual constants.

    Args:
        lr: learning rate.
        fused: take torch's fused step.
        capturable: so that a CUDA graph can hold the step.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimiser = Adam([weight], lr=0.5)
        >>> weight.grad = torch.tensor([1.0, -20.0])
        >>> optimiser.step()
        >>> [round(value, 3) for value in weight.tolist()]
        [0.5, 1.5]
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, fused: bool = False, capturable: bool = False
    ) -> None:
        self.parameters, self.lr, self.fused, self.capturable = list(parameters), lr, fused, capturable
        self.state = [
            {
                "step": torch.zeros((), device=parameter.device if fused or capturable else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for parameter in self.parameters
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters against their gradients."""
        rows = [(p, p.grad, s) for p, s in zip(self.parameters, self.state, strict=True) if p.grad is not None]
        adam(
            [parameter for parameter, _, _ in rows],
            [gradient for _, gradient, _ in rows],
            [state["exp_avg"] for _, _, state in rows],
            [state["exp_avg_sq"] for _, _, state in rows],
            [],
            [state["step"] for _, _, state in rows],
            fused=self.fused or None,
            capturable=self.capturable,
            lr=self.lr,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0,
            amsgrad=False,
            maximize=False,
        )
