"""The project's own strategy: the leaving clients teach the model what it would say had it never seen their images."""

import math
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedunlearn.evaluate import Counts, Predictions
from strategies import wire
from strategies.federation import NoAnswerError
from strategies.forgetting import Forgetting, add_cost

KNOWN = 0.95  # of the loss of unseen images: below that, D_f is known
PASSES = 2  # at most
LAST = 0.4  # of the rate of the first round of unlearning, that of the last


class SubsetUnlearning(Forgetting):
    """theta <- theta + (1 - w) mean of (theta_r - theta) + w |f| mean of (theta_f - theta), `unlearn.rounds` times.

    The server shows the leaving clients f what the model says of its own, unseen images, under the class prior of those
    who stay (`foretold`). Each of them matches these answers to its images (`unseen.match_answers`) and trains the
    model to give them, while the retained clients r train on as ever; w is `unlearn.weight`, and each of |f| leaving
    clients teaches as much as it would alone. So D_f gets the answers that unseen data would get, no fewer right and no
    surer, and the loss on D_r stays near zero: no gradient is left that would bring the old answers back when training
    goes on. BatchNorm statistics and the client head are those of the retained clients, made again at the end; the
    leaving clients' neurons are pruned. Clients that the model still knows after these rounds (`knows`) teach in a
    second pass.

    When training goes on, nobody asks for these answers any more, and they would fade: the weights that unlearning
    moved most are held (`ServerModel.hold`). One bit a weight says which they are, and nothing else is kept: neither
    where they were before nor what the leaving clients sent.
    """

    reads = (
        "rounds", "round_share", "weight", "forget_epochs", "views", "flip", "hold", "lr", "recalibrate"
    )  # fmt: skip

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Passes of `unlearn.rounds` rounds each, as long as the model `knows` the leaving clients' images.

        None where it does not when the request comes: there is nothing to take back, and teaching would only show it
        D_f once more.
        """
        settings, passes, foretold = self.config.unlearn, 0, self.foretold(leaving)
        teacher, predicted = self.teacher(foretold), foretold.expected_accuracy(self.worker.class_mix(leaving))
        before = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        while passes < PASSES and self.knows(leaving, predicted, grid, costs):
            self.teach(leaving, self.round + passes * settings.rounds, grid, costs, teacher)
            passes += 1
        if not passes:
            self.log("── the model knows these images no better than it is foretold to without them: nobody is taught")
        if settings.recalibrate:
            self.recalibrate(grid, costs)
        self.renew_head(grid, costs)
        self.server.hold(before, settings.hold)
        return {"predicted": predicted, "rounds": passes * settings.rounds}

    def knows(self, leaving: list[int], predicted: float, grid: Grid, costs: dict[str, Any]) -> bool:
        """Whether `is_known` what the leaving clients count of their images."""
        found, unseen = self.counts_of(leaving, grid, costs), self.worker.predict_test()
        return is_known(found, predicted, unseen.expected_loss(self.worker.class_mix(leaving)))

    def teach(self, leaving: list[int], round_: int, grid: Grid, costs: dict[str, Any], teacher: ArrayRecord) -> None:
        """Rounds of leaving and staying clients together at a rate that falls from `first_rate` to `LAST` of it."""
        rounds = self.config.unlearn.rounds
        for number, share in enumerate(torch.linspace(1, LAST, rounds).tolist(), 1):
            self.log(f"── round {number} of {rounds} of unlearning")
            self.move_away(leaving, round_ + number, self.first_rate() * share, grid, costs, teacher)

    def first_rate(self) -> float:
        """`unlearn.lr`, or in the middle of training twice the schedule's present rate (never above its first one).

        What is taught at a rate below that of the rounds to come is lost in them.
        """
        train, now = self.config.train, self.worker.learning_rate(self.round + 1)
        return max(self.config.unlearn.lr, min(2 * now, train.lr))

    def move_away(
        self, leaving: list[int], round_: int, lr: float, grid: Grid, costs: dict[str, Any], teacher: ArrayRecord
    ) -> None:
        """One round; statistics of BatchNorm are those of the retained clients."""
        settings, clients = self.config.unlearn, self.active
        stay = self.ask_to_train("train", grid, round_, clients, lr=lr, share=settings.round_share, embeddings=False)
        leave = self.ask_to_train("train.unlearn", grid, round_, leaving, lr=lr, teacher=teacher)
        if not stay.counts:
            raise NoAnswerError("no retained client answered")
        if missing := sorted(set(leaving) - leave.counts.keys()):
            raise NoAnswerError(f"client {missing[0]} did not answer the request to unlearn")
        add_cost(costs, "retained", stay.cost)
        add_cost(costs, "leaving", leave.cost)
        movement, away, w = self.federation.mean(stay), self.federation.mean(leave), settings.weight
        mixed = {n: (1 - w) * movement[n] + w * len(leaving) * away[n] for n, _ in self.model.named_parameters()}
        self.server.move(movement | mixed)

    def teacher(self, foretold: Predictions) -> ArrayRecord:
        """The model as it is, and what is to be said of images like the server's unseen ones."""
        answers = {"answers": foretold.class_probs, "answer_labels": foretold.class_labels}
        return wire.packed(self.model.state_dict() | answers, "fp32")


def is_known(found: Counts, predicted: float, unseen_loss: float) -> bool:
    """Whether the loss of D_f is well below that of unseen images of its mix, and its accuracy above the predicted one
    by more than a standard error of so many images."""
    error = math.sqrt(predicted * (1 - predicted) / found.examples)
    return found.mean_loss < KNOWN * unseen_loss and found.class_accuracy > predicted + error
