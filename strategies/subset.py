"""The paper's pipeline, made to last: Fisher diagonals, dampening within a budget, relabelling, pruning."""

from logging import getLogger
from typing import Any, Literal

from pydantic import Field

from fedunlearn.errors import unusable_replies
from fedunlearn.federation.client import Client
from fedunlearn.federation.handle import Federation, ForgetSet
from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.tasks import client_task, nonnegative, parameters
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.unlearning.dampening import dampen, dampening_cost, selected_fraction, strongest_alpha
from fedunlearn.unlearning.fisher import diagonal_fisher
from strategies.relabel import Relabelling
from strategies.ssd import collect_fishers

log = getLogger("fedunlearn")


class SubsetUnlearning(Relabelling):
    """Change theta by delta so that D_f is forgotten, within 1/2 delta^T F_D delta <= epsilon (paper, Eq. 17-18).

    Two deltas answer this problem in turn, both of them by the Fisher F_D.

    1. Dampening: theta_i *= min(lambda F_D,i / F_f,i, 1) where F_f,i > alpha F_D,i (Eq. 8-9). It is the paper's answer
       where a loss as high as possible is wanted of D_f, and F_D is its diagonal. Here alpha is as small as epsilon
       allows (`unlearning.dampening.strongest_alpha`).
    2. Relabelling: delta = -(F_D + damping)^-1 g, where the predictions of the retrained model are wanted of D_f, and g
       is the gradient towards them. F_D has Kronecker factors A (x) G there (Martens and Grosse, 2015), of the server's
       held-out images. `Relabelling` says the rest: correction, repair, frozen weights.

    Dampening raises the loss of D_f, and training that carries on would lower it again along the same way. After
    relabelling the loss is as low as it will be, so that there is no way back. Pruning of the forget clients' neurons
    is the run's own (Algorithm 1, line 6).
    """

    label, colour, marker = "dampen + relabel (ours)", "#2a6f97", "o"

    class Settings(Relabelling.Settings):
        """Settings of the pipeline."""

        guide: Literal["inputs", "kronecker", "diagonal"] = Field(
            default="kronecker", description=Relabelling.Settings.model_fields["guide"].description
        )
        epsilon: float = Field(
            default=1e-4,
            ge=0,
            le=1e6,
            description="budget of dampening: what it may add to the softened loss on all clients' images, to second "
            "order (Eq. 18), in nats; 0 asks for no Fisher and dampens nothing",
        )
        lambda_: float = Field(default=1.0, ge=0, description="dampening strength; 0 zeroes what is selected")
        fisher_fraction: float = Field(
            default=0.1, ge=1e-6, le=1, description="of each retain client's images that its Fisher is taken of"
        )
        lr: float = Field(default=0.12, ge=0, le=100, description=Relabelling.Settings.model_fields["lr"].description)

    @client_task(sends=parameters, dtype="bf16", check=nonnegative)
    @staticmethod
    def fisher(client: Client, model: TwoHeadModel, settings: Settings, *, fraction: float = 1.0) -> Tensors:
        """Its diagonal Fisher: the mean over its images of the squared gradient, a parameter."""
        return diagonal_fisher(model, client.sample(fraction), precision=client.precision)

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Dampen within the budget, relabel what is known too well, and freeze.

        Returns:
            What `Relabelling.forget` does, and of dampening `alpha`, `lambda_`, `selected` (the fraction of weights)
            and `spent` (of epsilon, in nats), with a budget.
        """
        before, goal = federation.state, self.goal(federation, forget)
        dampened = self.dampen_within_budget(federation, forget) if self.settings.epsilon else {}
        return self.relabel_and_freeze(federation, goal, since=before) | dampened

    def dampen_within_budget(self, federation: Federation, forget: ForgetSet) -> dict[str, float]:
        """Dampen as strongly as epsilon allows; returns what the receipt says of it."""
        settings = self.settings
        log.info("── Fisher diagonals of %d forget and %d retain clients", len(forget), len(federation.retain))
        federation.say_fisher_cost()
        fraction, temperature = settings.fisher_fraction, settings.temperature
        full, forget_fisher = collect_fishers(
            federation, self.fisher, forget, fraction=fraction, temperature=temperature
        )
        with federation.editing() as model, unusable_replies():
            params = {name: value.detach().clone() for name, value in model.named_parameters()}
            alpha = strongest_alpha(params, full, forget_fisher, budget=settings.epsilon, lambda_=settings.lambda_)
            dampened = dampen(params, full, forget_fisher, alpha=alpha, lambda_=settings.lambda_)
            model.load_state_dict(dampened, strict=False)
        selected = selected_fraction(full, forget_fisher, alpha=alpha)
        spent = dampening_cost(params, dampened, full)
        log.info(
            "── dampening %.2g of the weights (alpha %.3g, lambda %g), which spends %.2g of %g nats",
            selected, alpha, settings.lambda_, spent, settings.epsilon,
        )  # fmt: skip
        return {"alpha": alpha, "lambda_": settings.lambda_, "selected": selected, "spent": spent}
