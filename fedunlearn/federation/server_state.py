"""What the server keeps between rounds: one frozen value that goes in, and the next one that comes out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedunlearn.errors import DestroyedError
from fedunlearn.federation.messages import Tensors
from fedunlearn.runs.checkpoint import BESIDE
from fedunlearn.unlearning.pruning import PRUNED, PRUNED_CLASSES, pruned, pruned_classes

SOFTENED = "class_head.out."
"""How names of the layer begin that gives class logits."""


@dataclass(frozen=True)
class ServerState:
    """The model after a round, and what the server keeps beside it. Functions of this module give the next one.

    Attributes:
        round: rounds of training that are in it.
        params: everything of the model, by name: parameters, BatchNorm statistics, the mark of pruned neurons.
        momentum: by parameter, while `train.server_momentum` is above 0.
        frozen: by parameter, true for weights that rounds of training move less, in the end not at all.
        predictions: by round (its number, as text), class probabilities on the held-out images, [N, K] in half
            precision, since the last request.
    """

    round: int
    params: Tensors
    momentum: Tensors = field(default_factory=dict)
    frozen: Tensors = field(default_factory=dict)
    predictions: Tensors = field(default_factory=dict)

    def tensors(self) -> Tensors:
        """Give everything under the names that it has in a checkpoint."""
        beside = {
            f"{prefix}{name}": value for kind, prefix in BESIDE.items() for name, value in getattr(self, kind).items()
        }
        return self.params | beside

    @classmethod
    def from_tensors(cls, round_: int, tensors: Mapping[str, Tensor]) -> "ServerState":
        """Read what `tensors` gave."""
        beside = {
            kind: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for kind, prefix in BESIDE.items()
        }
        params = {name: value for name, value in tensors.items() if not name.startswith(tuple(BESIDE.values()))}
        return cls(round_, params, **beside)

    @property
    def stored_bytes(self) -> int:
        """Bytes that are kept for requests to come, beside the model: predictions on held-out images."""
        return sum(value.nbytes for value in self.predictions.values())


def check_finite(state: ServerState) -> None:
    """Raise DestroyedError where a value of the model is NaN or infinite."""
    for name, value in state.params.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DestroyedError(f"{name} of the new model is not finite")


def apply_update(state: ServerState, update: Mapping[str, Tensor]) -> ServerState:
    """Give theta + update, frozen or not; names that `update` lacks stay as they are."""
    params = state.params | {name: _moved(state.params[name], by) for name, by in update.items()}
    return replace(state, params=params)


def apply_round(
    state: ServerState, update: Mapping[str, Tensor], *, parameters: Iterable[str], beta: float, frozen_lr_scale: float
) -> ServerState:
    """Give theta + m, m = beta m + update: what a round of training does.

    beta is `train.server_momentum` (Hsu et al., 2019, "Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification"); statistics of BatchNorm have no momentum. Frozen weights move by
    `frozen_lr_scale` times the update.

    Args:
        update: the mean of theta_c - theta over the clients' examples.
        parameters: names of what has momentum.
    """
    moved = {name: by.to(state.params[name].device) for name, by in update.items()}
    for name, mask in state.frozen.items():
        moved[name] = torch.where(mask, frozen_lr_scale * moved[name], moved[name])
    momentum = dict(state.momentum)
    for name in parameters if beta else ():
        moved[name] = moved[name] + beta * momentum.get(name, 0)
        momentum[name] = moved[name]
    return replace(apply_update(state, moved), momentum=momentum)


@torch.no_grad()
def freeze(state: ServerState, before: Mapping[str, Tensor], fraction: float, parameters: Iterable[str]) -> ServerState:
    """Freeze that fraction of the weights that changed most since `before`, by the measure of their layer.

    The measure is |change| / root mean square of the layer's changes. Weights that tie with the last one stay free;
    those frozen before stay frozen.
    """
    if not fraction:
        return state
    changes = {name: (state.params[name] - before[name]).abs() for name in parameters}
    relative = {name: c / c.square().mean().sqrt().clamp(min=1e-12) for name, c in changes.items()}
    everything = torch.cat([value.flatten() for value in relative.values()])
    count = round((1 - fraction) * len(everything))
    least = everything.kthvalue(count).values if count else -1.0
    frozen = {name: (value > least) | state.frozen.get(name, False) for name, value in relative.items()}
    return replace(state, frozen=frozen)


def softened(state: ServerState, temperature: float) -> ServerState:
    """Divide class logits by a temperature, in the last layer of the class head.

    A model that has memorised its images is nearly sure of every class, and its gradients vanish. At T > 1 they do not.
    """
    last = [name for name in state.params if name.startswith(SOFTENED)]
    return replace(state, params=state.params | {name: state.params[name] / temperature for name in last})


def remember(state: ServerState, class_probs: Tensor) -> ServerState:
    """Keep the predictions on the held-out images after this round."""
    return replace(state, predictions=state.predictions | {str(state.round): class_probs.half()})


def of_held_out(state: ServerState, examples: int) -> ServerState:
    """Keep predictions on as many held-out images as there are: of those before, some have left with their client."""
    kept = {round_: probs for round_, probs in state.predictions.items() if len(probs) == examples}
    return replace(state, predictions=kept)


def after_request(state: ServerState, clients: Iterable[int], classes: Iterable[int] = ()) -> ServerState:
    """Prune the neurons of forgotten clients and classes, and keep nothing of the rounds before but what is frozen.

    Momentum is a sum of past updates, theirs too, and models that knew them made the predictions.
    """
    params = pruned_classes(pruned(state.params, clients), classes)
    return replace(state, params=params, momentum={}, predictions={})


def begin_anew(state: ServerState, initial: Mapping[str, Tensor], clients: Iterable[int]) -> ServerState:
    """Go back to initial weights with nothing beside them, and prune whoever was forgotten or is now."""
    gone, classes = (state.params[mark].nonzero()[:, 0].tolist() for mark in (PRUNED, PRUNED_CLASSES))
    params = {name: value.clone() for name, value in initial.items()}
    return ServerState(state.round, pruned_classes(pruned(params, [*gone, *clients]), classes))


def _moved(theta: Tensor, by: Tensor) -> Tensor:
    return torch.empty_like(theta).copy_(theta + by.to(theta.device))
