"""Every setting, its type, its range and what it means; Hydra composes them, this module checks them."""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from fedunlearn.data import datasets, partition
from fedunlearn.errors import UserError
from fedunlearn.nn import model, precision, schedule
from fedunlearn.unlearning import fisher


def number(default: float, low: float, high: float, text: str) -> Any:
    """A number in low..high (both included)."""
    return field(default=default, metadata={"range": (low, high), "text": text})


def choice(default: str, options: tuple[str, ...], text: str) -> Any:
    """One of some words."""
    return field(default=default, metadata={"options": options, "text": text})


def plain(default: Any, text: str) -> Any:
    """A value that its type alone restricts."""
    return field(default=default, metadata={"text": text})


INF = math.inf
SCALES = ("auto", "full", "laptop")
TUNINGS = ("auto", "fixed")
STRATEGIES = ("subset", "ssd", "leave", "ascent", "pga", "federaser", "negate", "retrain")
OWN = "module:Class"  # among a setting's options: anything of that form


@dataclass
class Data:
    """Which images."""

    name: str = choice(
        "digits", datasets.NAMES, "data set; random: ten noisy patterns, to measure speed where no images are at hand"
    )
    root: str = plain("", "for folder: absolute path of an ImageFolder tree, or of an archive of one")
    limit: int = number(0, 0, 10**9, "training images to keep, the first of each class; 0 keeps all")
    test_limit: int = number(0, 0, 10**9, "test images to keep; 0 keeps all")
    image_size: int = number(32, 8, 1024, "for folder and random: pixels a side")


@dataclass
class Partition:
    """Who owns which image."""

    kind: str = choice("dirichlet", partition.KINDS, "dirichlet a class, iid, or one class a client")
    dirichlet_alpha: float = number(0.6, 1e-6, 1e6, "concentration of the Dirichlet split; lower is less even")
    seed: int = number(42, 0, 2**32 - 1, "of the split")


@dataclass
class Model:
    """The network."""

    width: int = number(64, 8, 512, "channels of the first stage (the paper: 64)")
    head: str = choice("medium", model.HEADS, "size of projection and heads")
    norm: str = choice("batch", model.NORMS, "BatchNorm or GroupNorm")
    client_head: bool = plain(True, "false: the single-head baseline")


@dataclass
class Train:
    """Local training."""

    epochs: int = number(1, 1, 1000, "local epochs a round")
    batch_size: int = number(128, 2, 10**6, "examples a step")
    lr: float = number(0.05, 0, 100, "SGD learning rate at the start")
    schedule: str = choice("steps", schedule.SCHEDULES, "of the learning rate over the rounds")
    lr_end: float = number(0.0, 0, 1, "share of lr that schedule=cosine ends with, and goes on with in further rounds")
    momentum: float = number(0.9, 0, 1, "of SGD, within one client and round")
    server_momentum: float = number(0.0, 0, 0.99, "of the server, over rounds")
    weight_decay: float = number(5e-4, 0, 10, "of SGD")
    crop_padding: int = number(4, 0, 64, "random crops after zero-padding by so many pixels")
    flip: bool = plain(True, "random horizontal flips")
    client_head: str = choice(
        "server", ("server", "local"), "who trains it; server: from moments of clients' embeddings"
    )
    head_share: float = number(0.5, 1e-6, 1, "of a client's images, at random, that the moments are of")
    head_steps: int = number(300, 1, 10**6, "of the server on the client head, after every round")
    precision: str = choice(
        "auto", precision.PASSES, "of forward and backward passes; auto: bf16 where the hardware has it (weights: fp32)"
    )
    threads: int = number(1, 1, 1024, "CPU threads a worker; more change the last bits of the results")


@dataclass
class Loss:
    """Eq. 4-7 of the paper."""

    class_weight: float = number(1.0, 0, INF, "lambda_1")
    client_weight: float = number(1.0, 0, INF, "lambda_2")
    disentangle_weight: float = number(0.1, 0, INF, "lambda_dis")
    pull: float = number(1.0, 0, INF, "lambda_pull")
    push: float = number(1.0, 0, INF, "lambda_push")
    margin: float = number(1.0, 0, INF, "m")
    within_class: bool = plain(False, "take the disentanglement loss within each class")
    warmup: float = number(0.1, 0, 1, "share of training with the class loss alone")


@dataclass
class Unlearn:
    """What a forget request does (Eq. 8-9)."""

    alpha: float = number(
        2.0, 0, INF, "selection threshold; at N/n_f of the leaving clients and above nothing is selected (ssd, fixed)"
    )
    lambda_: float = number(1.0, 0, INF, "dampening strength; 0 zeroes what is selected (ssd, fixed)")
    exponent: float = number(1.0, 0, 100, "power of the dampening factor (ssd)")
    head: str = choice("class", fisher.HEADS, "whose loss the Fisher is of (ssd)")
    estimator: str = choice("per_example", fisher.ESTIMATORS, "of the Fisher (ssd)")
    precision: str = choice("fp32", precision.PRECISIONS, "of the Fisher's forward and backward passes (ssd)")
    share: float = number(
        1.0, 1e-6, 1, "of each retained client's images, at random, that the Fisher is taken of (ssd)"
    )
    recalibrate: bool = plain(True, "estimate BatchNorm statistics again on the retained clients (subset, ssd)")
    recovery_rounds: int = number(
        0, 0, 10**6, "rounds of training on the retained clients, if the run has any, until a request counts as done"
    )
    tune: str = choice("auto", TUNINGS, "auto: α and λ by what unseen data gets; fixed: as set (ssd)")
    rounds: int = number(2, 1, 10**6, "of unlearning: the leaving clients teach, the others mend (subset)")
    round_share: float = number(
        0.3, 1e-6, 1, "of each retained client's images that mend, or give candidates statistics (subset, ssd)"
    )
    input_share: float = number(
        0.05, 1e-6, 1, "of each retained client's images, at random, whose inputs to the layers are looked at (subset)"
    )
    ridge: float = number(
        0.02, 1e-9, INF, "directions of layers' inputs with less than this share of the mean are free to teach (subset)"
    )
    forget_epochs: int = number(4, 1, 1000, "of the leaving clients in such a round (subset)")
    flip: bool = plain(True, "match answers by mirrored versions of their images too (subset)")
    hold: float = number(0.9, 0, 1, "share of the weights, those it moved most, that hardly move from then on (subset)")
    lr: float = number(
        0.06, 0, 100, "learning rate of the leaving clients, up to twice that while the schedule's has still to fall "
        "(subset)",
    )  # fmt: skip
    mend_lr: float = number(
        0.005, 0, 100, "learning rate of the others in these rounds, or the schedule's if higher (subset)"
    )
    recover: int = number(3, 0, 10**6, "rounds of the retained clients until it is served (ascent, pga, negate)")
    recover_lr: float = number(0.01, 0, 100, "learning rate of these rounds (ascent, pga, negate)")
    ascent_epochs: int = number(5, 1, 1000, "at most, of the leaving clients (ascent, pga)")
    ascent_lr: float = number(0.05, 0, 100, "of their steps (ascent, pga)")
    clip: float = number(1.0, 0, INF, "norm that their gradients are clipped to (ascent, pga)")
    every: int = number(2, 1, 10**6, "rounds between stored updates (federaser)")
    calibration: float = number(0.5, 1e-6, 1, "share of each client's images that calibrates them (federaser)")
    attempts: int = number(3, 1, 100, "times a request is tried before it is set aside")


@dataclass
class Forget:
    """Requests known in advance."""

    schedule: dict[int, list[int]] = field(
        default_factory=dict, metadata={"text": "round -> clients forgotten after it, as {6:[3]}"}
    )


@dataclass
class Config:
    """Everything one run depends on."""

    run: str = plain("", "name of the run; the same name again resumes it; empty takes a new one")
    home: str = plain("", "state folder; empty takes $FEDUNLEARN_HOME or ~/.fedunlearn")
    strategy: str = choice("subset", (*STRATEGIES, OWN), "how a client is forgotten")
    seed: int = number(0, 0, 2**32 - 1, "of weights, shuffling, augmentation and client sampling")
    scale: str = choice(
        "auto", SCALES, "size of the study, where the app has several; auto is laptop without a GPU, else full"
    )
    clients: int = number(10, 2, 10**6, "clients")
    rounds: int = number(200, 1, 10**6, "rounds of training")
    fraction: float = number(1.0, 0, 1, "share of the clients that train in a round (at least one)")
    evaluate_every: int = number(1, 1, 10**6, "rounds between evaluations (always after the last and around a request)")
    wire: str = choice(
        "fp32", precision.PRECISIONS, "of the tensors in messages; sums and the server's model stay fp32"
    )
    window: int = number(8, 1, 10**6, "messages in flight at once")
    timeout: float = number(3600, 0.1, 10**6, "seconds without any reply after which silent nodes are left out")
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    loss: Loss = field(default_factory=Loss)
    unlearn: Unlearn = field(default_factory=Unlearn)
    forget: Forget = field(default_factory=Forget)


def compose(folder: Path, overrides: str = "") -> Config:
    """The configuration `config.yaml` of `folder` with `overrides` such as `"rounds=40 strategy=ssd"`.

    Raises:
        UserError: an unknown name, a value of the wrong type, or one out of range.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no config.yaml: is {folder.parent} an app such as simulations/digits?")
    ConfigStore.instance().store(name="schema", node=Config)
    words = _resolve_scale(split_overrides(overrides), folder)
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            config = OmegaConf.to_object(hydra_compose("config", words))
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"overrides={overrides!r}: {reason} (settings and their ranges: README.md)") from None
    return check(config)


def split_overrides(text: str) -> list[str]:
    """`"a=1 b={6: [3]} c=x"` -> `["a=1", "b={6: [3]}", "c=x"]`: words begin where `name=` does.

    Hydra takes new keys of a mapping only behind `++`, so a bare `forget.schedule=` gets that.
    """
    words = [word for word in re.split(r"\s+(?=[~+]*[\w./@]+=)", text.strip()) if word]
    return [f"++{word}" if word.startswith("forget.schedule=") else word for word in words]


def check(config: Config) -> Config:
    """The config itself, where every value is in its range.

    Raises:
        UserError: naming the first that is not, and its range.
    """
    check_ranges(config)
    if config.run and not re.fullmatch(r"\w[\w.-]*", config.run):
        raise UserError(f"run={config.run!r} is no name: a letter or digit, then also '.', '_' and '-'")
    if config.unlearn.head == "client" and not config.model.client_head:
        raise UserError("unlearn.head=client needs model.client_head=true")
    for round_, clients in config.forget.schedule.items():
        if not 1 <= round_ <= config.rounds:
            raise UserError(f"forget.schedule: round {round_} is not in 1..{config.rounds}")
        check_clients(clients, config.clients)
    return config


def check_ranges(config: Any) -> None:
    """Raise UserError for the first setting that is out of its range or none of its options, and name them."""
    for name, declared, value in settings(config):
        low, high = declared.metadata.get("range", (-INF, INF))
        if isinstance(value, float | int) and not low <= value <= high:
            raise UserError(f"{name}={value} is not in {low}..{high}")
        options = declared.metadata.get("options")
        if options and not is_among(options, value):
            raise UserError(f"{name}={value} is not one of {', '.join(options)}")


def is_among(options: tuple[str, ...], value: str) -> bool:
    """Whether the value is one of the options, or of the form of `OWN` where that is one."""
    return value in options or (OWN in options and re.fullmatch(r"[\w.]+:\w+", value) is not None)


def check_clients(clients: list[int], num_clients: int) -> None:
    """Raise UserError for the first client that is not in 0..C-1, and for an empty request."""
    if not clients:
        raise UserError(f"no client to forget: name one in 0..{num_clients - 1}")
    for client in clients:
        if not 0 <= client < num_clients:
            raise UserError(f"client {client} is not in 0..{num_clients - 1}")


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Field, Any]]:
    """Every setting below `config`, as (dotted name, field, value)."""
    for declared in fields(config):
        value = getattr(config, declared.name)
        if is_dataclass(value):
            yield from settings(value, f"{prefix}{declared.name}.")
        else:
            yield f"{prefix}{declared.name}", declared, value


def to_json(config: Config) -> str:
    """One line of JSON, the same for equal configs."""
    return json.dumps(asdict(config), sort_keys=True)


def from_json(text: str) -> Config:
    """The config that `to_json` wrote; settings that did not exist then have their defaults.

    Raises:
        UserError: it has a setting that no longer exists.
    """
    return _build(Config, json.loads(text))


def state_home(home: str = "") -> Path:
    """The state folder: `home`, else $FEDUNLEARN_HOME, else ~/.fedunlearn."""
    return Path(home or os.environ.get("FEDUNLEARN_HOME") or "~/.fedunlearn").expanduser().absolute()


def _build(kind: type, values: dict[str, Any]) -> Any:
    declared = {f.name: f for f in fields(kind)}
    arguments = {}
    for name, value in values.items():
        if name not in declared:
            raise UserError(f"{name} is no setting of this version: start a new run, or go on with the version before")
        factory = declared[name].default_factory
        nested = factory is not MISSING and is_dataclass(factory)
        arguments[name] = _build(factory, value) if nested else value
    if kind is Forget:  # JSON has no integer keys
        arguments["schedule"] = {int(round_): clients for round_, clients in arguments["schedule"].items()}
    return kind(**arguments)


def _resolve_scale(words: list[str], folder: Path) -> list[str]:
    """Replace scale=auto, also where it is only implied, by laptop or full."""
    rest = [word for word in words if not word.startswith("scale=")]
    named = [word.removeprefix("scale=") for word in words if word not in rest]
    scale = named[-1] if named else "auto"
    if scale not in SCALES:
        raise UserError(f"scale={scale} is not one of {', '.join(SCALES)}")
    if not (folder / "scale").is_dir():
        return rest
    if scale == "auto":
        import torch

        scale = "full" if torch.cuda.is_available() else "laptop"
    return [f"scale={scale}", *rest]
