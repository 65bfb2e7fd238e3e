"""The project's own strategy: the leaving clients teach the model what it would say had it never seen their images."""

import math
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedunlearn.federation import messages as wire
from fedunlearn.federation.requests import Forgetting
from fedunlearn.nn.evaluate import Counts, Predictions
from fedunlearn.unlearning import null_space

KNOWN = 0.95  # of the loss of unseen images: below that, D_f is known


class SubsetUnlearning(Forgetting):
    """theta += sum of (theta_f - theta), then theta += mean of (theta_r - theta), `unlearn.rounds` times.

    The server shows the leaving clients f what the model would say of its own, unseen images had it never seen theirs
    (`foretold`). Each of them matches these answers to its images (`unseen.match_answers`) and trains the
    model to give them, as much as it would alone, along directions that the retained clients' images hardly use
    (`null_space.projectors`): what the model says of those stays almost as it was. The rest the retained clients r
    mend, by a little training, and make BatchNorm statistics again. Both bring back some of what was right before, of
    D_f as of unseen images: the next round shows answers of which as many fewer are right. So D_f gets the answers
    that unseen data would get, no fewer right and no surer, while the loss on D_r stays near zero: no gradient is left
    that would bring the old answers back when training goes on. In the end the client head is trained anew, and the
    leaving clients' neurons are pruned.

    When training goes on, nobody asks for these answers any more, and they would fade: the weights that unlearning
    moved most are held (`ServerModel.hold`). One bit a weight says which they are, and nothing else is kept: neither
    where they were before nor what the clients sent.
    """

    reads = (
        "rounds", "round_share", "input_share", "ridge", "forget_epochs", "flip", "hold", "lr", "mend_lr",
        "recalibrate",
    )  # fmt: skip

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Teach those clients that the model knows (`is_known`), in `unlearn.rounds` rounds; each of these is corrected
        by what the one before it missed. Of the others there is nothing to take back: teaching would only show the
        model their images once more.

        Returns:
            `predicted`, the foretold accuracy on all their images, and `rounds`, how many were made.
        """
        settings, unseen = self.config.unlearn, self.worker.predict_test()
        foretold, found = self.foretold(unseen), self.counts_of(leaving, grid, costs)
        mixes = {client: self.worker.class_mix([client]) for client in leaving}
        predicted = {client: foretold.expected_accuracy(mix) for client, mix in mixes.items()}
        known = [c for c in leaving if is_known(found[c], predicted[c], unseen.expected_loss(mixes[c]))]
        for client in sorted({*leaving} - {*known}):
            self.log(
                f"── client {client} is not taught: its images are known no better than gold is foretold to know them"
            )
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        rounds, aims = settings.rounds if known else 0, predicted
        for number in range(1, rounds + 1):
            self.log(f"── round {number} of {rounds} of unlearning")
            if number > 1:
                self.recalibrate(grid, costs, share=settings.round_share)
                found = self.counts_of(known, grid, costs)
                aims = {c: corrected(aims[c], predicted[c], found[c].class_accuracy) for c in known}
            shares = {c: aims[c] / predicted[c] for c in known if predicted[c]}
            teacher, last = self.teacher(before, foretold, shares), number == rounds
            self.teach(known, self.round + number, grid, costs, teacher, last=last)
            self.mend(self.round + number, grid, costs)
        self.recalibrate(grid, costs)
        self.renew_head(grid, costs)
        self.server.hold(before, settings.hold)
        return {"predicted": foretold.expected_accuracy(sum(mixes.values())), "rounds": rounds}

    def teach(
        self, known: list[int], round_: int, grid: Grid, costs: dict[str, Any], teacher: ArrayRecord, *, last: bool
    ) -> None:
        """The clients change what the model says of their images, along what those who stay hardly use."""
        beside = {"teacher": teacher, "projectors": self.projectors(round_, grid, costs)}
        how = {"beside": beside, "lr": self.rate(), "last": last}
        answer = self.ask_to_train("train.unlearn", grid, known, costs, "leaving", round_=round_, everybody=True, **how)
        self.server.move(answer.sums)

    def projectors(self, round_: int, grid: Grid, costs: dict[str, Any]) -> ArrayRecord:
        """Of the retained clients' inputs to the model as it is (`null_space`)."""
        like = null_space.upper(null_space.no_products(self.model))
        answer = self.ask("query.inputs", grid, self.active, costs, "inputs", like=like, round_=round_)
        means = {name: value.to(self.worker.device) for name, value in self.federation.mean(answer).items()}
        products = null_space.symmetric(means)
        free = null_space.projectors(products, ridge=self.config.unlearn.ridge)
        return wire.packed(null_space.upper(free), "fp32")

    def mend(self, round_: int, grid: Grid, costs: dict[str, Any]) -> None:
        """The retained clients train on a share of their images, at `mend_rate`."""
        how = {"lr": self.mend_rate(), "share": self.config.unlearn.round_share, "embeddings": False}
        answer = self.ask_to_train("train", grid, self.active, costs, "retained", round_=round_, **how)
        self.server.move(self.federation.mean(answer))

    def rate(self) -> float:
        """`unlearn.lr`, up to twice of it where the schedule's rate has still to fall by as much.

        What is taught gently is lost in rounds of a higher rate.
        """
        now, last = self.worker.learning_rate(self.round + 1), self.worker.learning_rate(self.config.rounds)
        return self.config.unlearn.lr * (min(2.0, now / last) if last else 1.0)

    def mend_rate(self) -> float:
        """`unlearn.mend_lr`, or in the middle of training the schedule's present rate, where that is higher."""
        return max(self.config.unlearn.mend_lr, self.worker.learning_rate(self.round + 1))

    def teacher(self, before: dict[str, Tensor], foretold: Predictions, shares: dict[int, float]) -> ArrayRecord:
        """The state of the model before it forgets, what is to be said of images like the server's unseen ones, and how
        many times as often right as foretold it is to be for each client."""
        of_clients = torch.ones(self.config.clients)
        for client, share in shares.items():
            of_clients[client] = share
        answers = {
            "answers": foretold.class_probs,
            "answer_labels": foretold.class_labels,
            "answer_shares": of_clients,
        }
        return wire.packed(before | answers, "fp32")


def is_known(found: Counts, predicted: float, unseen_loss: float) -> bool:
    """Whether the loss of D_f is well below that of unseen images of its mix, and its accuracy above the predicted one
    by more than a standard error of so many images."""
    error = math.sqrt(predicted * (1 - predicted) / found.examples)
    return found.mean_loss < KNOWN * unseen_loss and found.class_accuracy > predicted + error


def corrected(aim: float, predicted: float, found: float) -> float:
    """The accuracy to aim at after `aim` brought `found` in place of `predicted`: as much lower as that was too high.

    Where that was too low it is higher again, up to `predicted`: more often right than foretold no answers are.
    """
    return min(max(aim + predicted - found, 0.0), predicted)
