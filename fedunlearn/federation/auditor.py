"""The auditor reads every client's data, which only a simulation can: for scores and reports, never for strategies."""

from collections.abc import Sequence

import numpy as np

from fedunlearn.build import Images, fingerprints_of
from fedunlearn.config import Config
from fedunlearn.federation.client import ClientRuntime
from fedunlearn.federation.messages import Tensors
from fedunlearn.nn.evaluate import Counts


class Auditor:
    """Measures what no server may see: how a model does on the images of forgotten clients.

    Attributes:
        class_names: K names.
        images: what a model has to know of them.
    """

    def __init__(self, config: Config) -> None:
        self._runtime = ClientRuntime(config)
        self.class_names = self._runtime.dataset.class_names
        self.images = Images(self.class_names, self._runtime.dataset.train.images.shape[1:])

    def fingerprints(self) -> dict[str, str]:
        """Compute the SHA-256 of every client's images, and of the held-out ones."""
        return fingerprints_of(self._runtime.dataset, self._runtime.slices)

    def has_images(self, client: int) -> bool:
        """Whether the client's images are there: those of a forgotten one may be gone."""
        return len(self._runtime.slices[client]) > 0

    def evaluate(self, params: Tensors, client: int) -> Counts:
        """Count what a model gets right on the client's images."""
        model = self._runtime.model
        model.load_state_dict(params)
        return self._runtime.client(client, 0).evaluate(model)

    def class_counts(self, clients: Sequence[int] | None = None) -> np.ndarray:
        """Count the images of each class that clients have, [C, K]; of all clients by default."""
        wanted = range(len(self._runtime.slices)) if clients is None else clients
        return np.stack([self._runtime.client(client, 0).class_counts.numpy() for client in wanted])
