"""The auditor reads every client's data, which only a simulation can: for scores and reports, never for strategies."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedunlearn.build import Images, fingerprints_of
from fedunlearn.config import Config
from fedunlearn.data.batches import batches, evaluation_batch
from fedunlearn.data.selection import Portion
from fedunlearn.errors import UserError
from fedunlearn.federation.client import NO_PORTIONS, ClientRuntime
from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.server_data import NOBODY
from fedunlearn.nn.evaluate import Counts, Predictions, predict


def auditor_of(config: Config) -> "Auditor | None":
    """Give the auditor that a simulation has; where every machine has its own images there is none."""
    return None if config.partition.is_on_nodes else Auditor(config)


def needed_auditor(config: Config) -> "Auditor":
    """Give the auditor of a simulation.

    Raises:
        UserError: there is none.
    """
    if auditor := auditor_of(config):
        return auditor
    raise UserError("only a simulation can measure that: here every client's images are on a machine of its own")


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

    def say_removed(self) -> None:
        """Warn where images of forgotten clients are gone, which nobody can measure."""
        self._runtime.dataset.say_removed()

    def fingerprints(self) -> dict[str, str]:
        """Compute the SHA-256 of every client's images, and of the held-out ones."""
        return fingerprints_of(self._runtime.dataset, self._runtime.slices)

    def examples(self, portions: Mapping[int, Portion] = NO_PORTIONS) -> dict[int, int]:
        """Count the training images of every client that are in none of the portions."""
        return {client: len(self._runtime.indices(client, portions)) for client in range(len(self._runtime.slices))}

    def has_images(self, client: int, portions: Mapping[int, Portion] = NO_PORTIONS) -> bool:
        """Whether the client's images are there: those of a forgotten one may be gone."""
        return len(self._runtime.indices(client, portions)) > 0

    def selected(self, portion: Portion, portions: Mapping[int, Portion] = NO_PORTIONS) -> int:
        """Count the training images that a new portion of a client would have beside others."""
        client = self._runtime.client(portion.client, 0, portions=portions)
        return int(client.selected_counts(portion.selection).sum())

    def evaluate(self, params: Tensors, client: int, portions: Mapping[int, Portion] = NO_PORTIONS) -> Counts:
        """Count what a model gets right on the images of a client, or of a portion of one."""
        model = self._runtime.model
        model.load_state_dict(params)
        return self._runtime.client(client, 0, portions=portions).evaluate(model)

    def predictions(
        self, params: Tensors, clients: Sequence[int], *, most: int, portions: Mapping[int, Portion] = NO_PORTIONS
    ) -> Predictions:
        """Give a model's predictions on the images of clients, and of portions of some.

        They are on all images, or on `most` at random, always the same.
        """
        runtime = self._runtime
        runtime.model.load_state_dict(params)
        places = np.concatenate([runtime.indices(client, portions) for client in clients])
        chosen = np.sort(np.random.default_rng(0).permutation(places)[:most])
        size = evaluation_batch(runtime.config.train.batch_size, runtime.device)
        images = batches(runtime.dataset.train, chosen, NOBODY, batch_size=size, device=runtime.device)
        return predict(runtime.model, images, precision=runtime.config.train.precision)

    def class_counts(
        self, clients: Sequence[int] | None = None, portions: Mapping[int, Portion] = NO_PORTIONS
    ) -> np.ndarray:
        """Count the images of each class that clients have, [C, K].

        Args:
            clients: and portions of clients; by default all clients, without their portions, and then all portions, so
                that each is in the row of its number. A number that no portion has, as of a request that was refused,
                has no images.
            portions: of clients, by number, from C on.
        """
        known = len(self._runtime.slices)
        wanted = range(max([known - 1, *portions]) + 1) if clients is None else clients
        none = np.zeros(len(self._runtime.dataset.class_names), np.int64)
        return np.stack(
            [
                self._runtime.client(client, 0, portions=portions).class_counts.numpy()
                if client < known or client in portions
                else none
                for client in wanted
            ]
        )
