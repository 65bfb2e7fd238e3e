"""Fine-tune a model towards soft labels."""

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedunlearn.nn.descent import SGD
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.nn.precision import at_least_fp32, autocast
from fedunlearn.unlearning.kronecker import guide_gradients


def distill(
    model: TwoHeadModel,
    epochs: Iterable[Iterable[tuple[Tensor, Tensor]]],
    *,
    lr: float,
    momentum: float,
    precision: str,
    guide: Mapping[str, Tensor],
) -> None:
    """Fine-tune a model on soft labels by SGD, in place.

    The loss is -sum_k t_k log p_k. Layers that the guide names change along it alone (`kronecker.guide_gradients`); all
    other parameters are frozen. BatchNorm normalises with its running statistics, which stay as they are.

    Args:
        model: stays in eval mode.
        epochs: of batches, each of images [N, ...] and soft labels t [N, K], on the model's device.
        lr: learning rate.
        momentum: of SGD, 0..1.
        precision: of forward passes (`nn.precision`).
        guide: of `kronecker.projectors` or `kronecker.diagonal_guide`.

    Example:
        >>> import torch
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> model = TwoHeadResNet18(2, 0, width=8)
        >>> images, soft_labels = torch.ones(4, 3, 8, 8), torch.tensor([[0.7, 0.3]]).expand(4, 2)
        >>> free = {"class_head.out.inputs": torch.eye(17)}  # 16 inputs and the bias
        >>> distill(model, [[(images, soft_labels)]] * 100, lr=1, momentum=0, precision="fp32", guide=free)
        >>> round(model(images).class_logits[0].softmax(0)[0].item(), 2)
        0.7
    """
    optimiser = SGD(model.parameters(), lr=lr, momentum=momentum)
    model.eval()
    for images, soft_labels in (batch for epoch in epochs for batch in epoch):
        with autocast(images.device, precision):
            outputs = model(images)
        model.zero_grad()
        cross_entropy(at_least_fp32(outputs.class_logits), soft_labels).backward()
        guide_gradients(model, guide)
        optimiser.step()
