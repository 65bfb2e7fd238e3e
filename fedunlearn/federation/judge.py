"""What the server's held-out images say of a model, and of clients' replies about it."""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from torch import Tensor

from fedunlearn.federation import direction, server_state
from fedunlearn.federation.messages import STATISTICS, Tensors
from fedunlearn.federation.replies import AstrayError, Results
from fedunlearn.federation.round_gate import IMAGES
from fedunlearn.federation.server_data import ServerData
from fedunlearn.federation.server_state import ServerState
from fedunlearn.unlearning import batch_norm
from fedunlearn.unlearning.likeness import unlikeness


class Judge:
    """Looks at states and replies with a model of its own, so that nobody's changes of the server's model are lost.

    Args:
        server: its held-out images, and the model that is copied.
    """

    def __init__(self, server: ServerData) -> None:
        self._server, self._model = server, deepcopy(server.model)

    def loss(self, state: ServerState, update: Mapping[str, Tensor]) -> float:
        """Give the class cross-entropy on some held-out images after an update; infinite where it is not finite."""
        self._model.load_state_dict(server_state.apply_update(state, update).params)
        return self._server.loss(self._model, IMAGES)

    def right_probs(self, state: ServerState) -> tuple[Tensor, Tensor]:
        """Give the probabilities of the right classes of some held-out images, and these classes, [N] each."""
        self._model.load_state_dict(state.params)
        losses, labels = self._server.losses(self._model, direction.IMAGES)
        return (-losses).exp(), labels

    def is_of_use(self, state: ServerState, before: ServerState, budget: float) -> bool:
        """Say whether a model can be learned from: it is better than guessing, and about as good as one before.

        Args:
            budget: by how much less likely the right classes may be than before.
        """
        then, now = (float(self.right_probs(one)[0].mean()) for one in (before, state))
        return now >= then - budget and self.loss(state, {}) < math.log(len(self._server.class_names))

    def check_direction(self, state: ServerState, update: Tensors, class_counts: Tensor) -> None:
        """Raise AstrayError where an update points the wrong way for its client.

        Args:
            class_counts: of the client's images, [K].
        """
        opposite = {name: v if name.endswith(STATISTICS) else -v for name, v in update.items()}
        probs, labels = self.right_probs(server_state.apply_update(state, update))
        of_opposite, _ = self.right_probs(server_state.apply_update(state, opposite))
        direction.check_direction(probs, of_opposite, labels, class_counts.to(labels.device))

    def refusing_unlike_statistics(
        self, state: ServerState, most: float, generator: torch.Generator
    ) -> Callable[[Results], None]:
        """Give what raises AstrayError for BatchNorm statistics that are far from those of held-out images.

        Args:
            most: that they may be apart (`likeness.unlikeness`); 0 lets everything pass.
            generator: draws the images.
        """
        if not most:
            return lambda one: None
        self._model.load_state_dict(state.params)
        images = (images for images, _, _ in self._server.sample(IMAGES, generator))
        precision = self._server.config.train.precision
        expected = batch_norm.batch_statistics(self._model, images, precision=precision)

        def refuse(one: Results) -> None:
            found = unlikeness(one.tensors, expected)
            if found > most:
                how = f"unlike those of held-out images by {found:.3g}, at most {most:g} (statistics_band)"
                raise AstrayError(f"its BatchNorm statistics are {how}")

        return refuse
