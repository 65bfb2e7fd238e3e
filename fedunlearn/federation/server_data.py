"""What the server has: held-out images that are no client's, class names, and a model to work with."""

import math
from collections.abc import Collection, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedunlearn import build
from fedunlearn.config import OURS, Config
from fedunlearn.data.batches import batches, evaluation_batch
from fedunlearn.data.decoded import Split
from fedunlearn.errors import UserError
from fedunlearn.nn.evaluate import Predictions, predict
from fedunlearn.nn.hooks import kept_modes, train_batch_norms
from fedunlearn.nn.losses import check_loss
from fedunlearn.nn.model import Batch, TwoHeadModel
from fedunlearn.nn.networks import SHORT
from fedunlearn.nn.precision import at_least_fp32, autocast
from fedunlearn.nn.rng import drawing_from, generator_of
from fedunlearn.nn.schedule import loss_weights

NOBODY = -1
TRIED = 64
"""Held-out images that a loss is tried on, at most."""


class ServerData:
    """The server's held-out images (the test images of the data set) and its model; nothing of any client.

    Attributes:
        device: where the model is.
        model: the one that tensors of a state are loaded into.
        class_names: K names.
        pixels: of an image.
        forget_classes: classes that a request takes along: `losses` does without them already.
        left: classes of which nobody has an image any more; nor are there held-out images of them here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dataset = build.open_dataset(config)
        self._held_out, self._make = dataset.test, lambda *place: build.model_of(config, dataset, *place)
        self.class_names = dataset.class_names
        self.forget_classes: frozenset[int] = frozenset()
        self.left: frozenset[int] = frozenset()
        self.pixels = int(np.prod(dataset.test.images.shape[1:3]))
        self.model = build.on_device(self.new_model(), self.device)

    @property
    def examples(self) -> int:
        """Count the held-out images."""
        return len(self._held_out.labels)

    def new_model(self, *place: int) -> TwoHeadModel:
        """Make the run's untrained model, or at another `place` of random draws another one."""
        return self._make(*place)

    def try_loss(self) -> None:
        """Try a loss of somebody's own once, on held-out images as those of one client; the paper's is passed over.

        Raises:
            UserError: no model can be trained on it.
        """
        config = self.config
        if not config.train.loss:
            return
        function, weights = build.loss_of(config), config.loss.model_dump()
        warmup, params = weights.pop("warmup"), [p for p in self.model.parameters() if p.requires_grad]
        images, classes, _ = next(self.sample(min(TRIED, config.train.batch_size), torch.Generator()))
        with kept_modes(self.model), drawing_from(generator_of(config.seed)):
            self.model.eval()
            with autocast(self.device, config.train.precision):
                outputs = self.model(images)
            for progress in (0.0, 1.0):
                chosen = loss_weights(progress, weights, warmup=warmup)
                try:
                    check_loss(function, outputs, classes, torch.zeros_like(classes), params=params, weights=chosen)
                except UserError as error:
                    raise UserError(f"train.loss={config.train.loss}: {error}") from error

    def leave_out(self, classes: Collection[int]) -> None:
        """Do without the held-out images of classes from now on."""
        self.left = self.left.union(classes)
        self._held_out = without_classes(self._held_out, classes)

    def predict(self, model: TwoHeadModel) -> Predictions:
        """Give the model's predictions on the held-out images."""
        train, data = self.config.train, self._held_out
        size = evaluation_batch(train.batch_size, self.device)
        everything = batches(data, np.arange(len(data.labels)), NOBODY, batch_size=size, device=self.device)
        return predict(model, everything, precision=train.precision)

    def losses(self, model: TwoHeadModel, images: int) -> tuple[Tensor, Tensor]:
        """Give a model's class cross-entropy on so many held-out images, and their labels, [n] each; always the same.

        BatchNorm has the statistics of these images, or the model's own where the run keeps averages of the clients'
        running statistics. The model's running statistics are changed.
        """
        model.eval()
        if self.config.batch_norm_fraction:
            train_batch_norms(model)
        losses, classes = [], []
        with torch.no_grad(), autocast(self.device, self.config.train.precision):
            generator = torch.Generator().manual_seed(self.config.seed)
            for pictures, labels, _ in self._sample(
                without_classes(self._held_out, self.forget_classes), max(2, images), generator
            ):
                logits = at_least_fp32(model(pictures).class_logits)
                losses.append(functional.cross_entropy(logits, labels, reduction="none"))
                classes.append(labels)
        model.eval()
        return torch.cat(losses), torch.cat(classes)

    def loss(self, model: TwoHeadModel, images: int) -> float:
        """Give the mean of `losses`. What is not finite is infinite."""
        found = float(self.losses(model, images)[0].mean())
        return found if math.isfinite(found) else math.inf

    def sample(self, count: int, generator: torch.Generator) -> Iterator[Batch]:
        """Give so many held-out images at random, or all where there are fewer, in batches on the server's device."""
        return self._sample(self._held_out, count, generator)

    def _sample(self, data: Split, count: int, generator: torch.Generator) -> Iterator[Batch]:
        chosen = torch.randperm(len(data.labels), generator=generator)[:count].numpy()
        return batches(data, chosen, NOBODY, batch_size=self.config.train.batch_size, device=self.device)


def check_own_code(config: Config) -> None:
    """Raise UserError where a run has a network or a loss of somebody's own with which no model can be trained."""
    if config.train.loss or config.model.name not in (*OURS, *SHORT):
        ServerData(config).try_loss()


def known_to_server(config: Config) -> tuple[dict[str, str], build.Images]:
    """Give what a server knows of images when a run starts where every machine has its own.

    Returns:
        SHA-256 of the held-out images, and of each client's nothing yet; and what the model has to know of images.
    """
    dataset = build.open_dataset(config)
    return build.fingerprints_of(dataset, []), build.Images(dataset.class_names, dataset.train.images.shape[1:])


def without_classes(data: Split, classes: Collection[int]) -> Split:
    """Give the images that are of none of some classes."""
    if not classes:
        return data
    kept = ~np.isin(data.labels, list(classes))
    return Split(data.images[kept], data.labels[kept])
