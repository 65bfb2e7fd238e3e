"""Selective Synaptic Dampening, as the paper uses it (its Section 4.2 and Algorithm 1, lines 4 and 5)."""

import math
from logging import getLogger
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from fedunlearn.config import Config, Precision
from fedunlearn.config import Settings as CheckedSettings
from fedunlearn.errors import UserError, unusable_replies
from fedunlearn.federation.client import Client
from fedunlearn.federation.handle import Federation, ForgetSet, total_counts
from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.server_state import SOFTENED
from fedunlearn.federation.strategy import Strategy
from fedunlearn.federation.tasks import ClientTask, client_task, nonnegative, parameters
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.unlearning.dampening import dampen, largest_alpha, selected_fraction
from fedunlearn.unlearning.fisher import diagonal_fisher

BISECTED = {1.0: 4, 0.1: 3}  # values of lambda, and how many of alpha are tried with each
CLOSE = 0.02  # candidates as near to the target as this are told apart by the test accuracy

log = getLogger("fedunlearn")


class SelectiveDampening(Strategy):
    """theta_i *= min((lambda F_D,i / F_f,i)^e, 1) where F_f,i > alpha F_D,i (Eq. 8-9; Foster et al., 2024).

    The clients send Fisher diagonals at the present model: F_f of the forget clients, and F_D = sum of n_c F_c / sum of
    n_c of all. The server dampens, and trains the client head anew, where it does so. `tune=auto` looks for the
    strength that takes the forget clients to the accuracy that the retrained model is estimated to have on them. It
    passes over strengths that destroy the model: those that lose more of the test accuracy than `forget.budget`.
    """

    label, colour, marker = "SSD", "#6a994e", "s"

    class Settings(CheckedSettings):
        """Settings of SSD."""

        tune: Literal["auto", "fixed"] = Field(
            default="auto",
            description="auto: alpha and lambda by what held-out images get; fixed, as where one is named: these",
        )
        alpha: float = Field(
            default=2.0,
            ge=0,
            description="selection threshold (fixed); at N/n_f of the forget clients and above it selects nothing",
        )
        lambda_: float = Field(default=1.0, ge=0, description="dampening strength (fixed); 0 zeroes what is selected")
        exponent: float = Field(default=1.0, ge=0, le=100, description="power of the dampening factor")
        loss_head: Literal["class", "client"] = Field(default="class", description="whose loss the Fisher is of")
        estimator: Literal["per_example", "batch"] = Field(default="per_example", description="of the Fisher")
        temperature: float = Field(
            default=1.0, ge=1e-3, le=1e6, description="that class logits are divided by; above 1 memorised images count"
        )
        precision: Precision = Field(default="fp32", description="of the Fisher's forward and backward passes")
        retain_fraction: float = Field(
            default=1.0,
            ge=1e-6,
            le=1,
            description="of each retain client's images, at random, that the Fisher is taken of",
        )

        @model_validator(mode="before")
        @classmethod
        def _named_strength_is_fixed(cls, given: dict[str, Any]) -> dict[str, Any]:
            named = given.keys() & {"alpha", "lambda_"}
            return {"tune": "fixed"} | given if named else given

    def check(self, config: Config) -> None:
        """Refuse the client head's Fisher where there is no client head."""
        if self.settings.loss_head == "client" and not config.model.client_head:
            raise UserError("unlearn.loss_head=client needs model.client_head=true")

    @client_task(sends=parameters, check=nonnegative)
    @staticmethod
    def fisher(
        client: Client, model: TwoHeadModel, settings: "SelectiveDampening.Settings", *, fraction: float = 1.0
    ) -> Tensors:
        """Its diagonal Fisher: the mean over its images of the squared gradient, a parameter."""
        return diagonal_fisher(
            model,
            client.sample(fraction),
            loss_head=settings.loss_head,
            estimator=settings.estimator,
            precision=settings.precision,
        )

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Collect Fishers, dampen, and train the client head."""
        settings, search = self.settings, {}
        full, forget_fisher = self.fishers(federation, forget)
        strength = {"alpha": settings.alpha, "lambda_": settings.lambda_}
        if settings.tune == "auto":
            estimate = federation.estimate_retrained(federation.predictions())
            predicted = estimate.expected_accuracy(total_counts(federation.class_counts(forget).values()))
            trials = self.search(federation, forget, full, forget_fisher, predicted)
            sound = min(trials[0]["test"], estimate.total.class_accuracy) - federation.config.forget.budget
            chosen = nearest([trial for trial in trials if trial["test"] >= sound], predicted)
            strength = {name: chosen[name] for name in strength}
            search = {"predicted": predicted, "trials": trials}
        self.dampen(federation, full, forget_fisher, **strength)
        federation.recalibrate_client_head()
        selected = selected_fraction(full, forget_fisher, alpha=strength["alpha"])
        return {**strength, "exponent": settings.exponent, **search, "selected": selected}

    def fishers(self, federation: Federation, forget: ForgetSet) -> tuple[Tensors, Tensors]:
        """Collect F_D over all clients and F_f over the forget clients; warn of an alpha that selects nothing."""
        settings = self.settings
        fraction, temperature = settings.retain_fraction, settings.temperature
        if settings.estimator == "per_example":
            federation.say_fisher_cost(settings.loss_head)
        found = collect_fishers(federation, self.fisher, forget, fraction=fraction, temperature=temperature)
        n_forget = federation.examples(forget)
        n = n_forget + federation.examples(federation.retain)
        limit = largest_alpha(n, n_forget)
        if settings.tune == "fixed" and settings.alpha >= limit:
            log.warning(
                "── unlearn.alpha=%g selects nothing: for this forget set, of %d of %d examples, take less than %.2f",
                settings.alpha, n_forget, n, limit,
            )  # fmt: skip
        return found

    def dampen(
        self, federation: Federation, full: Tensors, forget_fisher: Tensors, *, alpha: float, lambda_: float
    ) -> None:
        """Dampen the present model (Eq. 8-9)."""
        with federation.editing() as model:
            params = {name: value.detach() for name, value in model.named_parameters()}
            exponent = self.settings.exponent
            with unusable_replies():
                dampened = dampen(params, full, forget_fisher, alpha=alpha, lambda_=lambda_, exponent=exponent)
            model.load_state_dict(dampened, strict=False)

    def search(
        self, federation: Federation, forget: ForgetSet, full: Tensors, forget_fisher: Tensors, target: float
    ) -> list[dict[str, float]]:
        """Try strengths: nothing at all, then with each lambda of `BISECTED` a bisection of log alpha for `target`.

        Alpha is between lambda, below which nothing changes (no factor is above 1), and where nothing is selected. What
        the model knows well has small gradients, and is reached by an alpha below 1 only. The forget clients count
        their accuracy once a trial, and that is all that they are asked. The state is as before in the end.

        Returns:
            A row a trial: alpha, lambda_, class accuracy and loss on the forget clients' images, test accuracy.
        """
        before = federation.state
        n_forget = federation.examples(forget)
        nothing = largest_alpha(n_forget + federation.examples(federation.retain), n_forget)

        def tried(alpha: float, lambda_: float) -> dict[str, float]:
            federation.state = before
            self.dampen(federation, full, forget_fisher, alpha=alpha, lambda_=lambda_)
            federation.recalibrate_batch_norm()
            found = federation.counts(forget)
            test = federation.predictions().total.class_accuracy
            return {
                "alpha": alpha,
                "lambda_": lambda_,
                "forgotten": found.class_accuracy,
                "loss": found.mean_loss,
                "test": test,
            }

        trials = [tried(nothing, 1.0)]
        for lambda_, times in BISECTED.items():
            low, high = math.log(lambda_), math.log(nothing)
            for _ in range(times):
                middle = (low + high) / 2
                trials.append(tried(math.exp(middle), lambda_))
                low, high = (middle, high) if trials[-1]["forgotten"] < target else (low, middle)
        federation.state = before
        return trials


def collect_fishers(
    federation: Federation, task: ClientTask, forget: ForgetSet, *, fraction: float, temperature: float
) -> tuple[Tensors, Tensors]:
    """Collect F_D over all clients and F_f over the forget clients, means over examples.

    Args:
        task: gives a client's Fisher, of a `fraction` of its images.
        fraction: of each retain client's images; with less than 1 their part of F_D is estimated.
        temperature: that class logits are divided by meanwhile. The Fishers are by the weights as they are.
    """
    with federation.softened(temperature):
        asked = federation.run(task, on=forget)
        retain = federation.run(task, on=federation.retain, fraction=fraction)

    def hardened(name: str, value: Tensor) -> Tensor:
        last = name.startswith(SOFTENED)  # the clients had this layer divided by the temperature
        return (value / temperature**2 if last else value).to(federation.server.device)

    n = retain.weight + asked.weight
    full = {name: hardened(name, (retain.tensors[name] + f) / n) for name, f in asked.tensors.items()}
    return full, {name: hardened(name, f) for name, f in asked.mean().items()}


def nearest(trials: list[dict[str, float]], target: float) -> dict[str, float]:
    """Choose the trial of a forget accuracy nearest to `target`; of those within `CLOSE`, the best on test images."""
    close = [trial for trial in trials if abs(trial["forgotten"] - target) <= CLOSE]
    return max(close, key=lambda t: t["test"]) if close else min(trials, key=lambda t: abs(t["forgotten"] - target))
