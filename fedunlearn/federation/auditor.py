"""The auditor reads every client's data, which only a simulation can: for scores and reports, never for strategies."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedunlearn.build import Images, fingerprints_of
from fedunlearn.config import Config
from fedunlearn.data.selection import Part
from fedunlearn.federation.client import NO_PARTS, ClientRuntime
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

    def has_images(self, client: int, parts: Mapping[int, Part] = NO_PARTS) -> bool:
        """Whether the client's images are there: those of a forgotten one may be gone."""
        return len(self._runtime.indices(client, parts)) > 0

    def evaluate(self, params: Tensors, client: int, parts: Mapping[int, Part] = NO_PARTS) -> Counts:
        """Count what a model gets right on the images of a client, or of a part of one."""
        model = self._runtime.model
        model.load_state_dict(params)
        return self._runtime.client(client, 0, parts=parts).evaluate(model)

    def class_counts(self, clients: Sequence[int] | None = None, parts: Mapping[int, Part] = NO_PARTS) -> np.ndarray:
        """Count the images of each class that clients have, [C, K].

        Args:
            clients: and parts of clients; by default all clients, without their parts, and then all parts.
            parts: of clients, by number, from C on.
        """
        wanted = [*range(len(self._runtime.slices)), *sorted(parts)] if clients is None else clients
        return np.stack([self._runtime.client(client, 0, parts=parts).class_counts.numpy() for client in wanted])
