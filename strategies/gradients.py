"""Relabelling by a few gradients: for forget clients that send gradients, but do not train for those who stay."""

from dataclasses import replace
from logging import getLogger

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedunlearn.federation.client import Client
from fedunlearn.federation.handle import Federation
from fedunlearn.federation.messages import Tensors, floating
from fedunlearn.federation.server_state import ServerState
from fedunlearn.federation.tasks import Update, client_task, parameters
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.nn.precision import at_least_fp32, autocast
from fedunlearn.unlearning import kronecker
from strategies.relabel import Goal, Guided, GuidedSettings, soft_labels_of

HALVINGS = 4  # of the last step, where it went too far

log = getLogger("fedunlearn")


class GradientRelabelling(Guided):
    """theta <- theta - lr (F_D + damping)^-1 g, a few times, g being the forget clients' gradient to their soft labels.

    The soft labels, the guide F_D and all that comes after are those of `strategies.relabel`. For a step each forget
    client assigns soft labels, by what the model predicts on views of its images, and sends the mean gradient towards
    them. It never trains. The server guides the gradient and takes the step. It goes on until as many of their images
    are right as the retrained model is estimated to get, and shortens the last step to that. The repair that follows
    brings some of them back, so that there are further rounds of both.
    """

    label, colour, marker = "few gradients", "#8338ec", "X"

    class Settings(GuidedSettings):
        """Settings of relabelling by gradients."""

        steps: int = Field(
            default=8, ge=1, le=1000, description="of a round at most, each with a gradient of the forget clients"
        )
        most_rounds: int = Field(
            default=4,
            ge=1,
            le=10**6,
            description="of steps and a repair, at most, where clients are still known better than after retraining",
        )
        lr: float = Field(default=4.0, ge=0, le=1e6, description="length of a step, in guided gradients")

    @client_task(sends=parameters, compared=False)
    @staticmethod
    def gradient(
        client: Client,
        model: TwoHeadModel,
        settings: Settings,
        *,
        predictions: Tensor,
        prediction_labels: Tensor,
    ) -> Update:
        """Its mean gradient towards soft labels for its images, and how many of these the model gets right.

        Args:
            predictions: estimated of the retrained model on held-out images, [T, K].
            prediction_labels: classes of these images, [T].
        """
        soft_labels = soft_labels_of(client, model, predictions, prediction_labels)
        model.eval()
        model.zero_grad()
        for images, place in client.own_batches(client.generator()):
            with autocast(images.device, client.precision):
                outputs = model(images)
            targets = soft_labels[place]
            cross_entropy(at_least_fp32(outputs.class_logits), targets, reduction="sum").backward()
        found = {
            name: torch.zeros_like(p) if p.grad is None else p.grad / client.examples
            for name, p in model.named_parameters()
        }
        model.zero_grad()
        return Update(found, client.examples, client.evaluate(model))

    def relabel_known(self, federation: Federation, goal: Goal) -> None:
        """Step and repair, in rounds, until no client is known better than the retrained model would know it."""
        guide = kronecker.symmetric({name: p.float() for name, p in self.guide(federation).items()})
        missed, rounds = goal.known, self.settings.most_rounds
        for number in range(1, rounds + 1):
            self.step_to(federation, replace(goal, known=missed), guide)
            self.repair_round(federation, number, last=True)
            federation.held_out_batch_norm()
            found = federation.evaluate(goal.known)
            missed = goal.missed(found)
            if not missed:
                return
        self.say_missed(federation, goal, found, rounds)

    def step_to(self, federation: Federation, goal: Goal, guide: Tensors) -> None:
        """Step until the forget clients' accuracy is the estimated one.

        A step after which more images are right than before went too far. It is taken anew, half as long; the last one
        is taken back.
        """
        last, gradient = federation.state, {}
        aim = goal.aim({client: federation.examples([client]) for client in goal.known})
        lr, least = self.settings.lr, 1.0
        for step in range(1, self.settings.steps + 1):
            results = federation.run(
                self.gradient,
                on=goal.known,
                predictions=goal.estimate.class_probs,
                prediction_labels=goal.estimate.class_labels,
            )
            found = results.total.class_accuracy
            log.info("── gradient %d: %.3f of the images right, to be %.3f", step, found, aim)
            if found <= aim:
                break
            if found > least:
                federation.state, lr = last, lr / 2
            else:
                last, least, gradient = federation.state, found, results.mean()
            federation.apply(self.guided(federation, gradient, guide, lr))
        else:
            if federation.counts(goal.known).class_accuracy > least:
                federation.state = last
        self.shorten(federation, goal, last, aim)

    def guided(self, federation: Federation, gradient: Tensors, guide: Tensors, lr: float) -> Tensors:
        """Give the step that a gradient becomes."""
        model = federation.model()
        for name, p in model.named_parameters():
            p.grad = gradient[name].to(p.device)
        kronecker.guide_gradients(model, guide)
        step = {n: -lr * p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return step

    def shorten(self, federation: Federation, goal: Goal, before: ServerState, aim: float) -> None:
        """Go back on the last step, where it went too far, to about the place where the accuracy is the aimed one."""
        if not self.too_far(federation, goal, aim):
            return
        after, low, high = federation.state, 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            federation.state = between(before, after, middle)
            low, high = (low, middle) if self.too_far(federation, goal, aim) else (middle, high)
        federation.state = between(before, after, (low + high) / 2)

    def too_far(self, federation: Federation, goal: Goal, aim: float) -> bool:
        """Say whether fewer images are right than aimed at."""
        return federation.counts(goal.known).class_accuracy < aim


def between(before: ServerState, after: ServerState, way: float) -> ServerState:
    """Give the state at a part of the way from one to another."""
    moved = {n: value + way * (after.params[n] - value) for n, value in floating(before.params).items()}
    return replace(after, params=after.params | moved)
