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
from fedunlearn.federation.handle import SERVER, Federation, ForgetSet, total_counts
from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.server_state import ServerState
from fedunlearn.federation.strategy import Strategy
from fedunlearn.federation.tasks import Update, client_task
from fedunlearn.nn.evaluate import Counts, Predictions
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.nn.rng import generator_of
from fedunlearn.unlearning import kronecker
from fedunlearn.unlearning.distill import distill
from fedunlearn.unlearning.fisher import diagonal_fisher, with_drawn_labels
from fedunlearn.unlearning.soft_labels import assign_soft_labels, augmented_views

MEMORISED = 0.25  # of what held-out images get wrong: where more is right, further rounds would bring it back
KNOWN = 0.95  # of the loss that the retrained model is estimated to have: with less, images are known better
MOST_REPAIR_LR = 0.005  # unless `repair_lr` says another
MISSED = 2.0  # standard errors above the estimated accuracy: with more, there is another round

log = getLogger("fedunlearn")


@dataclass(frozen=True)
class Goal:
    """Says what the forget clients' images should look like to the model in the end.

    Attributes:
        estimate: predictions of the retrained model on the server's held-out images, estimated.
        accuracy: of the retrained model on each forget client's images, estimated.
        known: the forget clients whose images the present model knows better than the retrained one would.
        total: the estimated accuracy on all forget clients' images together.
        memorised: of the images that held-out ones of the same classes would get wrong, the fraction that is right.
    """

    estimate: Predictions
    accuracy: Mapping[int, float]
    known: list[int]
    total: float
    memorised: float

    def aim(self, examples: Mapping[int, int]) -> float:
        """Give the estimated accuracy on the images of some clients together, of so many examples each."""
        return sum(self.accuracy[client] * n for client, n in examples.items()) / sum(examples.values())

    def missed(self, found: Mapping[int, Counts]) -> list[int]:
        """List the clients of which the model still gets more right than it should, by more than chance."""
        return [client for client in self.known if errors_above(found[client], self.accuracy[client]) > MISSED]


class GuidedSettings(CheckedSettings):
    """Settings of what guides a relabelling, and of what follows it."""

    guide: Literal["inputs", "kronecker", "diagonal"] = Field(
        default="kronecker",
        description="what of the Fisher guides the steps: the Kronecker factor of the layers' inputs, both Kronecker "
        "factors, or the diagonal",
    )
    guide_images: int = Field(
        default=500,
        ge=1,
        le=10**6,
        description="of the server's held-out images, at random, that the guide is taken of",
    )
    temperature: float = Field(
        default=4.0, ge=1e-3, le=1e6, description="that class logits are divided by where a Fisher is taken"
    )
    ridge: float = Field(
        default=0.02,
        ge=1e-5,
        description="damping, relative to the mean of the inputs' factor, or of the diagonal; smaller spares "
        "retain clients",
    )
    output_ridge: float = Field(
        default=0.3, ge=1e-5, description="the same, relative to the mean of the outputs' factor"
    )
    repair_fraction: float = Field(
        default=0.3, ge=1e-6, le=1, description="of each retain client's images that it repairs with"
    )
    repair_lr: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="learning rate of the repair, or the schedule's if that is higher; null: a quarter of train.lr, at "
        "most 0.005",
    )
    freeze_fraction: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description="of the weights, those that changed most, that hardly move from then on; none where little was "
        "memorised",
    )


class Guided(Strategy):
    """What strategies have in common that move forget clients' images towards soft labels, guided by F of the others.

    They differ in `relabel_known` alone, and in what they ask of forget clients for that.
    """

    class Settings(GuidedSettings):
        """Settings of the guide and of what follows."""

    @client_task(
        kind="train",
        sends_apart=tasks.embedding_rows,
        check=tasks.embeddings_of_images,
        trains=True,
        dtype="bf16",
    )
    @staticmethod
    def repair(client: Client, model: TwoHeadModel, settings: GuidedSettings, *, lr: float, embeddings: bool) -> Update:
        """Its model's update after training on a few of its images, and statistics of its embeddings."""
        fraction = settings.repair_fraction
        return tasks.train(client, model, settings, fraction=fraction, lr=lr, embeddings=embeddings)

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Relabel the forget clients that are known too well, and freeze.

        Returns:
            `predicted`, the estimated accuracy on all forget clients' images, `relabelled`, which clients were, and
            `frozen`, the fraction of the weights.
        """
        before, goal = federation.state, self.goal(federation, forget)
        return self.relabel_and_freeze(federation, goal, since=before)

    def relabel_and_freeze(self, federation: Federation, goal: Goal, *, since: ServerState) -> dict[str, Any]:
        """Relabel what is known too well, and freeze what has changed since a state; returns as `forget` does.

        Memorised images come back with the retain clients' next rounds, unless weights are frozen. What was not
        memorised comes back only as the retrained model learns it too. Then freezing would keep the rest from learning.
        """
        if goal.known:
            self.relabel_known(federation, goal)
        else:
            federation.recalibrate_client_head()
        was_memorised = goal.known and goal.memorised > MEMORISED
        fraction = self.settings.freeze_fraction if was_memorised else 0.0
        log.info("── freezing %g of the weights: %s was memorised", fraction, "much" if was_memorised else "little")
        federation.freeze(since=since, fraction=fraction)
        return {"predicted": goal.total, "relabelled": goal.known, "frozen": fraction}

    def goal(self, federation: Federation, forget: ForgetSet) -> Goal:
        """Estimate what the retrained model says of the forget clients' images, and see which are known better.

        Others are left alone: relabelling would only show them to the model once more.
        """
        predictions, found = federation.predictions(), federation.evaluate(forget)
        estimate, counts = federation.estimate_retrained(predictions), federation.class_counts(forget)
        accuracy = {client: estimate.expected_accuracy(counts[client]) for client in forget}
        known = [
            client
            for client in forget
            if is_known_better(found[client], accuracy[client], estimate.expected_loss(counts[client]))
        ]
        for client in sorted({*forget} - {*known}):
            who = federation.named([client])
            log.info("── %s is not relabelled: its images are known no better than after retraining", who)
        together = total_counts(counts.values())
        right = sum(found.values(), Counts()).class_accuracy
        memorised = memorised_fraction(right, predictions.expected_accuracy(together))
        return Goal(estimate, accuracy, known, estimate.expected_accuracy(together), memorised)

    def relabel_known(self, federation: Federation, goal: Goal) -> None:
        """Relabel the images of `goal.known`, which are some client's at least."""
        raise NotImplementedError

    def say_missed(self, federation: Federation, goal: Goal, found: Mapping[int, Counts], rounds: int) -> None:
        """Warn that clients are still known better than they should be, after so many rounds."""
        missed = {client: found[client] for client in goal.missed(found)}
        right = sum(missed.values(), Counts()).class_accuracy
        log.warning(
            "%s is still known better than the retrained model is estimated to know it: after %d rounds of relabelling "
            "%.3f of the images are right, not %.3f (unlearn.most_rounds, unlearn.lr)",
            federation.named([*missed]), rounds, right, goal.aim({c: one.examples for c, one in missed.items()}),
        )  # fmt: skip

    def guide(self, federation: Federation) -> Tensors:
        """Give what guides the forget clients' steps at the present model, matrices as triangles, in half precision.

        The Fisher is of the server's held-out images, with classes drawn from what the model predicts. So no client
        shares anything for it, and no client's images are in what the forget clients get.
        """
        settings, generator = self.settings, generator_of(federation.config.seed, federation.round, SERVER, 1)
        precision, ridge = federation.config.train.precision, settings.ridge
        with federation.softened(settings.temperature):
            model = federation.model()
        sample = federation.server.sample(settings.guide_images, generator)
        batches = with_drawn_labels(model, sample, generator, precision=precision)
        with unusable_replies():
            if settings.guide == "diagonal":
                fisher = diagonal_fisher(model, batches, precision=precision)
                guide = kronecker.diagonal_guide(model, fisher, ridge=ridge)
            elif settings.guide == "inputs":
                factors = kronecker.input_covariances(model, (images for images, _, _ in batches), precision=precision)
                guide = kronecker.projectors(factors, ridge=ridge)
            else:
                factors = kronecker.kronecker_factors(model, batches, precision=precision)
                guide = kronecker.projectors(factors, ridge=ridge, output_ridge=settings.output_ridge)
        if left := kronecker.unguided(model, guide):
            log.info("── relabelling leaves matrices that have no guide as they are: %s (%d)", left[0], len(left))
        return {name: values.half() for name, values in kronecker.upper(guide).items()}

    def repair_round(self, federation: Federation, number: int, *, last: bool) -> None:
        """Let the retain clients repair what the forget clients have disturbed; the last time train the client head."""
        lr, round_ = self.repair_lr(federation.config, federation.round), federation.round + number
        federation.held_out_batch_norm()
        results = federation.run(self.repair, on=federation.retain, at_round=round_, lr=lr, embeddings=last)
        federation.apply(results.mean())
        federation.fit_client_head(results.statistics, round_)

    def repair_lr(self, config: Config, round_: int) -> float:
        """Give `repair_lr`, or in the middle of training the schedule's present rate, where that is higher.

        A network that is trained at a low rate is repaired at a low one: at a higher one the retain clients' models
        move apart, and their mean is worse than before.
        """
        usual = min(MOST_REPAIR_LR, config.train.lr / 4)
        chosen = self.settings.repair_lr
        return max(usual if chosen is None else chosen, learning_rate_of(config, round_ + 1))


class Relabelling(Guided):
    """theta += sum of (theta_f - theta), then theta += mean of (theta_r - theta), until D_f is as estimated.

    The server estimates what the retrained model would predict on its held-out images. Each forget client f matches
    these predictions to its own images as soft labels. It fine-tunes the model on them, guided by the Fisher F: its
    steps are -(F + damping)^-1 g, so that predictions on other images stay almost as they were. The retain clients r
    repair the rest by a little training. Both steps bring back some of what was right before. So the next round has
    fewer correct soft labels (`corrected`). How many passes and rounds that takes depends on the network: each goes on
    while the forget client's accuracy is above what it should be by more than chance.

    D_f ends with the predictions that unseen data would get, no fewer right and no surer, while the loss on D_r stays
    near zero. No gradient is left that would bring the old predictions back when training goes on. In the end, where
    images were memorised, the weights that changed most are frozen (`Federation.freeze`): one bit a weight, and nothing
    else is kept.
    """

    label, colour, marker = "relabelling", "#468faf", "P"

    class Settings(GuidedSettings):
        """Settings of relabelling."""

        guide: Literal["inputs", "kronecker", "diagonal"] = Field(
            default="inputs", description=GuidedSettings.model_fields["guide"].description
        )
        rounds: int = Field(
            default=2,
            ge=1,
            le=10**6,
            description="of relabelling by the forget clients, each with a repair by the rest",
        )
        most_rounds: int = Field(
            default=6,
            ge=1,
            le=10**6,
            description="how many there are at most, where clients are still known better than after retraining",
        )
        epochs: int = Field(default=4, ge=1, le=1000, description="of the forget clients in a pass")
        passes: int = Field(
            default=5,
            ge=1,
            le=1000,
            description="how many a round has at most, until no more images are right than soft labels are: each at "
            "twice the rate of the one before, or at a quarter where that one came no nearer and was undone",
        )
        lr: float = Field(
            default=0.06,
            ge=0,
            le=100,
            description="learning rate of the first pass, up to twice that while the schedule's has still to fall",
        )

    @client_task(kind="train", trains=True, dtype="bf16", compared=False)
    @staticmethod
    def relabel(
        client: Client,
        model: TwoHeadModel,
        settings: Settings,
        *,
        predictions: Tensor,
        prediction_labels: Tensor,
        correct_fraction: dict[str, float],
        guide: Tensors,
        lr: float,
    ) -> Update:
        """Its model's update after fine-tuning on soft labels for its images, and how many of these it gets right.

        It goes on, each time at twice the rate, until no more images are right than soft labels are. A pass that comes
        no nearer to the soft labels is undone, and the next one takes a quarter of its rate.

        Args:
            predictions: estimated of the retrained model on held-out images, [T, K].
            prediction_labels: classes of these images, [T].
            correct_fraction: by client, how many soft labels are to be correct, relative to held-out images.
            guide: of the layers' gradients, as `Guided.guide` gives it.
        """
        correct = correct_fraction[str(client.id)]
        soft_labels = soft_labels_of(client, model, predictions, prediction_labels, correct_fraction=correct)
        guiding = kronecker.symmetric({name: p.float().to(client.device) for name, p in guide.items()})
        kept, (_, loss) = client.broadcast(), fit(client, model, soft_labels)
        for number in range(settings.passes):
            model.load_state_dict(kept)
            epochs = range(number * settings.epochs, (number + 1) * settings.epochs)
            distill(
                model,
                (((x, soft_labels[i]) for x, i in client.own_batches(client.generator(epoch))) for epoch in epochs),
                lr=lr,
                momentum=client.config.train.momentum,
                precision=client.precision,
                guide=guiding,
            )
            above, reached = fit(client, model, soft_labels)
            if not reached < loss:
                lr /= 4
                continue
            kept, loss = {name: value.clone() for name, value in model.state_dict().items()}, reached
            if above <= 1:
                break
            lr *= 2
        model.load_state_dict(kept)
        return Update(client.changes(model), 1, client.evaluate(model))

    def relabel_known(self, federation: Federation, goal: Goal) -> None:
        """Relabel and repair, in rounds; each corrects what the one before it missed."""
        settings, guide = self.settings, self.guide(federation)
        missed, correct = goal.known, dict.fromkeys(goal.known, 1.0)
        for number in range(1, max(settings.rounds, settings.most_rounds) + 1):
            asked = goal.known if number <= settings.rounds else missed
            aim = goal.aim({client: federation.examples([client]) for client in asked})
            log.info("── relabelling, round %d: clients' images towards %.3f", number, aim)
            results = federation.run(
                self.relabel,
                on=asked,
                at_round=federation.round + number,
                predictions=goal.estimate.class_probs,
                prediction_labels=goal.estimate.class_labels,
                correct_fraction={str(client): correct[client] for client in asked},
                guide=guide,
                lr=self.relabel_lr(federation.config, federation.round),
            )
            federation.apply(results.sum())
            self.repair_round(federation, number, last=number >= settings.rounds)
            federation.held_out_batch_norm()
            found = federation.evaluate(goal.known)
            missed = goal.missed(found)
            if number >= settings.rounds and not missed:
                return
            correct |= {c: corrected(correct[c], goal.accuracy[c], found[c].class_accuracy) for c in asked}
        self.say_missed(federation, goal, found, number)

    def relabel_lr(self, config: Config, round_: int) -> float:
        """Give `lr`, up to twice of it where the schedule's rate has still to fall by as much.

        What is relabelled gently is lost in rounds of a higher rate.
        """
        now, last = learning_rate_of(config, round_ + 1), learning_rate_of(config, config.rounds)
        return self.settings.lr * (min(2.0, now / last) if last else 1.0)


def soft_labels_of(
    client: Client,
    model: TwoHeadModel,
    predictions: Tensor,
    prediction_labels: Tensor,
    *,
    correct_fraction: float = 1.0,
) -> Tensor:
    """Give soft labels for a client's images, [N, K], as `unlearning.soft_labels` assigns them.

    Args:
        model: whose predictions on views of the images decide which image takes which.
        predictions, prediction_labels, correct_fraction: of `assign_soft_labels`.
    """
    versions = augmented_views(torch.from_numpy(client.images), mirror=client.config.data.mirror)
    views = torch.stack([client.predict(model, view.numpy()).class_probs for view in versions]).mean(0)
    generator = generator_of(client.config.seed, client.id)
    soft_labels = assign_soft_labels(
        views, client.labels, predictions, prediction_labels, correct_fraction, generator=generator
    )
    return soft_labels.to(client.device)


def fit(client: Client, model: TwoHeadModel, soft_labels: Tensor) -> tuple[float, float]:
    """Say how a model fits soft labels for a client's images, [N, K].

    Returns:
        By how many standard errors more images are right than soft labels are, and the cross-entropy with these.
    """
    labels, probs = client.labels, client.predict(model, client.images).class_probs.cpu()
    soft_labels = soft_labels.cpu()
    found = Counts(len(labels), class_correct=int((probs.argmax(1) == labels).sum()))
    right = float((soft_labels.argmax(1) == labels).float().mean())
    loss = -(soft_labels * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(1).mean()
    return errors_above(found, right), float(loss)


def memorised_fraction(right: float, held_out: float) -> float:
    """Give the memorisation gap as a fraction of the largest that there can be.

    Args:
        right: accuracy on images that were trained on, 0..1.
        held_out: on held-out images of the same class counts.

    Example:
        >>> memorised_fraction(1.0, 0.5), memorised_fraction(0.75, 0.5)
        (1.0, 0.5)
    """
    return (right - held_out) / (1 - held_out) if held_out < 1 else 0.0


def is_known_better(found: Counts, predicted: float, predicted_loss: float) -> bool:
    """Say whether the model knows images better than the retrained model is estimated to.

    The loss is well below the estimated one, and the accuracy above it by more than a standard error of so many images.
    """
    return found.mean_loss < KNOWN * predicted_loss and errors_above(found, predicted) > 1


def errors_above(found: Counts, predicted: float) -> float:
    """Give how many standard errors an accuracy is above a predicted one, whose variance is never taken for zero.

    Example:
        >>> errors_above(Counts(100, class_correct=60), 0.5)
        2.0
    """
    variance = max(predicted * (1 - predicted), 1 / found.examples)
    return (found.class_accuracy - predicted) / math.sqrt(variance / found.examples)


def corrected(correct: float, aim: float, found: float) -> float:
    """Give the next fraction of correct soft labels: lower by half of what was missed, within 0..1.

    The half that is left is what a second round of the same soft labels does by itself.
    """
    return min(max(correct - (found - aim) / (2 * aim), 0.0), 1.0) if aim else 0.0
