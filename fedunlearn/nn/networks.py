"""Give the network that makes features of images, by its name: ours, a library's, or a factory's of one's own."""

import difflib
import importlib.util
import inspect
import pkgutil
import typing
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedunlearn.errors import UserError
from fedunlearn.nn.hooks import kept_modes, layer_inputs
from fedunlearn.nn.model import MeanOverPositions, first_of, normalisation

SHORT = {"mlp": "fedunlearn.nn.mlp:mlp"}
"""Factories that belong here, by name: `mlp` is for tables."""
NO_TIMM = "timm is not installed: pip install 'fedunlearn[timm]', on every machine"

DRAWN_BY_OLD_RULES = ("googlenet", "inception_v3")
"""Networks of torchvision that warn of their default initial weights unless somebody asks for these."""


class Network(NamedTuple):
    """A network, and what was found when it first ran.

    Attributes:
        module: maps images [N, channels, H, W] to features [N, f].
        features: f.
        plain: whether it takes images in plain memory order alone (`nn.model.TwoHeadModel`).
    """

    module: nn.Module
    features: int
    plain: bool


def small_cnn(channels: int, *, width: int, norm: str) -> nn.Module:
    """Make three 3x3 convolutions of `width`, twice and four times as many channels, and a mean over positions.

    Args:
        channels: of the images.
        width: channels of the first convolution.
        norm: after each convolution, as of `nn.model.TwoHeadResNet18`.

    Example:
        >>> small_cnn(3, width=8, norm="none")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 32])
    """
    layers: list[nn.Module] = []
    for before, after, stride in ((channels, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
        convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=norm == "none")
        layers += [convolution, normalisation(norm, after), nn.ReLU()]
    return nn.Sequential(*layers, MeanOverPositions())


def network_of(
    name: str,
    shape: tuple[int, int, int],
    *,
    num_classes: int,
    width: int = 64,
    norm: str = "batch",
    options: Mapping[str, Any] | None = None,
) -> Network:
    """Make a network by its name, and let it run once on noise.

    Args:
        name: `small_cnn`, `mlp`, a classifier of torchvision or timm (also as `torchvision:NAME` and `timm:NAME`), or
            `module:factory`. A factory is a class of modules, or a function that says `-> nn.Module`. It is called
            with those of `channels`, `image_size` and `num_classes` that it declares, and with `options`.
        shape: of an image, (H, W, channels).
        num_classes: K, which only factories are told.
        width, norm: of `small_cnn`.
        options: further keyword arguments.

    Raises:
        UserError: there is no such network here, it cannot be made, or it gives no usable features.

    Example:
        >>> network_of("mobilenet_v3_small", (32, 32, 3), num_classes=10).features
        1024
    """
    options, channels, name = dict(options or {}), shape[2], SHORT.get(name, name)
    if name == "small_cnn":
        if options:
            raise UserError("model.options: small_cnn has model.width and model.norm, and no options")
        return Network(small_cnn(channels, width=width, norm=norm), 4 * width, False)
    size: Any = shape[0] if shape[0] == shape[1] else shape[:2]
    given = {"channels": channels, "image_size": size, "num_classes": num_classes}
    try:
        return examined(_made(name, given, options), shape)
    except UserError as error:
        raise UserError(f"model.name={name}: {error}") from error


def is_factory(name: str) -> bool:
    """Whether a name is `module:factory`, and no library's."""
    return ":" in name and name.partition(":")[0] not in ("torchvision", "timm")


def _made(name: str, given: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    library, colon, rest = name.partition(":")
    if is_factory(name):
        return _of_factory(name, given, options)
    if colon:
        return _of_torchvision(rest, given, options) if library == "torchvision" else _of_timm(rest, given, options)
    if name in _torchvision_names():
        return _of_torchvision(name, given, options)
    if _has_timm() and _without_tag(name) in _timm_names():
        return _of_timm(name, given, options)
    known = ["resnet18", "small_cnn", *SHORT, *_torchvision_names(), *(_timm_names() if _has_timm() else [])]
    of_timm = "" if _has_timm() else f"{NO_TIMM}, if it is one of timm's; "
    raise UserError(f"there is no such network{_nearest(name, known)} ({of_timm}one of your own is module:factory)")


def _of_factory(name: str, given: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    try:
        factory = pkgutil.resolve_name(name)
    except Exception as error:
        raise UserError(f"{error} (is its folder in PYTHONPATH, on every machine?)") from error
    if not _gives_network(factory):
        raise UserError(f"{name.partition(':')[2]} does not say that it gives a network: write `-> nn.Module`")
    declared = inspect.signature(factory).parameters
    return _called(factory, {key: value for key, value in given.items() if key in declared} | options)


def _gives_network(factory: Any) -> bool:
    """Whether it declares that it gives a module. The name comes in a message: nothing else may be called."""
    if not inspect.isclass(factory):
        try:
            factory = typing.get_type_hints(factory).get("return")
        except (TypeError, NameError):
            return False
    return inspect.isclass(factory) and issubclass(factory, nn.Module)


def _of_torchvision(name: str, given: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """Make a classifier of torchvision without its last layer, for images of so many channels."""
    from torchvision import models

    if name not in _torchvision_names():
        raise UserError(f"torchvision has no classifier of that name{_nearest(name, _torchvision_names())}")
    own: dict[str, Any] = {"image_size": given["image_size"]} if name.startswith("vit_") else {}
    if name in DRAWN_BY_OLD_RULES:
        own["init_weights"] = True
    network = _called(lambda **all_: models.get_model(name, **all_), {"weights": None, **own, **options})
    layers = [(place, layer) for place, layer in network.named_modules() if [*layer.parameters(recurse=False)]]
    if isinstance(layers[-1][1], nn.Linear):
        network.set_submodule(layers[-1][0], nn.Identity())
    place, first = next((place, layer) for place, layer in layers if isinstance(layer, nn.Conv2d))
    if first.in_channels != given["channels"]:
        network.set_submodule(place, _with_channels(first, given["channels"]))
    return network


def _with_channels(layer: nn.Conv2d, channels: int) -> nn.Conv2d:
    geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return nn.Conv2d(channels, layer.out_channels, layer.kernel_size, **geometry, bias=layer.bias is not None)  # type: ignore[arg-type]


def _of_timm(name: str, given: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    if not _has_timm():
        raise UserError(NO_TIMM)
    if _without_tag(name) not in _timm_names():
        raise UserError(f"timm has no model of that name{_nearest(name, _timm_names())}")
    timm: Any = import_module("timm")

    def make(**all_: Any) -> nn.Module:
        try:
            return timm.create_model(name, img_size=given["image_size"], **all_)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        return timm.create_model(name, **all_)  # a convolutional network, which takes images of any size

    return _called(make, {"num_classes": 0, "in_chans": given["channels"], **options})


def _called(factory: Any, arguments: dict[str, Any]) -> nn.Module:
    try:
        network = factory(**arguments)
    except Exception as error:
        raise UserError(f"{type(error).__name__} while it was made: {error}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"what was made is no torch.nn.Module but {type(network).__name__}")
    return network


def _without_tag(name: str) -> str:
    """Give the architecture in a name of timm's, which may go on with that of trained weights: `vit_tiny.augreg`."""
    return name.partition(".")[0]


def _has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


@cache
def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


@cache
def _timm_names() -> list[str]:
    timm: Any = import_module("timm")
    return timm.list_models()


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f": did you mean {close[0]}?" if close else ""


@torch.no_grad()
def examined(network: nn.Module, shape: tuple[int, int, int]) -> Network:
    """Let a network run on four images of noise in eval mode, and see that a run can use it.

    Its weights may change their memory order, and layers that learn their size from a first image know it then.

    Args:
        network: maps images to features.
        shape: of an image, (H, W, channels).

    Raises:
        UserError: it fails, gives no features [N, f], or gives what depends on other images of the batch. Also for
            weights that are not fp32, and for BatchNorm whose statistics could not be estimated.

    Example:
        >>> examined(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), (8, 8, 3)).features
        5
    """
    height, width, channels = shape
    images = torch.rand(4, channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with kept_modes(network):
        network.eval()
        found, plain = _in_fast_order(network, images)
        _check_features(found, len(images))
        alone, largest = first_of(network(images[:2])), float(found.abs().max())
        if not torch.allclose(alone, found[:2], rtol=1e-2, atol=1e-3 * largest):
            raise UserError(
                "its features of an image depend on the other images of a batch, or on chance, in eval mode"
            )
        _check_batch_norm(network, images)
        _check_gradients(network, images)
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"{name} is no tensor: a model that travels has tensors alone")
        is_number = value.is_floating_point() or value.is_complex()
        if is_number and not (value.dtype == torch.float32 and value.isfinite().all()):
            raise UserError(f"{name} is not of finite numbers in fp32 (buffers that are none: persistent=False)")
    return Network(network, found.shape[1], plain)


def _in_fast_order(network: nn.Module, images: Tensor) -> tuple[Any, bool]:
    """Run, then once more with images and weights in the memory order that convolutions are fastest in, if that works.

    Returns:
        The features, and whether the network is left in plain order.
    """
    try:
        found = first_of(network(images))
    except Exception as error:
        raise UserError(f"{type(error).__name__} on images {list(images.shape)}: {error}") from error
    try:
        return first_of(in_order(network, False)(images.contiguous(memory_format=torch.channels_last))), False
    except RuntimeError:
        in_order(network, True)
        return found, True


def in_order(module: nn.Module, plain: bool) -> nn.Module:
    """Bring weights into the plain memory order, or into that which convolutions of images are fastest in."""
    has_volumes = any(p.ndim == 5 for p in module.parameters())  # which have an order of their own
    order = torch.contiguous_format if plain or has_volumes else torch.channels_last
    return module.to(memory_format=order)  # type: ignore[call-overload]


def _check_features(found: Any, count: int) -> None:
    if not isinstance(found, Tensor):
        raise UserError(f"it gives no tensor [N, features] but {type(found).__name__}")
    if found.ndim != 2 or len(found) != count or not found.is_floating_point():
        raise UserError(f"of {count} images it gives {found.dtype} {list(found.shape)}, and not features [{count}, f]")
    if not found.isfinite().all():
        raise UserError("it gives features that are not finite")


def _check_gradients(network: nn.Module, images: Tensor) -> None:
    """Raise UserError where nothing can be learned from what the network gives."""
    trained = [p for p in network.parameters() if p.requires_grad]
    try:
        with torch.enable_grad():
            features = first_of(network(images))
            if features.requires_grad:
                torch.autograd.grad(features.sum(), trained, allow_unused=True)
    except Exception as error:
        raise UserError(f"{type(error).__name__} where its gradients are computed: {error}") from error


def _check_batch_norm(network: nn.Module, images: Tensor) -> None:
    """Raise UserError for a BatchNorm layer of which an image has no values, or more than it has pixels."""
    values = {name: 0.0 for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}

    def count(name: str, _layer: nn.Module, given: Tensor) -> None:
        values[name] += given.numel() / given.shape[1] / len(images)

    with layer_inputs(network, (_BatchNorm,), count):
        network(images)
    pixels = images[0, 0].numel()
    if wrong := [name for name, found in values.items() if not 0 < found <= pixels]:
        raise UserError(f"BatchNorm layer {wrong[0]} sees {values[wrong[0]]:g} values of an image of {pixels} pixels")
