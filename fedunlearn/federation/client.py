"""The data, the clients and the model of one configuration, in one process."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import product

import numpy as np
import torch

from fedunlearn import config as configuration
from fedunlearn.build import model_of, open_dataset, slices_of
from fedunlearn.data.batches import batches, shifted
from fedunlearn.data.datasets import Split
from fedunlearn.nn.client_head import embedding_moments
from fedunlearn.nn.evaluate import Counts, Predictions, evaluate, predict
from fedunlearn.nn.model import Batch
from fedunlearn.nn.precision import autocast
from fedunlearn.nn.rng import generator_of
from fedunlearn.nn.schedule import learning_rate, loss_weights
from fedunlearn.nn.sgd import LocalSGD
from fedunlearn.unlearning.ascent import ascend
from fedunlearn.unlearning.distill import teach
from fedunlearn.unlearning.null_space import input_products
from fedunlearn.unlearning.soft_labels import match_answers

NOBODY = -1
SHIFTS = ((-1, 0), (1, 0), (0, -1), (0, 1))
ANSWERED_AT_ONCE = 500  # by a GPU


class Worker:
    """The data, the clients' slices and the model of one configuration, resident in this process."""

    def __init__(self, config: configuration.Config) -> None:
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dataset = open_dataset(config)
        self.slices = slices_of(config, self.dataset)
        self.model = model_of(config, self.dataset).to(self.device, memory_format=torch.channels_last)
        self.drop_views()

    def batches(
        self,
        client: int,
        generator: torch.Generator | None = None,
        *,
        augment: bool = True,
        indices: np.ndarray | None = None,
        data: Split | None = None,
        batch_size: int = 0,
    ) -> Iterator[Batch]:
        """The client's examples, those at `indices` or `data`: shuffled and augmented by a generator, or in order; in
        batches as for training by default."""
        train = self.config.train
        if data is not None:
            indices = np.arange(len(data.labels))
        return batches(
            data or self.dataset.train,
            self.slices[client] if indices is None else indices,
            client,
            batch_size=batch_size or train.batch_size,
            device=self.device,
            generator=generator,
            crop_padding=train.crop_padding if augment else 0,
            flip=train.flip and augment,
        )

    @property
    def answering_batch(self) -> int:
        """Images at once where nothing is learned from them, so that it matters for speed alone: on a GPU many."""
        size = self.config.train.batch_size
        return max(size, ANSWERED_AT_ONCE) if self.device.type == "cuda" else size

    def shuffled_images(self, client: int, round_: int, share: float = 1.0) -> Iterator[torch.Tensor]:
        """A random share of the client's images, as they are, in batches of mixed classes: stored order is by class."""
        generator, own = generator_of(self.config.seed, round_, client), self._share(client, share, round_)
        shuffled = self.batches(client, generator, augment=False, indices=own, batch_size=self.answering_batch)
        return (images for images, _, _ in shuffled)

    def sample(self, client: int, share: float, round_: int, *, batch_size: int = 0) -> Iterator[Batch]:
        """A random share of the client's examples (two at least, where it has them), in order and as they are."""
        return self.batches(client, indices=self._share(client, share, round_), batch_size=batch_size)

    def _share(self, client: int, share: float, round_: int) -> np.ndarray:
        own = self.slices[client]
        order = torch.randperm(len(own), generator=generator_of(self.config.seed, round_, client)).numpy()
        return own[np.sort(order[: max(2, math.ceil(share * len(own)))])]  # BatchNorm needs two

    def fit(self, client: int, round_: int, *, share: float = 1.0, lr: float = -1.0) -> Counts:
        """The client's local training of a round, in place; a rate of `lr` below 0 is the schedule's."""
        loss = self.config.loss
        weights = {name: value for name, _, value in configuration.settings(loss) if name != "warmup"}
        return self._sgd.fit(
            self._epochs(client, round_, self.config.train.epochs, share),
            lr=self.learning_rate(round_) if lr < 0 else lr,
            loss=loss_weights(self._progress(round_), weights, warmup=loss.warmup),
        )

    @cached_property
    def _sgd(self) -> LocalSGD:
        settings = self.config.train
        return LocalSGD(
            self.model,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            precision=settings.precision,
            batch_size=settings.batch_size,
            frozen=self.model.client_head.parameters() if self.server_trains_head else (),
        )

    def learning_rate(self, round_: int) -> float:
        """The schedule's in a round (from 1); after the last round, still that of the last."""
        train = self.config.train
        return learning_rate(self._progress(round_), lr=train.lr, schedule=train.schedule, end=train.lr_end)

    def _progress(self, round_: int) -> float:
        return min(round_ - 1, self.config.rounds - 1) / self.config.rounds

    @torch.no_grad()
    def embedding_moments(self, client: int, round_: int) -> torch.Tensor:
        """`client_head.embedding_moments` of the model for the share `train.head_share` of the client's examples."""
        self.model.eval()
        total = torch.zeros(self.moments_shape, device=self.device)
        share = self.config.train.head_share
        for images, class_labels, _ in self.sample(client, share, round_, batch_size=self.answering_batch):
            with autocast(images.device, self.config.train.precision):
                outputs = self.model(images)
            total += embedding_moments(outputs.embedding, class_labels, len(total))
        return total

    @property
    def moments_shape(self) -> tuple[int, ...]:
        """Of `embedding_moments` of this model; () where nobody wants them."""
        if not self.server_trains_head:
            return ()
        return len(self.dataset.class_names), 1 + 2 * self.model.client_head.hidden.in_features

    @property
    def server_trains_head(self) -> bool:
        """Whether the client head is the server's to train."""
        return self.model.client_head is not None and self.config.train.client_head == "server"

    def input_products(self, client: int, round_: int) -> dict[str, torch.Tensor]:
        """`null_space.input_products` of the model for the share `unlearn.input_share` of the client's examples."""
        share = self.config.unlearn.input_share
        sample = self.sample(client, share, round_, batch_size=self.answering_batch)
        return input_products(self.model, (i for i, _, _ in sample), precision=self.config.train.precision)

    def unlearn(
        self,
        client: int,
        round_: int,
        *,
        state: dict[str, torch.Tensor],
        teacher: dict[str, torch.Tensor],
        projectors: dict[str, torch.Tensor],
        lr: float,
    ) -> Counts:
        """Teach the model of `state` to say of the client's images what is said of unseen ones, in place.

        Args:
            teacher: the model before it forgets, `answers` [T, K] and `answer_labels` [T] of unseen images, and
                `answer_shares` [C], how many times as often as they are right the client is to be (`match_answers`).
            projectors: what layers move along (`null_space.projectors`).
        """
        settings, own = self.config.unlearn, self.slices[client]
        wanted = self._wanted(client, teacher).to(self.device)
        self.model.load_state_dict(state)
        images = Split(self.dataset.train.images[own], np.arange(len(own)))  # positions in place of labels

        def epoch(number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            order = generator_of(self.config.seed, round_, client, number)
            for batch, positions, _ in self.batches(client, order, augment=False, data=images):
                yield batch, wanted[positions]

        precision, momentum = self.config.train.precision, self.config.train.momentum
        epochs = map(epoch, range(settings.forget_epochs))
        teach(self.model, epochs, lr=lr, momentum=momentum, precision=precision, projectors=projectors)
        return self.evaluate(client)

    def _wanted(self, client: int, teacher: dict[str, torch.Tensor]) -> torch.Tensor:
        """What to say of each of the client's images, in every round of a request as nearly the same as the share that
        is to be right allows. Views of the images are kept for further rounds of the same request."""
        before = {name: value for name, value in teacher.items() if not name.startswith("answer")}
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in before.values())).digest()
        if self._viewed_by != digest:
            self._views, self._viewed_by = {}, digest
        if client not in self._views:
            self.model.load_state_dict(before)
            self._views[client] = self.views(client)
        own = torch.from_numpy(np.array(self.dataset.train.labels[self.slices[client]]))
        answers, labels, share = teacher["answers"], teacher["answer_labels"], float(teacher["answer_shares"][client])
        draws = generator_of(self.config.seed, client)
        return match_answers(self._views[client], own, answers, labels, share, generator=draws)

    def drop_views(self) -> None:
        """Keep nothing of what the model said of clients' images."""
        self._views: dict[int, torch.Tensor] = {}
        self._viewed_by = b""

    def views(self, client: int) -> torch.Tensor:
        """Mean class probabilities over versions of the client's images, [N, K]: shifted up, down, left and right by a
        sixteenth of their size, mirrored (`unlearn.flip`) and not."""
        data, own = self.dataset.train, self.slices[client]
        images, by = torch.from_numpy(data.images[own]), max(1, data.images.shape[1] // 16)
        versions = list(product(SHIFTS, (0, 1) if self.config.unlearn.flip else (0,)))
        said = [
            self.predict(Split(shifted(images, by * down, by * right, mirrored).numpy(), data.labels[own])).class_probs
            for (down, right), mirrored in versions
        ]
        return torch.stack(said).mean(0)

    def ascend(self, client: int, round_: int, *, until: float, radius: float) -> Counts:
        """The client's ascent of its class loss, in place (`train.ascend`)."""
        settings = self.config.unlearn
        return ascend(
            self.model,
            self._epochs(client, round_, settings.ascent_epochs),
            lr=settings.ascent_lr,
            clip=settings.clip,
            radius=radius,
            precision=self.config.train.precision,
            finished=lambda: self.evaluate(client).class_accuracy <= until,
        )

    def _epochs(self, client: int, round_: int, epochs: int, share: float = 1.0) -> Iterator[Iterator[Batch]]:
        own = self._share(client, share, round_)
        for epoch in range(epochs):
            yield self.batches(client, generator_of(self.config.seed, round_, client, epoch), indices=own)

    def examples(self, client: int) -> int:
        """How many examples the client has."""
        return len(self.slices[client])

    def evaluate(self, client: int) -> Counts:
        """What the model gets right on the client's images, as they are."""
        everything = self.batches(client, batch_size=self.answering_batch)
        return evaluate(self.model, everything, precision=self.config.train.precision)

    def predict_test(self) -> Predictions:
        """What the model says of the test images, which are no client's."""
        return self.predict(self.dataset.test)

    def predict(self, images: Split) -> Predictions:
        """What the model says of images that are no client's."""
        everything = self.batches(NOBODY, data=images, batch_size=self.answering_batch)
        return predict(self.model, everything, precision=self.config.train.precision)

    def class_mix(self, clients: Iterable[int]) -> torch.Tensor:
        """How many examples of each class these clients have together, [K]."""
        labels = np.concatenate([self.dataset.train.labels[self.slices[client]] for client in clients])
        return torch.from_numpy(np.bincount(labels, minlength=len(self.dataset.class_names)))
