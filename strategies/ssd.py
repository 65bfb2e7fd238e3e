"""Selective Synaptic Dampening, as the paper uses it (its Section 4.2 and Algorithm 1, lines 4 and 5)."""

from typing import Any

from flwr.serverapp import Grid
from torch import Tensor

from fedunlearn import unlearn
from fedunlearn.dampening import largest_alpha, selected_share
from strategies.federation import NoAnswerError
from strategies.forgetting import Forgetting


class SelectiveDampening(Forgetting):
    """theta_i *= min((lambda F_D,i / F_f,i)^e, 1) where F_f,i > alpha F_D,i (Eq. 8-9; Foster et al., 2024).

    Fishers of the retained clients and of the leaving ones at the current model, F_D = sum of n_c F_c / sum of n_c,
    `unlearn.step`, and (`unlearn.recalibrate`) BatchNorm statistics again from the retained clients.
    """

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Dampen, prune, recalibrate."""
        settings = self.config.unlearn
        full, forget = self.fishers(leaving, grid, costs)
        strength = {"alpha": settings.alpha, "lambda_": settings.lambda_, "exponent": settings.exponent}
        unlearn.step(self.model, full, forget, leaving, **strength)
        if settings.recalibrate:
            self.recalibrate(grid, costs)
        return {**strength, "selected": selected_share(full, forget, alpha=settings.alpha)}

    def fishers(
        self, leaving: list[int], grid: Grid, costs: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """F_D over the retained and the leaving clients, F_f over the leaving ones; means over examples.

        With `unlearn.share` < 1 the retained clients' part of F_D is estimated from that share of their examples.
        """
        like, state = dict(self.model.named_parameters()), self.broadcast()
        forget = self.federation.ask(grid, "query.fisher", self.round, leaving, state, like)
        if missing := sorted(set(leaving) - forget.counts.keys()):
            raise NoAnswerError(f"client {missing[0]} did not answer the Fisher query")
        share = self.config.unlearn.share
        retain = self.federation.ask(grid, "query.fisher", self.round, self.active, state, like, share=share)
        if not retain.counts:
            raise NoAnswerError("no retained client answered the Fisher query")
        costs |= {"fisher_forget": forget.cost, "fisher_retain": retain.cost}
        n_forget, n_retain, device = forget.total.examples, retain.total.examples, self.worker.device
        limit = largest_alpha(n_retain + n_forget, n_forget)
        if self.config.unlearn.alpha >= limit:
            self.log(
                f"── unlearn.alpha={self.config.unlearn.alpha:g} selects nothing: for this forget set, of "
                f"{n_forget} of {n_retain + n_forget} examples, take less than {limit:.2f}"
            )
        full = {n: ((retain.sums[n] + forget.sums[n]) / (n_retain + n_forget)).to(device) for n in like}
        return full, {n: (total / n_forget).to(device) for n, total in forget.sums.items()}

    def recalibrate(self, grid: Grid, costs: dict[str, Any]) -> None:
        """Estimate BatchNorm statistics on the retained clients' images."""
        like = unlearn.no_moments(self.model)
        if like:
            answer = self.federation.ask(grid, "query.moments", self.round, self.active, self.broadcast(), like)
            if not answer.counts:
                raise NoAnswerError("no retained client answered the query for BatchNorm moments")
            costs["moments"] = answer.cost
            unlearn.recalibrate(self.model, answer.sums)
