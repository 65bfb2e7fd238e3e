"""What the settings of all studies have in common, and how they are read: a preset, then words on top."""

from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field

from fedunlearn.composing import spelled_out
from fedunlearn.config import Data, Loss, Model, Partition, Scale, Settings, check_clients, settings
from fedunlearn.errors import UserError
from fedunlearn.schema import check_names, fields_of, name_of, validated
from fedunlearn.words import put, texts_of

DatasetName = Literal["digits", "cifar10", "cifar100", "folder"]
Pipeline = Literal["no_mtl", "ce", "ce_dl"]

PIPELINES: dict[Pipeline, str] = {"no_mtl": "Without MTL (SSD)", "ce": "MTL with CE", "ce_dl": "MTL with CE + DL"}
"""The paper's three ways to train, and what tables call them."""


class Scope(Settings):
    """Says which part of a study is done, and where."""

    name: str = Field(default="", description="of the study's folder; empty: data set and scale (and 'federated')")
    home: str = Field(default="", description="state folder; empty takes $FEDUNLEARN_HOME or ~/.fedunlearn")
    stages: list[Any] = Field(default=[], description="what to do")
    only: str = Field(
        default="*",
        description="patterns of task names, such as retrained/ce_dl/*/seed0, with blanks between: do no others, "
        "and those of the first pattern first",
    )
    pipelines: list[Pipeline] = Field(default=list(PIPELINES), description="which")
    order: list[int] = Field(default=[0, 1, 2], description="clients in the order of their requests")
    seeds: list[int] = Field(default=[0], description="repetitions: of weights, shuffling, augmentation and search")
    workers: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="processes at work; 0: one on a GPU, else as many as the cores have threads for",
    )
    minutes: float = Field(
        default=float("inf"),
        ge=0,
        description="after which to stop, at the next point that is saved; run again to go on",
    )


class Preset(Settings):
    """Says which preset a study begins with."""

    dataset: DatasetName = Field(default="cifar10", description="whose preset to take; data.name can differ")
    scale: Scale = Field(
        default="auto", description="the paper's size, or one for two cores; auto is laptop without a GPU, else full"
    )


class StudySettings(Preset):
    """Holds what every study depends on."""

    clients: int = Field(default=10, ge=2, le=10**6, description="clients")
    data: Data = Data()
    partition: Partition = Partition()
    model: Model = Model()
    loss: Loss = Loss()
    study: Scope = Scope()


S = TypeVar("S", bound=StudySettings)


def composed(schema: type[S], package: str, words: Iterable[str]) -> S:
    """Give the settings with the preset of their `dataset` and `scale`, and `words` on top.

    Args:
        package: that holds `presets.yaml`: data set -> `full`, `laptop` (on top of full) -> settings.
        words: `name=value` each.

    Raises:
        UserError: an unknown name, a value that cannot be read, of the wrong type, or out of its range.
    """
    import torch
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    words = spelled_out(list(words))
    check_names(words, schema)
    texts = texts_of(words, schema)
    presets = OmegaConf.create(files(package).joinpath("presets.yaml").read_text())
    try:
        given = OmegaConf.from_dotlist([word for word in words if name_of(word) not in texts])
        chosen = validated(Preset, {name: given[name] for name in Preset.model_fields if name in given})
        scale = chosen.scale
        if scale == "auto":
            scale = "full" if torch.cuda.is_available() else "laptop"
        preset = OmegaConf.select(presets, chosen.dataset)
        merged = OmegaConf.merge(
            {"data": {"name": chosen.dataset}},
            preset.get("full") or {},
            (preset.get("laptop") or {}) if scale == "laptop" else {},
            given,
            {"scale": scale},
        )
        values = OmegaConf.to_container(merged, resolve=True)
    except YAMLError:
        raise UserError(
            f"{' '.join(words)}: a value cannot be read; one that begins with [ or * and is no list needs quotes"
        ) from None
    except OmegaConfBaseException as error:
        raise UserError(str(error).strip().splitlines()[0]) from None
    assert isinstance(values, dict)
    put(values, texts)
    _check_options(schema, values)
    return validated(schema, values)


def defaults_of(schema: type[BaseModel]) -> dict[str, Any]:
    """Give the default of every setting that has one, before any preset; groups are dicts."""
    return schema.model_construct().model_dump()


def check_scope(chosen: StudySettings) -> None:
    """Raise UserError for lists that are empty, and for seeds or clients to forget that cannot be."""
    for name, declared, value in settings(chosen):
        if isinstance(value, list) and not value and declared.default != []:
            raise UserError(f"{name}=[] leaves nothing to do")
    seeds, order = chosen.study.seeds, chosen.study.order
    if len(set(seeds)) != len(seeds) or not all(0 <= seed <= 10**6 for seed in seeds):
        raise UserError(f"study.seeds={seeds} are not different numbers in 0..1,000,000")
    check_clients(order, chosen.clients)
    if len(set(order)) != len(order):
        raise UserError(f"study.order={order} names a client twice")
    if len(order) >= chosen.clients:
        raise UserError(f"study.order={order} leaves no client: {chosen.clients} in all")


def _check_options(schema: type[Settings], values: Mapping[Any, Any]) -> None:
    """Raise UserError for a word of a list that is none of its options."""
    for name, options in _lists_of_options(schema):
        group, _, leaf = name.rpartition(".")
        given = values.get(group, {}) if group else values
        words = given.get(leaf) if isinstance(given, Mapping) else None
        for word in words if isinstance(words, list) else ():
            if word not in options:
                raise UserError(f"{name}: {word} is not one of {', '.join(options)}")


def _lists_of_options(schema: type[Settings]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, declared in fields_of(schema):
        if get_origin(declared.annotation) is list:
            (element,) = get_args(declared.annotation)
            if get_origin(element) is Literal:
                yield name, get_args(element)
