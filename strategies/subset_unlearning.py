"""The project's own strategy: the leaving clients teach the model what it would say had it never seen their images."""

from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from strategies import wire
from strategies.federation import NoAnswerError
from strategies.forgetting import add_cost
from strategies.ssd import SelectiveDampening


class SubsetUnlearning(SelectiveDampening):
    """theta <- theta + (1 - w) mean of n_r (theta_r - theta) + w mean of n_f (theta_f - theta), `unlearn.rounds` times.

    The server shows the leaving clients f what the model says of its own, unseen images. Each of them matches these
    answers to its images (`unseen.match_answers`) and trains the model to give them, while the retained clients r
    train on as ever; w is `unlearn.weight`. So D_f gets the answers that unseen data gets, and the loss on D_r stays
    near zero: no gradient is left that would bring the old answers back when training goes on. BatchNorm statistics
    are those of the retained clients, estimated again at the end; the leaving clients' neurons are pruned. Nothing is
    kept.
    """

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Rounds of leaving and staying clients together, then BatchNorm again."""
        settings, teacher = self.config.unlearn, self.teacher()
        params = [name for name, _ in self.model.named_parameters()]
        for round_ in range(self.round + 1, self.round + 1 + settings.rounds):
            stay = self.ask_to_train("train", grid, round_, self.active, lr=settings.lr)
            leave = self.ask_to_train("train.unlearn", grid, round_, leaving, lr=settings.lr, teacher=teacher)
            if not stay.counts:
                raise NoAnswerError("no retained client answered")
            if missing := sorted(set(leaving) - leave.counts.keys()):
                raise NoAnswerError(f"client {missing[0]} did not answer the request to unlearn")
            add_cost(costs, "retained", stay.cost)
            add_cost(costs, "leaving", leave.cost)
            movement, away = self.mean_movement(stay), self.mean_movement(leave)
            for name in params:
                movement[name] = (1 - settings.weight) * movement[name] + settings.weight * away[name]
            self.move(movement)
        if settings.recalibrate:
            self.recalibrate(grid, costs)
        return {"rounds": settings.rounds, "weight": settings.weight}

    def teacher(self) -> ArrayRecord:
        """The model as it is, and what it says of the server's unseen images."""
        said = self.worker.predict_test()
        answers = {"answers": said.class_probs, "answer_labels": said.class_labels}
        return wire.packed(self.model.state_dict() | answers, "fp32")
