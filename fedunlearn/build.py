"""From settings to a data set, the clients' slices of it, and a model."""

import numpy as np
import torch

from fedunlearn import config as configuration
from fedunlearn.data import datasets, partition
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.nn.rng import generator_of


def open_dataset(config: configuration.Config, **options) -> datasets.Dataset:
    """The data set of a configuration."""
    data = config.data
    return datasets.load(
        data.name,
        cache=configuration.state_home(config.home) / "data",
        root=data.root,
        limit=data.limit,
        test_limit=data.test_limit,
        image_size=data.image_size,
        **options,
    )


def slices_of(config: configuration.Config, dataset: datasets.Dataset) -> list[np.ndarray]:
    """Every client's indices into the training images."""
    split = config.partition
    labels = np.asarray(dataset.train.labels)
    return partition.partition(
        split.kind, labels, config.clients, dirichlet_alpha=split.dirichlet_alpha, seed=split.seed
    )


def model_of(config: configuration.Config, dataset: datasets.Dataset, *place: int) -> TwoHeadResNet18:
    """A new model, its weights drawn with the run's seed (and with `place`, for another one than the run's)."""
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_of(config.seed, *place).initial_seed())
        return TwoHeadResNet18(
            len(dataset.class_names),
            config.clients if model.client_head else 0,
            width=model.width,
            head=model.head,
            norm=model.norm,
            channels=dataset.train.images.shape[-1],
        )
