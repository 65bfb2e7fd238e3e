"""Selective Synaptic Dampening, as the paper uses it (its Section 4.2 and Algorithm 1, lines 4 and 5)."""

import math
from typing import Any

from flwr.serverapp import Grid
from torch import Tensor

from fedunlearn.federation.requests import Forgetting
from fedunlearn.nn.evaluate import Counts
from fedunlearn.unlearning import dampening
from fedunlearn.unlearning.dampening import largest_alpha, selected_share

Tensors = dict[str, Tensor]
BISECTED = {1.0: 4, 0.1: 3}  # values of lambda, and how many of alpha are tried with each
EVALUATIONS = 1 + sum(BISECTED.values())  # by the leaving clients: of the model as it is, and of these
CLOSE = 0.02  # candidates as near to the target as this are told apart by the test accuracy


class SelectiveDampening(Forgetting):
    """theta_i *= min((lambda F_D,i / F_f,i)^e, 1) where F_f,i > alpha F_D,i (Eq. 8-9; Foster et al., 2024).

    Fishers of the retained clients and of the leaving ones at the current model, F_D = sum of n_c F_c / sum of n_c,
    `unlearn.step`, and (`unlearn.recalibrate`) BatchNorm statistics again from the retained clients; then the server
    trains the client head anew, where it does so.
    """

    reads = (
        "tune", "alpha", "lambda_", "exponent", "head", "estimator", "precision", "share", "round_share",
        "recalibrate",
    )  # fmt: skip

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Dampen, recalibrate, and train the client head."""
        settings, said = self.config.unlearn, {}
        full, forget = self.fishers(leaving, grid, costs)
        strength = {"alpha": settings.alpha, "lambda_": settings.lambda_}
        if settings.tune == "auto":
            predicted = self.foretold_accuracy(leaving)
            trials = self.search(leaving, full, forget, predicted, grid, costs)
            chosen = nearest(trials, predicted)
            strength = {name: chosen[name] for name in strength}
            said = {"predicted": predicted, "trials": trials}
        self.dampen(leaving, full, forget, **strength)
        self.recalibrate(grid, costs)
        self.renew_head(grid, costs)
        return {
            **strength,
            "exponent": settings.exponent,
            **said,
            "selected": selected_share(full, forget, alpha=strength["alpha"]),
        }

    def dampen(self, leaving: list[int], full: Tensors, forget: Tensors, *, alpha: float, lambda_: float) -> None:
        """`unlearn.step` of the model, at the run's exponent; it prunes the neurons of `leaving`."""
        exponent = self.config.unlearn.exponent
        dampening.step(self.model, full, forget, leaving, alpha=alpha, lambda_=lambda_, exponent=exponent)

    def search(
        self,
        leaving: list[int],
        full: Tensors,
        forget: Tensors,
        target: float,
        grid: Grid,
        costs: dict[str, Any],
    ) -> list[dict[str, float]]:
        """Dampen nothing; then with each lambda of `BISECTED` bisect alpha (its logarithm) for a forgotten accuracy of
        `target`.

        Alpha is between lambda, below which nothing changes (no factor is above 1), and where nothing is selected. What
        the model knows well has small gradients, and is reached by an alpha below 1 only. What is known no better than
        the target is best left alone.
        The leaving clients count their accuracy `EVALUATIONS` times in all, and that is all that they are asked.
        BatchNorm statistics, where they are made again, are of a share of the retained clients' images; the accuracy on
        unseen images is noted too. The model is as before in the end.
        """
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        n_forget = sum(self.federation.examples[c] for c in leaving)
        n = n_forget + sum(self.federation.examples[c] for c in self.active)
        nothing = largest_alpha(n, n_forget)

        def tried(alpha: float, lambda_: float) -> dict[str, float]:
            self.model.load_state_dict(before)
            self.dampen([], full, forget, alpha=alpha, lambda_=lambda_)
            self.recalibrate(grid, costs, share=self.config.unlearn.round_share)
            found = sum(self.counts_of(leaving, grid, costs).values(), Counts())
            said = {"forgotten": found.class_accuracy, "loss": found.mean_loss, "test": self.accuracy_on_test()}
            return {"alpha": alpha, "lambda_": lambda_, **said}

        trials = [tried(nothing, 1.0)]
        for lambda_, times in BISECTED.items():
            low, high = math.log(lambda_), math.log(nothing)
            for _ in range(times):
                middle = (low + high) / 2
                trials.append(tried(math.exp(middle), lambda_))
                low, high = (middle, high) if trials[-1]["forgotten"] < target else (low, middle)
        self.model.load_state_dict(before)
        return trials

    def fishers(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> tuple[Tensors, Tensors]:
        """F_D over the retained and the leaving clients, F_f over the leaving ones; means over examples.

        With `unlearn.share` < 1 the retained clients' part of F_D is estimated from that share of their examples.
        """
        like, share = dict(self.model.named_parameters()), self.config.unlearn.share
        forget = self.ask("query.fisher", grid, leaving, costs, "fisher_forget", like=like, everybody=True)
        retain = self.ask("query.fisher", grid, self.active, costs, "fisher_retain", like=like, share=share)
        n_forget, n_retain, device = forget.total.examples, retain.total.examples, self.worker.device
        limit = largest_alpha(n_retain + n_forget, n_forget)
        if self.config.unlearn.tune == "fixed" and self.config.unlearn.alpha >= limit:
            self.log(
                f"── unlearn.alpha={self.config.unlearn.alpha:g} selects nothing: for this forget set, of "
                f"{n_forget} of {n_retain + n_forget} examples, take less than {limit:.2f}"
            )
        full = {n: ((retain.sums[n] + forget.sums[n]) / (n_retain + n_forget)).to(device) for n in like}
        return full, {n: (total / n_forget).to(device) for n, total in forget.sums.items()}


def nearest(trials: list[dict[str, float]], target: float) -> dict[str, float]:
    """The trial of a forgotten accuracy nearest to `target`; of those within `CLOSE`, the best on the test images."""
    close = [trial for trial in trials if abs(trial["forgotten"] - target) <= CLOSE]
    return max(close, key=lambda t: t["test"]) if close else min(trials, key=lambda t: abs(t["forgotten"] - target))
