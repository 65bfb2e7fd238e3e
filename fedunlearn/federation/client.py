"""A client: one owner's images, on the machine where they are. Only client tasks are given one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedunlearn import build
from fedunlearn.config import Config
from fedunlearn.data.batches import batches, evaluation_batch
from fedunlearn.data.decoded import Split
from fedunlearn.data.selection import Portion, Selection
from fedunlearn.errors import UserError
from fedunlearn.federation.messages import Tensors, floating
from fedunlearn.naming import name_of
from fedunlearn.nn.client_head import embedding_statistics
from fedunlearn.nn.evaluate import Counts, Predictions, evaluate, predict
from fedunlearn.nn.model import Batch, TwoHeadModel
from fedunlearn.nn.precision import autocast
from fedunlearn.nn.rng import generator_of
from fedunlearn.nn.schedule import loss_weights
from fedunlearn.nn.sgd import LocalSGD

NO_PORTIONS: Mapping[int, Portion] = {}


class ClientRuntime:
    """What one process needs to be any of the clients that its node hosts: their images, and a model to work with.

    Args:
        config: settings of the run, as every message carries them.
        here: the clients whose images are on this machine; None for all of them.

    Attributes:
        clients: whom this process can be, by number.
    """

    def __init__(self, config: Config, here: Sequence[int] | None = None) -> None:
        self.config, self._here = config, here or ()
        self.clients = list(range(config.clients)) if here is None else list(here)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dataset = build.open_dataset(config, self._here)
        self.slices = build.slices_of(config, self.dataset)
        self.model = build.on_device(build.model_of(config, self.dataset), self.device)

    @property
    def is_current(self) -> bool:
        """Whether the images are still those of the decoded copy, of which some may have been taken out."""
        return build.open_dataset(self.config, self._here).version == self.dataset.version

    def client(
        self,
        number: int,
        round_: int,
        broadcast: Tensors | None = None,
        *,
        portions: Mapping[int, Portion] = NO_PORTIONS,
    ) -> "Client":
        """Give a client, in a round.

        Args:
            number: of the client, or of a portion of one.
            round_: that its random draws depend on.
            broadcast: tensors of a model that it was sent.
            portions: by number, what was asked to be forgotten of clients; a client has what is left.

        Raises:
            UserError: its images are on another machine.
        """
        owner = portions[number].client if number in portions else number
        if owner not in self.clients:
            raise UserError(f"client {name_of(owner, self.config.partition.names)} is no client of this node")
        return Client(self, number, round_, broadcast or {}, portions)

    def fingerprint(self, number: int) -> str:
        """Compute the SHA-256 of a client's images and labels."""
        return build.fingerprint_of(self.dataset, self.slices, number)

    def indices(self, number: int, portions: Mapping[int, Portion]) -> np.ndarray:
        """Give the indices into the training images of a client, without its portions, or of one of them."""
        portion = portions.get(number)
        owner = portion.client if portion else number
        own, others = self.slices[owner], [p for p in portions.values() if p.client == owner]
        kept = self.selected(owner, portion.selection) if portion else np.ones(len(own), bool)
        for other in others:
            if not portion or other.number < number:
                kept &= ~self.selected(owner, other.selection)
        return own[kept]

    def selected(self, client: int, selection: Selection) -> np.ndarray:
        """Say which of a client's images are selected, bool [N]."""
        own, dataset = self.slices[client], self.dataset
        patients = dataset.patients_of(own) if selection.patients else None
        names = dataset.names_of(own) if selection.examples else []
        return selection.of(dataset.train.labels[own], patients, names)

    @cached_property
    def sgd(self) -> LocalSGD:
        """The optimiser of local training; on a GPU it keeps recorded graphs."""
        settings, head = self.config.train, self.model.client_head
        frozen = head.parameters() if head is not None and build.server_trains_client_head(self.config) else ()
        return LocalSGD(
            self.model,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            precision=settings.precision,
            batch_size=settings.batch_size,
            frozen=frozen,
            function=build.loss_of(self.config),
        )


class Client:
    """One client, in one round, on the machine where its images are.

    Attributes:
        id: the client's number, 0..C-1, or that of a portion of a client.
        round: that its random draws depend on.
        config: settings of the run.
        device: where the model is.
    """

    def __init__(
        self, runtime: ClientRuntime, number: int, round_: int, broadcast: Tensors, portions: Mapping[int, Portion]
    ) -> None:
        self._runtime, self._broadcast, self._portions = runtime, broadcast, portions
        self.id, self.round = number, round_
        self._owner = portions[number].client if number in portions else number
        self.config, self.device = runtime.config, runtime.device

    @property
    def examples(self) -> int:
        """How many images it has."""
        return len(self._own)

    @property
    def images(self) -> np.ndarray:
        """Its images as they are stored, uint8 [N, H, W, channels]."""
        return self._runtime.dataset.train.images[self._own]

    @property
    def labels(self) -> Tensor:
        """The classes of its images, int64 [N]."""
        return torch.from_numpy(np.array(self._runtime.dataset.train.labels[self._own]))

    @property
    def class_counts(self) -> Tensor:
        """How many images of each class it has, int64 [K]."""
        return torch.bincount(self.labels, minlength=len(self._runtime.dataset.class_names))

    def selected_counts(self, selection: Selection) -> Tensor:
        """Count its images of each class that are selected, int64 [K]."""
        of_owner, dataset = self._runtime.slices[self._owner], self._runtime.dataset
        is_meant = np.isin(self._own, of_owner[self._runtime.selected(self._owner, selection)])
        labels = torch.from_numpy(np.array(dataset.train.labels[self._own[is_meant]]))
        return torch.bincount(labels, minlength=len(dataset.class_names))

    @property
    def precision(self) -> str:
        """Of forward and backward passes (`nn.precision`)."""
        return self.config.train.precision

    @property
    def server_trains_client_head(self) -> bool:
        """Whether the client head is the server's to train."""
        return build.server_trains_client_head(self.config)

    def generator(self, *place: int) -> torch.Generator:
        """Give random draws of this client, this round and `place` alone."""
        return generator_of(self.config.seed, self.round, self.id, *place)

    def batches(
        self,
        generator: torch.Generator | None = None,
        *,
        augment: bool = True,
        indices: np.ndarray | None = None,
        batch_size: int = 0,
    ) -> Iterator[Batch]:
        """Give its examples once: shuffled and augmented by a generator, or in order and as they are.

        Args:
            indices: into the training images, in place of all that it has.
            batch_size: as in training by default.
        """
        train = self.config.train
        return batches(
            self._runtime.dataset.train,
            self._own if indices is None else indices,
            self._owner,
            batch_size=batch_size or train.batch_size,
            device=self.device,
            generator=generator,
            crop_padding=train.crop_padding if augment else 0,
            flip=train.flip and augment,
        )

    def epochs(self, count: int, fraction: float = 1.0) -> Iterator[Iterator[Batch]]:
        """Give `count` passes over a random fraction of its examples, each shuffled and augmented anew."""
        chosen = self._random(fraction)
        for epoch in range(count):
            yield self.batches(self.generator(epoch), indices=chosen)

    def sample(self, fraction: float, *, batch_size: int = 0) -> Iterator[Batch]:
        """Give a random fraction of its examples (two at least, where it has them), in order and as they are."""
        return self.batches(indices=self._random(fraction), batch_size=batch_size)

    def shuffled_images(self, fraction: float = 1.0) -> Iterator[Tensor]:
        """Give a random fraction of its images in batches of mixed classes: the stored order is by class."""
        size = self.evaluation_batch
        mixed = self.batches(self.generator(), augment=False, indices=self._random(fraction), batch_size=size)
        return (images for images, _, _ in mixed)

    def own_batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Give its images once, shuffled and as they are, each with its place among `images`."""
        places = Split(self.images, np.arange(self.examples))
        train = self.config.train
        shuffled = batches(
            places, places.labels, self._owner, batch_size=train.batch_size, device=self.device, generator=generator
        )
        return ((images, place) for images, place, _ in shuffled)

    def fit(self, model: TwoHeadModel, *, fraction: float = 1.0, lr: float | None = None) -> Counts:
        """Train the model locally for one round, in place.

        Args:
            model: the one that the task was given.
            fraction: of its examples to train on.
            lr: in place of the schedule's learning rate.

        Raises:
            ValueError: it is another model, which the optimiser does not have.
        """
        if model is not self._runtime.model:
            way_on = "load other weights into that with load_state_dict, or train the other one by a loop over `epochs`"
            raise ValueError(f"client.fit trains the model that the task was given: {way_on}")
        config = self.config
        progress, loss = build.progress_of(config, self.round), config.loss.model_dump()
        warmup = loss.pop("warmup")
        return self._runtime.sgd.fit(
            self.epochs(config.train.epochs, fraction),
            lr=build.learning_rate_of(config, self.round) if lr is None else lr,
            loss=loss_weights(progress, loss, warmup=warmup),
        )

    def evaluate(self, model: TwoHeadModel) -> Counts:
        """Count what the model gets right on its images, as they are."""
        return evaluate(model, self.batches(batch_size=self.evaluation_batch), precision=self.precision)

    def accuracy(self, model: TwoHeadModel) -> float:
        """Give the model's class accuracy on its images, 0..1."""
        return self.evaluate(model).class_accuracy

    def predict(self, model: TwoHeadModel, images: np.ndarray) -> Predictions:
        """Give the model's predictions on versions of its images, uint8 [N, H, W, channels]."""
        data = Split(images, self.labels.numpy())
        everything = batches(
            data, np.arange(len(images)), self._owner, batch_size=self.evaluation_batch, device=self.device
        )
        return predict(model, everything, precision=self.precision)

    @torch.no_grad()
    def embedding_statistics(self, model: TwoHeadModel) -> Tensor:
        """Give `nn.client_head.embedding_statistics` of a random `train.embedding_fraction` of its examples."""
        model.eval()
        classes = len(self._runtime.dataset.class_names)
        total: Tensor | None = None
        fraction = self.config.train.embedding_fraction
        for images, class_labels, _ in self.sample(fraction, batch_size=self.evaluation_batch):
            with autocast(images.device, self.precision):
                outputs = model(images)
            rows = embedding_statistics(outputs.embedding, class_labels, classes)
            total = rows if total is None else total + rows
        if total is None:
            raise ValueError(f"client {self.id} has no example")
        return total

    def broadcast(self) -> Mapping[str, Tensor]:
        """Give the model's state as it was sent."""
        return self._broadcast

    def changes(self, model: TwoHeadModel) -> Tensors:
        """Give how the model differs from the broadcast one: theta_c - theta, everything that is floating-point."""
        return {name: value - self._broadcast[name] for name, value in floating(model.state_dict()).items()}

    @cached_property
    def _own(self) -> np.ndarray:
        return self._runtime.indices(self.id, self._portions)

    @property
    def evaluation_batch(self) -> int:
        """How many images go at once where nothing is learned from them."""
        return evaluation_batch(self.config.train.batch_size, self.device)

    def _random(self, fraction: float) -> np.ndarray:
        order = torch.randperm(self.examples, generator=self.generator()).numpy()
        return self._own[np.sort(order[: max(2, math.ceil(fraction * self.examples))])]  # BatchNorm needs two
