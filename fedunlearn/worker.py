"""The data, the clients and the model of one configuration, in one process."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from fedunlearn import config as configuration
from fedunlearn import datasets, partition
from fedunlearn.batches import batches
from fedunlearn.evaluate import Counts, evaluate
from fedunlearn.model import Batch, TwoHeadResNet18
from fedunlearn.train import generator_of

NOBODY = -1


class Worker:
    """The data, the clients' slices and the model of one configuration, resident in this process."""

    def __init__(self, config: configuration.Config) -> None:
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dataset = open_dataset(config)
        self.slices = slices_of(config, self.dataset)
        self.model = model_of(config, self.dataset).to(self.device, memory_format=torch.channels_last)

    def batches(
        self,
        client: int,
        generator: torch.Generator | None = None,
        *,
        augment: bool = True,
        indices: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """The client's examples, or those at `indices`: shuffled and augmented with a generator, else as stored."""
        train = self.config.train
        return batches(
            self.dataset.train,
            self.slices[client] if indices is None else indices,
            client,
            batch_size=train.batch_size,
            device=self.device,
            generator=generator,
            crop_padding=train.crop_padding if augment else 0,
            flip=train.flip and augment,
        )

    def shuffled_images(self, client: int, round_: int) -> Iterator[torch.Tensor]:
        """The client's images once, as they are, in batches of mixed classes: stored order is by class."""
        generator = generator_of(self.config.seed, round_, client)
        return (images for images, _, _ in self.batches(client, generator, augment=False))

    def sample(self, client: int, share: float, round_: int) -> Iterator[Batch]:
        """A random share of the client's examples (at least one), in order and as they are."""
        own = self.slices[client]
        order = torch.randperm(len(own), generator=generator_of(self.config.seed, round_, client)).numpy()
        return self.batches(client, indices=own[np.sort(order[: math.ceil(share * len(own))])])

    def examples(self, client: int) -> int:
        """How many examples the client has."""
        return len(self.slices[client])

    def evaluate(self, client: int) -> Counts:
        """What the model gets right on the client's images, as they are."""
        return evaluate(self.model, self.batches(client), precision=self.config.train.precision)

    def evaluate_test(self) -> Counts:
        """What the model gets right on the test images, which are no client's."""
        test = self.dataset.test
        everything = batches(
            test, np.arange(len(test.labels)), NOBODY, batch_size=self.config.train.batch_size, device=self.device
        )
        return evaluate(self.model, everything, precision=self.config.train.precision)


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


def model_of(config: configuration.Config, dataset: datasets.Dataset) -> TwoHeadResNet18:
    """A new model, its weights drawn with the run's seed."""
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_of(config.seed).initial_seed())
        return TwoHeadResNet18(
            len(dataset.class_names),
            config.clients if model.client_head else 0,
            width=model.width,
            head=model.head,
            norm=model.norm,
            channels=dataset.train.images.shape[-1],
        )
