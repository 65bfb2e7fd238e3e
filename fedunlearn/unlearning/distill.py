"""Training towards given class probabilities."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.nn.precision import at_least_fp32, autocast
from fedunlearn.unlearning.null_space import project_gradients


def teach(
    model: TwoHeadResNet18,
    epochs: Iterable[Iterable[tuple[Tensor, Tensor]]],
    *,
    lr: float,
    momentum: float,
    precision: str,
    projectors: dict[str, Tensor],
) -> None:
    """SGD on -sum_k t_k log p_k over batches of images [N, ...] and wanted class probabilities t [N, K], in place.

    Layers move along `projectors` alone (`null_space.project_gradients`), all others not at all; BatchNorm normalises
    with its running statistics, as when the model answers, and these do not move.
    """
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    model.eval()
    for images, wanted in (batch for epoch in epochs for batch in epoch):
        with autocast(images.device, precision):
            outputs = model(images)
        model.zero_grad()
        cross_entropy(at_least_fp32(outputs.class_logits), wanted).backward()
        project_gradients(model, projectors)
        optimiser.step()
