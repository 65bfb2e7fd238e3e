"""From settings to images, the clients' slices of them, a model, and the learning rate of a round."""

import hashlib
import json
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedunlearn.composing import place_of
from fedunlearn.config import Config
from fedunlearn.data import datasets, partition
from fedunlearn.data.decoded import Split, fingerprint
from fedunlearn.data.folders import revealed
from fedunlearn.data.owned import OwnedDataset, OwnedSource
from fedunlearn.data.store import Dataset
from fedunlearn.errors import UserError
from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import TwoHeadModel, TwoHeadResNet18
from fedunlearn.nn.networks import in_order, network_of
from fedunlearn.nn.rng import drawing_from, generator_of
from fedunlearn.nn.schedule import learning_rate

Source = datasets.Source | OwnedSource


class Images(NamedTuple):
    """What a model has to know of images: it is kept with a run, so that its model outlives them.

    Attributes:
        class_names: K names.
        shape: of an image, (H, W, channels).
    """

    class_names: list[str]
    shape: tuple[int, int, int]

    @property
    def channels(self) -> int:
        """Count the channels of an image, 1 or 3."""
        return self.shape[2]


def open_dataset(config: Config, here: Sequence[int] = ()) -> Dataset:
    """Open the images of a run, downloading and decoding them on first use.

    Args:
        here: the clients of this machine, where each has its own; without any those of the server.
    """
    place = _place_of(config)
    names = tuple(config.partition.names[client] for client in here)
    return datasets.load(config.data.name, **place | {"owners": place["owners"]._replace(here=names)})


def source_of(config: Config) -> Source:
    """Say where the images of a run come from, and where their decoded copy is.

    Raises:
        UserError: the source is gone.
    """
    return datasets.source_of(config.data.name, **_place_of(config))


def unpacked_of(config: Config) -> Path | None:
    """Give the folder that the archive of a run's images is unpacked to; None where they are in no archive."""
    return datasets.unpacked_of(config.data.name, **_place_of(config))


def _place_of(config: Config) -> dict[str, Any]:
    return place_of(config.data, config.partition, config.home)


def slices_of(config: Config, dataset: Dataset) -> list[np.ndarray]:
    """Give every client's indices into the training images: as they were dealt out before some were taken out.

    Raises:
        UserError: the images have other clients than the run.
    """
    kept = dataset.dealt(deal_of(config))
    if kept is None and config.partition.kind == "column":
        owners = np.array(dataset.owners)
        kept = [np.flatnonzero(owners == name) for name in owners_of(config, dataset)]
    if kept is None:
        kept = dealt(config, np.asarray(dataset.train.labels))
    if len(kept) != config.clients:
        raise UserError(f"clients={config.clients}: the images have {len(kept)} owners, so clients={len(kept)}")
    return kept


def owners_of(config: Config, dataset: Dataset) -> list[str]:
    """Name the clients of a run, by number, as the data set names the owners of its images; none where it does not."""
    if config.partition.kind != "column":
        return []
    return revealed(config.partition.names or dataset.clients, dataset.clients)


def dealt(config: Config, labels: np.ndarray) -> list[np.ndarray]:
    """Deal images with these labels out to clients."""
    split = config.partition
    return partition.partition(
        split.kind, labels, config.clients, dirichlet_alpha=split.dirichlet_alpha, seed=split.seed
    )


def deal_of(config: Config) -> str:
    """Name how a run deals its images out: the same for runs that do it in the same way."""
    about = {"clients": config.clients, **config.partition.model_dump()}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def fingerprints_of(dataset: Dataset, slices: Sequence[np.ndarray]) -> dict[str, str]:
    """Compute the SHA-256 of what each client has, by its number as text, and of the images that are held out.

    That of a client without images is empty.
    """
    if isinstance(dataset, OwnedDataset):
        return dataset.fingerprints()
    own = {str(client): fingerprint_of(dataset, slices, client) for client in range(len(slices))}
    return own | {"held-out": dataset.test_fingerprint}


def fingerprint_of(dataset: Dataset, slices: Sequence[np.ndarray], client: int) -> str:
    """Compute the SHA-256 of a client's images and labels; nothing where it has none."""
    if isinstance(dataset, OwnedDataset):
        return dataset.parts[client].fingerprint()
    owned, train = slices[client], dataset.train
    return fingerprint(Split(train.images[owned], train.labels[owned])) if len(owned) else ""


def model_of(config: Config, dataset: Dataset | Images, *place: int) -> TwoHeadModel:
    """Make a new model, its weights drawn with the run's seed (and with `place`, for another one than the run's).

    Raises:
        UserError: there is no such network on this machine, or it gives no usable features.
    """
    model, classes = config.model, len(dataset.class_names)
    clients = config.clients if model.client_head else 0
    with drawing_from(generator_of(config.seed, *place)):
        if model.name == "resnet18":
            if model.options:
                raise UserError("model.options: resnet18 has model.width and model.norm, and no options")
            sizes = {"width": model.width, "head_size": model.head_size, "norm": model.norm}
            return TwoHeadResNet18(classes, clients, **sizes, channels=dataset.channels)
        network = network_of(
            model.name,
            _shape_of(dataset),
            num_classes=classes,
            width=model.width,
            norm=model.norm,
            options=model.options,
        )
        about = {"head_size": model.head_size, "features": network.features, "plain": network.plain}
        try:
            return TwoHeadModel({"network": network.module}, num_classes=classes, num_clients=clients, **about)
        except ValueError as error:
            raise UserError(f"model.name={model.name}: {error}") from error


def _shape_of(dataset: Dataset | Images) -> tuple[int, int, int]:
    """Give the shape of an image, (H, W, channels)."""
    if isinstance(dataset, Images):
        return dataset.shape
    height, width = dataset.test.images.shape[1:3]
    return height, width, dataset.channels


def on_device(model: TwoHeadModel, device: torch.device) -> TwoHeadModel:
    """Move a model to a device, its weights in the memory order that its network is fastest in."""
    in_order(model.to(device), model.plain)
    return model


def progress_of(config: Config, round_: int) -> float:
    """Say which fraction of training lies before a round (from 1); after the last round, still that of the last."""
    rounds = config.train.schedule_rounds or config.rounds
    return min(round_ - 1, rounds - 1) / rounds


def learning_rate_of(config: Config, round_: int) -> float:
    """Give the schedule's learning rate in a round (from 1); after the last round, still that of the last."""
    train = config.train
    return learning_rate(progress_of(config, round_), lr=train.lr, schedule=train.schedule, end=train.lr_end)


def loss_of(config: Config) -> Callable[..., Tensor]:
    """Give the loss of local training: the paper's, or the function that `train.loss` names.

    Raises:
        UserError: it cannot be imported, or is no function.
    """
    name = config.train.loss
    if not name:
        return multi_task_loss
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:
        raise UserError(f"train.loss={name}: {error} (is its folder in PYTHONPATH?)") from error
    if not callable(found):
        raise UserError(f"train.loss={name} is no function")
    return cast(Callable[..., Tensor], found)


def is_evaluated(config: Config, round_: int) -> bool:
    """Say whether the model is evaluated after a round."""
    return round_ % config.evaluate_every == 0 or round_ == config.rounds


def server_trains_client_head(config: Config) -> bool:
    """Say whether the client head is the server's to train, from statistics of the clients' embeddings."""
    return config.model.client_head and config.train.client_head_by == "server"
