"""Compose the settings of a run: Hydra reads an app's files and what people type, pydantic checks what comes of it."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedunlearn.config import LONGEST_NAME, OURS, RUN_NAME, Config, Data, Partition, check_clients, state_home
from fedunlearn.errors import UserError
from fedunlearn.naming import name_of as client_name
from fedunlearn.owners import named_settings, settled
from fedunlearn.schema import KEY_ID, check_names, fields_of, name_of, validated
from fedunlearn.words import for_hydra, put, split_words, texts_of, unquoted, with_scale


def compose(folder: Path, words: str | Sequence[str] = ()) -> Config:
    """The settings of `config.yaml` in `folder` with `words` such as `["rounds=40", "strategy=ssd"]` on top.

    Args:
        folder: the Hydra configuration folder of an app, such as `simulations/digits/conf`.
        words: `name=value` each, or one string of them.

    Raises:
        UserError: an unknown name, a value of the wrong type, or one out of range.

    Example:
        >>> compose(Path("simulations/digits/conf"), "rounds=8 strategy=ssd").rounds
        8
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no config.yaml: is {folder.parent} an app such as simulations/digits?")
    words = spelled_out(split_words(words) if isinstance(words, str) else words)
    check_names(words, Config)
    asked = {name_of(word) for word in words}
    ConfigStore.instance().store(name="schema", node=Config().model_dump())
    words = with_scale(words, folder)
    typed: dict[str, Any] = {**texts_of(words, Config), **named_settings(words)}
    words = [for_hydra(word, Config) for word in words if name_of(word) not in typed]
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            values: Any = OmegaConf.to_container(hydra_compose("config", words), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{' '.join(words)}: {reason} (`fedunlearn config` lists all settings)") from None
    put(values, typed)
    settled(values, asked, state_home(values["home"]) / "runs", _clients_of)
    config = with_classes(check(validated(Config, values)))
    if (idle := sorted(asked & {"model.width", "model.norm"})) and config.model.name not in OURS:
        raise UserError(
            f"{idle[0]} changes nothing of model.name={config.model.name}: leave it out (see model.options)"
        )
    return config


def spelled_out(words: Sequence[str]) -> list[str]:
    """Give words with full names: `model=small_cnn` -> `model.name=small_cnn`, `partition=iid` -> `partition.kind=iid`.

    It is so for every group with a `name` or a `kind`. A mapping, as `model={width: 16}`, stays one.
    """
    leaves = {name.rpartition(".")[0]: name for name, _ in fields_of(Config) if name.endswith((".name", ".kind"))}
    return [
        f"{leaves[group]}={value}" if group in leaves and not unquoted(value).lstrip().startswith("{") else word
        for word in words
        for group, _, value in [word.partition("=")]
    ]


def _clients_of(values: Mapping[str, Any]) -> list[str]:
    """The names of the owners of the images that settings are about."""
    from fedunlearn.data.datasets import clients_of

    data, split = validated(Data, values["data"], prefix="data."), validated(Partition, values["partition"])
    return clients_of(data.name, **place_of(data, split, values["home"]))


def with_classes(config: Config) -> Config:
    """Give the settings with the names of all classes, which machines of their own have to be told.

    Raises:
        UserError: there are no held-out images here, or they are of one class.
    """
    split = config.partition
    if not split.is_on_nodes or split.classes:
        return config
    from fedunlearn.data.datasets import classes_here

    classes = classes_here(config.data.name, **place_of(config.data, split, config.home))
    return check(config.model_copy(update={"partition": split.model_copy(update={"classes": classes})}))


def place_of(data: Data, split: Partition, home: str) -> dict[str, Any]:
    """Say where images are and how they are read, as `data.datasets.load` takes it."""
    from fedunlearn.data.datasets import Choices, Owners

    about = data.model_dump(include={"root", "limit", "test_limit", "image_size"})
    about_files = data.model_dump(include={"fit", "exif", "skip_bad", "label", "client"})
    choices: Any = Choices(window=tuple(data.window), columns=tuple(data.columns), **about_files)  # type: ignore[arg-type]
    owners = Owners(split.kind, split.file, tuple(split.names), tuple(split.classes))
    return {"cache": state_home(home) / "data", "choices": choices, "owners": owners, **about}


def check(config: Config) -> Config:
    """The config itself, where its values agree with each other.

    Raises:
        UserError: naming the first that does not.
    """
    if config.run and not re.fullmatch(RUN_NAME, config.run):
        raise UserError(f"run={config.run!r} is no name: a letter or digit, then also '.', '_' and '-'")
    if len(config.run.encode()) > LONGEST_NAME:
        raise UserError(f"run={config.run[:20]}... is longer than {LONGEST_NAME} bytes: files are named after it")
    for round_, clients in config.forget.schedule.items():
        if not 0 <= round_ <= config.rounds:
            raise UserError(f"forget.schedule: round {round_} is not in 0..{config.rounds}")
        check_clients(clients, config.clients)
    if config.readmit:
        check_clients(config.readmit, config.clients)
    check_nodes(config)
    if (window := config.data.window) and not (len(window) == 2 and -math.inf < window[0] < window[1] < math.inf):
        raise UserError(f"data.window={window} is not [low,high], with a low value below the high one")
    if config.forget.schedule and config.forget.signed:
        raise UserError("forget.schedule asks without a signature, and forget.signed=true wants one")
    for name, keys in (("forget.keys", config.forget.keys), ("partition.keys", config.partition.keys)):
        check_keys(name, keys, config.clients)
    return config


def check_keys(name: str, keys: Mapping[int, str], clients: int) -> None:
    """Raise UserError where a setting has keys of clients that there are not, or what is no id of a key."""
    for client, key in keys.items():
        check_clients([client], clients)
        if not re.fullmatch(KEY_ID, key):
            raise UserError(f"{name}: {key!r} of client {client} is no id of a key, as `fedunlearn keys id` prints it")


def check_nodes(config: Config) -> None:
    """Raise UserError for settings of real machines where there are none, or where images are no files."""
    split = config.partition
    if split.is_on_nodes and config.data.name != "folder":
        raise UserError(f"partition.kind=nodes is for image files: data.name=folder, not {config.data.name}")
    if (split.classes or split.keys) and not split.is_on_nodes:
        raise UserError(f"partition.{'classes' if split.classes else 'keys'} is for partition.kind=nodes")
    if split.keys and (without := sorted(set(range(config.clients)) - split.keys.keys())):
        raise UserError(
            f"partition.keys has no key of client {client_name(without[0], split.names)}: all have one, or none"
        )
    if split.classes and len(set(split.classes)) < max(2, len(split.classes)):
        raise UserError(f"partition.classes={split.classes} are not two classes or more, each named once")
