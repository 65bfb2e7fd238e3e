"""All clients' examples in one place, on one device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedunlearn.data.batches import cuts, scale
from fedunlearn.data.decoded import Split
from fedunlearn.data.store import Dataset
from fedunlearn.nn.evaluate import Counts, Predictions, evaluate, predict
from fedunlearn.nn.model import Batch, TwoHeadModel

NOBODY = -1
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Examples:
    """Images [N, H, W, channels] uint8, class labels [N] and client ids [N], int64, on one device."""

    images: Tensor
    labels: Tensor
    clients: Tensor

    @classmethod
    def of(cls, split: Split, clients: np.ndarray, device: torch.device) -> "Examples":
        """Put the examples of a data set's split on a device, and whose they are."""
        arrays = np.array(split.images), np.array(split.labels), clients
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def batches(self, indices: Tensor, batch_size: int = EVALUATION_BATCH) -> Iterator[Batch]:
        """Give the examples at `indices`, in order and as they are: images [N, channels, H, W] in -1..1."""
        for chosen in indices.tensor_split(cuts(len(indices), batch_size)):
            yield scale(self.images[chosen]), self.labels[chosen], self.clients[chosen]

    def all(self) -> Tensor:
        """Give every index."""
        return torch.arange(len(self.labels), device=self.labels.device)


@dataclass(frozen=True)
class Pool:
    """The clients' examples, which the paper trains on together, and the test set, which is nobody's."""

    train: Examples
    test: Examples
    num_clients: int

    @classmethod
    def of(cls, dataset: Dataset, slices: Sequence[np.ndarray], device: torch.device) -> "Pool":
        """Put a data set on a device.

        Args:
            slices: every client's indices into the training images.
        """
        owner = np.full(len(dataset.train.labels), NOBODY)
        for client, owned in enumerate(slices):
            owner[owned] = client
        nobody = np.full(len(dataset.test.labels), NOBODY)
        train, test = Examples.of(dataset.train, owner, device), Examples.of(dataset.test, nobody, device)
        return cls(train, test, len(slices))

    def of_clients(self, clients: Sequence[int]) -> Tensor:
        """Give the indices of the clients' training examples: D_f, where they are the forget clients."""
        return torch.isin(self.train.clients, torch.tensor(clients, device=self.train.clients.device)).nonzero()[:, 0]

    def without(self, clients: Sequence[int]) -> Tensor:
        """Give the indices of all other clients' training examples: D_r, where these are the forget clients."""
        return self.of_clients([client for client in range(self.num_clients) if client not in clients])

    def predict(self, model: TwoHeadModel, indices: Tensor, precision: str) -> Predictions:
        """Give the model's predictions on the training examples at `indices`."""
        return predict(model, self.train.batches(indices), precision=precision)

    def count_test(self, model: TwoHeadModel, precision: str, indices: Tensor | None = None) -> Counts:
        """Count what the model gets right on the test set, or on the test examples at `indices`."""
        indices = self.test.all() if indices is None else indices
        return evaluate(model, self.test.batches(indices), precision=precision)
