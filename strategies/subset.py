"""The project's own strategy: relabel the forget clients' images with what a retrained model is estimated to say."""

import math
from collections.abc import Mapping
from logging import getLogger
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fedunlearn.build import learning_rate_of
from fedunlearn.config import Config
from fedunlearn.config import Settings as CheckedSettings
from fedunlearn.errors import unusable_replies
from fedunlearn.federation import tasks
from fedunlearn.federation.client import Client
from fedunlearn.federation.handle import Federation, ForgetSet, total_counts
from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.server_state import ServerState
from fedunlearn.federation.strategy import Strategy
from fedunlearn.federation.tasks import Update, client_task
from fedunlearn.nn.evaluate import Counts, Predictions
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.nn.rng import generator_of
from fedunlearn.unlearning import null_space
from fedunlearn.unlearning.distill import distill
from fedunlearn.unlearning.soft_labels import assign_soft_labels, augmented_views

MEMORISED = 0.95  # of the loss on held-out images: with less than that, images are memorised

log = getLogger("fedunlearn")


def covariance_triangles(model: TwoHeadResNet18) -> Tensors:
    """Give the shapes of input covariances as they travel."""
    return null_space.upper(null_space.zero_covariances(model))


class SubsetUnlearning(Strategy):
    """theta += sum of (theta_f - theta), then theta += mean of (theta_r - theta), `rounds` times.

    The server estimates what the retrained model would predict on its held-out images. Each forget client f matches
    these predictions to its own images as soft labels. It fine-tunes the model on them, along directions that the
    retain clients' inputs hardly have (`null_space.projectors`), so that their predictions stay almost as they were.
    The retain clients r repair the rest by a little training. Both steps bring back some of what was right before. So
    the next round has as many fewer correct soft labels as the last one left too many.

    D_f ends with the predictions that unseen data would get, no fewer right and no surer, while the loss on D_r stays
    near zero. No gradient is left that would bring the old predictions back when training goes on. In the end the
    client head is trained anew, and the weights that changed most are frozen (`Federation.freeze`): one bit a weight,
    and nothing else is kept.
    """

    label, colour, marker = "relabelling (ours)", "#2a6f97", "o"

    class Settings(CheckedSettings):
        """Settings of relabelling."""

        rounds: int = Field(
            default=2, ge=1, le=10**6, description="of relabelling by the forget clients and repair by the rest"
        )
        epochs: int = Field(default=4, ge=1, le=1000, description="of the forget clients in such a round")
        lr: float = Field(
            default=0.06,
            ge=0,
            le=100,
            description="learning rate of the forget clients, up to twice that while the schedule's has still to fall",
        )
        covariance_fraction: float = Field(
            default=0.05,
            ge=1e-6,
            le=1,
            description="of each retain client's images that input covariances are taken of",
        )
        ridge: float = Field(
            default=0.02,
            ge=1e-9,
            description="damping of the projectors, relative to the mean input variance; smaller spares retain clients",
        )
        repair_fraction: float = Field(
            default=0.3, ge=1e-6, le=1, description="of each retain client's images that it repairs with"
        )
        repair_lr: float = Field(
            default=0.005, ge=0, le=100, description="learning rate of the repair, or the schedule's if that is higher"
        )
        freeze_fraction: float = Field(
            default=0.9,
            ge=0,
            le=1,
            description="of the weights, those that changed most, that hardly move from then on",
        )

    @client_task(sends=covariance_triangles, exact=True)
    @staticmethod
    def input_covariance(client: Client, model: TwoHeadResNet18, settings: Settings) -> Tensors:
        """The covariance of each layer's inputs on a few of its images."""
        sample = client.sample(settings.covariance_fraction, batch_size=client.evaluation_batch)
        images = (images for images, _, _ in sample)
        return null_space.upper(null_space.input_covariances(model, images, precision=client.precision))

    @client_task(kind="train", trains=True)
    @staticmethod
    def relabel(
        client: Client,
        model: TwoHeadResNet18,
        settings: Settings,
        *,
        predictions: Tensor,
        prediction_labels: Tensor,
        correct_fraction: dict[str, float],
        projectors: Tensors,
        lr: float,
        last: bool,
        before: Tensors | None = None,
    ) -> Update:
        """Its model's update after fine-tuning on soft labels for its images, and how many of these it gets right.

        Args:
            predictions: estimated of the retrained model on held-out images, [T, K].
            prediction_labels: classes of these images, [T].
            correct_fraction: by client, how many soft labels are to be correct, relative to held-out images.
            projectors: what layers move along, as triangles.
            before: the model as it was before the request; by default the broadcast one, as in the first round.
            last: whether this is the last round of the request.
        """

        def make_views() -> Tensor:
            model.load_state_dict(client.broadcast() if before is None else before)
            versions = augmented_views(torch.from_numpy(client.images), mirror=client.config.data.mirror)
            return torch.stack([client.predict(model, view.numpy()).class_probs for view in versions]).mean(0)

        views = client.once_a_request("views", make_views, last=last)
        soft_labels = assign_soft_labels(
            views,
            client.labels,
            predictions,
            prediction_labels,
            correct_fraction.get(str(client.id), 1.0),
            generator=generator_of(client.config.seed, client.id),
        ).to(client.device)
        model.load_state_dict(client.broadcast())
        distill(
            model,
            (
                ((images, soft_labels[place]) for images, place in client.own_batches(client.generator(epoch)))
                for epoch in range(settings.epochs)
            ),
            lr=lr,
            momentum=client.config.train.momentum,
            precision=client.precision,
            projectors=null_space.symmetric({name: p.to(client.device) for name, p in projectors.items()}),
        )
        return Update(client.changes(model), 1, client.evaluate(model))

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Relabel the memorised forget clients, in rounds; each corrects what the one before it missed.

        Images that are not memorised are left alone: relabelling would only show them to the model once more.

        Returns:
            `predicted`, the estimated accuracy on all forget clients' images, and `rounds`, how many were made.
        """
        settings, before = self.settings, federation.state
        held_out = federation.predictions()
        estimate, found = federation.estimate_retrained(held_out), federation.evaluate(forget)
        counts = federation.class_counts(forget)
        predicted = {client: estimate.expected_accuracy(counts[client]) for client in forget}
        memorised = [
            client
            for client in forget
            if is_memorised(found[client], predicted[client], held_out.expected_loss(counts[client]))
        ]
        for client in sorted({*forget} - {*memorised}):
            log.info("── client %d is not relabelled: the model has not memorised its images", client)
        rounds, targets = settings.rounds if memorised else 0, predicted
        for number in range(1, rounds + 1):
            log.info("── round %d of %d of relabelling", number, rounds)
            if number > 1:
                federation.recalibrate_batch_norm()
                found = federation.evaluate(memorised)
                targets = {c: corrected(targets[c], predicted[c], found[c].class_accuracy) for c in memorised}
            correct = {str(c): targets[c] / predicted[c] for c in memorised if predicted[c]}
            self.relabel_round(federation, memorised, number, before, estimate, correct)
            self.repair_round(federation, number)
        federation.recalibrate_client_head()
        federation.freeze(since=before, fraction=settings.freeze_fraction)
        return {"predicted": estimate.expected_accuracy(total_counts(counts.values())), "rounds": rounds}

    def relabel_round(
        self,
        federation: Federation,
        memorised: list[int],
        number: int,
        before: ServerState,
        estimate: Predictions,
        correct_fraction: Mapping[str, float],
    ) -> None:
        """Let the clients fine-tune on soft labels, along what the retain clients' inputs hardly have."""
        results = federation.run(
            self.relabel,
            on=memorised,
            at_round=federation.round + number,
            predictions=estimate.class_probs,
            prediction_labels=estimate.class_labels,
            correct_fraction=dict(correct_fraction),
            projectors=self.projectors(federation, number),
            lr=self.relabel_lr(federation.config, federation.round),
            last=number == self.settings.rounds,
            before=before.params if number > 1 else None,
        )
        federation.apply(results.sum())

    def projectors(self, federation: Federation, number: int) -> Tensors:
        """Give projectors from the retain clients' input covariances at the present model, as triangles."""
        results = federation.run(self.input_covariance, on=federation.retain, at_round=federation.round + number)
        means = {name: value.to(federation.server.device) for name, value in results.mean().items()}
        with unusable_replies():
            return null_space.upper(null_space.projectors(null_space.symmetric(means), ridge=self.settings.ridge))

    def repair_round(self, federation: Federation, number: int) -> None:
        """Let the retain clients train on a fraction of their images."""
        results = federation.run(
            tasks.train,
            on=federation.retain,
            at_round=federation.round + number,
            lr=self.repair_lr(federation.config, federation.round),
            fraction=self.settings.repair_fraction,
            embeddings=False,
        )
        federation.apply(results.mean())

    def relabel_lr(self, config: Config, round_: int) -> float:
        """Give `lr`, up to twice of it where the schedule's rate has still to fall by as much.

        What is relabelled gently is lost in rounds of a higher rate.
        """
        now, last = learning_rate_of(config, round_ + 1), learning_rate_of(config, config.rounds)
        return self.settings.lr * (min(2.0, now / last) if last else 1.0)

    def repair_lr(self, config: Config, round_: int) -> float:
        """Give `repair_lr`, or in the middle of training the schedule's present rate, where that is higher."""
        return max(self.settings.repair_lr, learning_rate_of(config, round_ + 1))


def is_memorised(found: Counts, predicted: float, held_out_loss: float) -> bool:
    """Say whether the model knows images better than held-out ones of the same class counts.

    The loss is well below, and the accuracy above the predicted one by more than a standard error of so many images.
    """
    error = math.sqrt(predicted * (1 - predicted) / found.examples)
    return found.mean_loss < MEMORISED * held_out_loss and found.class_accuracy > predicted + error


def corrected(target: float, predicted: float, found: float) -> float:
    """Give the next target accuracy: lower by the last overshoot (integral control), within 0..predicted."""
    return min(max(target + predicted - found, 0.0), predicted)
