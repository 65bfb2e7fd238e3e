"""Relabelling: fine-tune on the forget clients' images with what a retrained model is estimated to predict."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any, Literal

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
from fedunlearn.unlearning import kronecker
from fedunlearn.unlearning.distill import distill
from fedunlearn.unlearning.fisher import diagonal_fisher
from fedunlearn.unlearning.soft_labels import assign_soft_labels, augmented_views

MOST_HALVINGS = 5  # of a learning rate at which relabelling diverges
KNOWN = 0.95  # of the loss that the retrained model is estimated to have: with less, images are known better

log = getLogger("fedunlearn")


@dataclass(frozen=True)
class Goal:
    """Says what the forget clients' images should look like to the model in the end.

    Attributes:
        estimate: predictions of the retrained model on the server's held-out images, estimated.
        accuracy: of the retrained model on each forget client's images, estimated.
        known: the forget clients whose images the present model knows better than the retrained one would.
        total: the estimated accuracy on all forget clients' images together.
    """

    estimate: Predictions
    accuracy: Mapping[int, float]
    known: list[int]
    total: float


def input_triangles(model: TwoHeadResNet18) -> Tensors:
    """Give the shapes of input covariances as they travel."""
    return kronecker.upper(kronecker.zero_input_covariances(model))


def factor_triangles(model: TwoHeadResNet18) -> Tensors:
    """Give the shapes of Kronecker factors as they travel."""
    return kronecker.upper(kronecker.zero_factors(model))


class GuidedSettings(CheckedSettings):
    """Settings of what guides a relabelling, and of what follows it."""

    guide: Literal["inputs", "kronecker", "diagonal"] = Field(
        default="inputs",
        description="what of the retain clients' Fisher guides the steps: the Kronecker factor of the layers' "
        "inputs, both Kronecker factors, or the diagonal",
    )
    guide_fraction: float = Field(
        default=0.05, ge=1e-6, le=1, description="of each retain client's images that the guide is taken of"
    )
    temperature: float = Field(
        default=4.0, ge=1e-3, le=1e6, description="that class logits are divided by where a guide needs gradients"
    )
    ridge: float = Field(
        default=0.02,
        ge=1e-9,
        description="damping, relative to the mean of the inputs' factor, or of the diagonal; smaller spares "
        "retain clients",
    )
    output_ridge: float = Field(
        default=0.3, ge=1e-9, description="the same, relative to the mean of the outputs' factor"
    )
    repair_fraction: float = Field(
        default=0.3, ge=1e-6, le=1, description="of each retain client's images that it repairs with"
    )
    repair_lr: float = Field(
        default=0.005, ge=0, le=100, description="learning rate of the repair, or the schedule's if that is higher"
    )
    freeze_fraction: float = Field(
        default=0.9, ge=0, le=1, description="of the weights, those that changed most, that hardly move from then on"
    )


class KroneckerSettings(GuidedSettings):
    """The same, with both Kronecker factors by default."""

    guide: Literal["inputs", "kronecker", "diagonal"] = Field(
        default="kronecker", description=GuidedSettings.model_fields["guide"].description
    )
    guide_fraction: float = Field(
        default=0.1, ge=1e-6, le=1, description=GuidedSettings.model_fields["guide_fraction"].description
    )


class Guided(Strategy):
    """What strategies have in common that move forget clients' images towards soft labels, guided by F of the others.

    They differ in `relabel_known` alone, and in what they ask of forget clients for that.
    """

    class Settings(GuidedSettings):
        """Settings of the guide and of what follows."""

    @client_task(sends=input_triangles, exact=True)
    @staticmethod
    def input_covariance(client: Client, model: TwoHeadResNet18, settings: GuidedSettings) -> Tensors:
        """The covariance of each layer's inputs on a few of its images."""
        sample = client.sample(settings.guide_fraction, batch_size=client.evaluation_batch)
        images = (images for images, _, _ in sample)
        return kronecker.upper(kronecker.input_covariances(model, images, precision=client.precision))

    @client_task(sends=factor_triangles, exact=True)
    @staticmethod
    def kronecker_factors(client: Client, model: TwoHeadResNet18, settings: GuidedSettings) -> Tensors:
        """Covariances of each layer's inputs, and of the loss's gradients by its outputs, on a few of its images."""
        sample = client.sample(settings.guide_fraction, batch_size=client.evaluation_batch)
        return kronecker.upper(kronecker.kronecker_factors(model, sample, precision=client.precision))

    @client_task(sends=tasks.parameters)
    @staticmethod
    def guiding_fisher(client: Client, model: TwoHeadResNet18, settings: GuidedSettings) -> Tensors:
        """Its diagonal Fisher on a few of its images: the mean of the squared gradient, a parameter."""
        return diagonal_fisher(model, client.sample(settings.guide_fraction), precision=client.precision)

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Relabel the forget clients that are known too well, train the client head anew, and freeze.

        Returns:
            `predicted`, the estimated accuracy on all forget clients' images, and `rounds`, how many were made.
        """
        before, goal = federation.state, self.goal(federation, forget)
        rounds = self.relabel_known(federation, goal)
        federation.recalibrate_client_head()
        federation.freeze(since=before, fraction=self.settings.freeze_fraction)
        return {"predicted": goal.total, "rounds": rounds}

    def goal(self, federation: Federation, forget: ForgetSet) -> Goal:
        """Estimate what the retrained model says of the forget clients' images, and see which are known better.

        Others are left alone: relabelling would only show them to the model once more.
        """
        estimate, found = federation.estimate_retrained(federation.predictions()), federation.evaluate(forget)
        counts = federation.class_counts(forget)
        accuracy = {client: estimate.expected_accuracy(counts[client]) for client in forget}
        known = [
            client
            for client in forget
            if is_known_better(found[client], accuracy[client], estimate.expected_loss(counts[client]))
        ]
        for client in sorted({*forget} - {*known}):
            log.info("── client %d is not relabelled: its images are known no better than after retraining", client)
        return Goal(estimate, accuracy, known, estimate.expected_accuracy(total_counts(counts.values())))

    def relabel_known(self, federation: Federation, goal: Goal) -> int:
        """Relabel the images of `goal.known`; returns in how many rounds."""
        raise NotImplementedError

    def guide(self, federation: Federation, number: int) -> Tensors:
        """Give what guides the forget clients' steps at the present model, matrices as triangles."""
        settings = self.settings
        kinds = {"inputs": self.input_covariance, "kronecker": self.kronecker_factors, "diagonal": self.guiding_fisher}
        with federation.softened(settings.temperature):
            results = federation.run(kinds[settings.guide], on=federation.retain, at_round=federation.round + number)
        means = {name: value.to(federation.server.device) for name, value in results.mean().items()}
        if settings.guide == "diagonal":
            return kronecker.diagonal_guide(federation.server.model, means, ridge=settings.ridge)
        with unusable_replies():
            factors = kronecker.symmetric(means)
            found = kronecker.projectors(factors, ridge=settings.ridge, output_ridge=settings.output_ridge)
        return kronecker.upper(found)

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

    def repair_lr(self, config: Config, round_: int) -> float:
        """Give `repair_lr`, or in the middle of training the schedule's present rate, where that is higher."""
        return max(self.settings.repair_lr, learning_rate_of(config, round_ + 1))


class Relabelling(Guided):
    """theta += sum of (theta_f - theta), then theta += mean of (theta_r - theta), `rounds` times.

    The server estimates what the retrained model would predict on its held-out images. Each forget client f matches
    these predictions to its own images as soft labels. It fine-tunes the model on them, guided by the Fisher F of the
    retain clients: its steps are -(F + damping)^-1 g, so that the retain clients' predictions stay almost as they were.
    The retain clients r repair the rest by a little training. Both steps bring back some of what was right before. So
    the next round has as many fewer correct soft labels as the last one left too many.

    D_f ends with the predictions that unseen data would get, no fewer right and no surer, while the loss on D_r stays
    near zero. No gradient is left that would bring the old predictions back when training goes on. In the end the
    client head is trained anew, and the weights that changed most are frozen (`Federation.freeze`): one bit a weight,
    and nothing else is kept.
    """

    label, colour, marker = "relabelling", "#468faf", "P"

    class Settings(GuidedSettings):
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
        guide: Tensors,
        lr: float,
        last: bool,
        before: Tensors | None = None,
    ) -> Update:
        """Its model's update after fine-tuning on soft labels for its images, and how many of these it gets right.

        Where that diverges, it begins again at half of the learning rate.

        Args:
            predictions: estimated of the retrained model on held-out images, [T, K].
            prediction_labels: classes of these images, [T].
            correct_fraction: by client, how many soft labels are to be correct, relative to held-out images.
            guide: of the layers' gradients, matrices as triangles.
            before: the model as it was before it was relabelled; by default the broadcast one, as in the first round.
            last: whether this is the last round of the request.
        """
        soft_labels = soft_labels_of(
            client,
            model,
            predictions,
            prediction_labels,
            correct_fraction=correct_fraction.get(str(client.id), 1.0),
            before=before,
            last=last,
        )
        guiding = kronecker.symmetric({name: p.to(client.device) for name, p in guide.items()})
        for halvings in range(MOST_HALVINGS):
            model.load_state_dict(client.broadcast())
            epochs = range(settings.epochs)
            distill(
                model,
                (((x, soft_labels[i]) for x, i in client.own_batches(client.generator(epoch))) for epoch in epochs),
                lr=lr / 2**halvings,
                momentum=client.config.train.momentum,
                precision=client.precision,
                guide=guiding,
            )
            if all(bool(p.isfinite().all()) for p in model.parameters()):
                break
        return Update(client.changes(model), 1, client.evaluate(model))

    def relabel_known(self, federation: Federation, goal: Goal) -> int:
        """Relabel and repair, in rounds; each corrects what the one before it missed."""
        rounds = self.settings.rounds if goal.known else 0
        before, targets = federation.state, dict(goal.accuracy)
        for number in range(1, rounds + 1):
            log.info("── relabelling, round %d of %d: clients' images towards %.3f", number, rounds, goal.total)
            if number > 1:
                federation.recalibrate_batch_norm()
                found = federation.evaluate(goal.known)
                targets = {c: corrected(targets[c], goal.accuracy[c], found[c].class_accuracy) for c in goal.known}
            correct = {str(c): targets[c] / goal.accuracy[c] for c in goal.known if goal.accuracy[c]}
            self.relabel_round(federation, goal, number, before, correct)
            self.repair_round(federation, number)
        return rounds

    def relabel_round(
        self,
        federation: Federation,
        goal: Goal,
        number: int,
        before: ServerState,
        correct_fraction: Mapping[str, float],
    ) -> None:
        """Let the clients fine-tune on soft labels, guided by the retain clients' Fisher."""
        results = federation.run(
            self.relabel,
            on=goal.known,
            at_round=federation.round + number,
            predictions=goal.estimate.class_probs,
            prediction_labels=goal.estimate.class_labels,
            correct_fraction=dict(correct_fraction),
            guide=self.guide(federation, number),
            lr=self.relabel_lr(federation.config, federation.round),
            last=number == self.settings.rounds,
            before=before.params if number > 1 else None,
        )
        federation.apply(results.sum())

    def relabel_lr(self, config: Config, round_: int) -> float:
        """Give `lr`, up to twice of it where the schedule's rate has still to fall by as much.

        What is relabelled gently is lost in rounds of a higher rate.
        """
        now, last = learning_rate_of(config, round_ + 1), learning_rate_of(config, config.rounds)
        return self.settings.lr * (min(2.0, now / last) if last else 1.0)


def soft_labels_of(
    client: Client,
    model: TwoHeadResNet18,
    predictions: Tensor,
    prediction_labels: Tensor,
    *,
    correct_fraction: float = 1.0,
    before: Tensors | None = None,
    last: bool = False,
) -> Tensor:
    """Give soft labels for a client's images, [N, K], as `unlearning.soft_labels` assigns them.

    Args:
        model: to work with; it is another one afterwards.
        predictions, prediction_labels, correct_fraction: of `assign_soft_labels`.
        before: the model as it was before it was relabelled; by default the broadcast one.
        last: whether nothing has to be kept for a further call during this request.
    """

    def make_views() -> Tensor:
        model.load_state_dict(client.broadcast() if before is None else before)
        versions = augmented_views(torch.from_numpy(client.images), mirror=client.config.data.mirror)
        return torch.stack([client.predict(model, view.numpy()).class_probs for view in versions]).mean(0)

    return assign_soft_labels(
        client.once_a_request("views", make_views, last=last),
        client.labels,
        predictions,
        prediction_labels,
        correct_fraction,
        generator=generator_of(client.config.seed, client.id),
    ).to(client.device)


def is_known_better(found: Counts, predicted: float, predicted_loss: float) -> bool:
    """Say whether the model knows images better than the retrained model is estimated to.

    The loss is well below the estimated one, and the accuracy above it by more than a standard error of so many images.
    """
    error = math.sqrt(predicted * (1 - predicted) / found.examples)
    return found.mean_loss < KNOWN * predicted_loss and found.class_accuracy > predicted + error


def corrected(target: float, predicted: float, found: float) -> float:
    """Give the next target accuracy: lower by the last overshoot (integral control), within 0..predicted."""
    return min(max(target + predicted - found, 0.0), predicted)
