"""Watch what goes into a model's layers and what comes back to them, and leave the model as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore the train or eval mode of every module at the end.

    Args:
        model: whose modes the caller may change meanwhile.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with kept_modes(model):
        ...     model.eval().training
        False
        >>> model.training
        True
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def train_batch_norms(model: nn.Module) -> None:
    """Let BatchNorm normalise with the statistics of its batch, and everything else work as in evaluation.

    Args:
        model: whose modes change (`kept_modes` brings them back).

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout())
        >>> train_batch_norms(model)
        >>> [layer.training for layer in model]
        [True, False]
    """
    model.eval()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.train()


@contextmanager
def layer_inputs(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], callback: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Show `callback` the input of every layer of some types, just before the layer runs.

    The hooks go at the end, and every module is back in the mode that it was in (`kept_modes`).

    Args:
        model: whose layers are watched; the caller runs it, in the mode that suits.
        kinds: types of layers, their subclasses included.
        callback: is given a layer's name in the model, the layer, and its first input.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with layer_inputs(model, (nn.Linear,), lambda name, layer, x: print(name, tuple(x.shape))):
        ...     _ = model(torch.zeros(5, 3))
        0 (5, 3)
        2 (5, 2)
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: callback(name, layer, inputs[0])

    with kept_modes(model):
        hooks = [
            layer.register_forward_pre_hook(hook(name))
            for name, layer in model.named_modules()
            if isinstance(layer, kinds)
        ]
        try:
            yield
        finally:
            for registered in hooks:
                registered.remove()


@contextmanager
def layer_output_gradients(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], callback: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Show `callback` the gradient by the output of every layer of some types, as a backward pass reaches it.

    Args:
        model: whose layers are watched.
        kinds: types of layers, their subclasses included.
        callback: is given a layer's name in the model, the layer, and the gradient by its output.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with layer_output_gradients(model, (nn.Linear,), lambda name, layer, d: print(name, tuple(d.shape))):
        ...     model(torch.ones(5, 3)).sum().backward()
        2 (5, 1)
        0 (5, 2)
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def on_forward(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda delta: callback(name, layer, delta))

        return on_forward

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    try:
        yield
    finally:
        for registered in hooks:
            registered.remove()
