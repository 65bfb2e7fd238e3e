"""The model on the server, and what the server keeps beside it between rounds."""

from typing import Any

import torch
from torch import Tensor

from fedunlearn.build import model_of
from fedunlearn.federation.client import Worker
from fedunlearn.nn.client_head import train_client_head
from fedunlearn.nn.evaluate import Predictions
from fedunlearn.nn.rng import generator_of
from fedunlearn.runs.ledger import Request
from fedunlearn.runs.run import Run
from fedunlearn.unlearning.pruning import prune_clients

HEAD = 2**32 - 1  # where the client head's draws are used: no client has this number


class ServerModel:
    """theta, moved by what clients answer; its momentum; which weights are held where they are; and what earlier
    rounds' models answered on unseen images.

    Attributes:
        model: the worker's.
        momentum: by parameter, while `train.server_momentum` is above 0.
        held: by parameter, true for weights that rounds of training move less (`freedom`), in the end not at all.
        answers: by round (its number, as text), probabilities of the unseen images' classes, [N, K] in half precision,
            since the last request.
    """

    def __init__(self, run: Run, worker: Worker) -> None:
        self.run, self.worker, self.config = run, worker, run.config
        self.model = worker.model
        self.momentum: dict[str, Tensor] = {}
        self.held: dict[str, Tensor] = {}
        self.answers: dict[str, Tensor] = {}

    def step(self, movement: dict[str, Tensor], moments: dict[int, Tensor], round_: int) -> None:
        """`advance` by the clients' mean movement, then `train_head` from their embeddings' moments."""
        self.advance(movement, round_)
        self.train_head(moments, round_)

    def advance(self, movement: dict[str, Tensor], round_: int) -> None:
        """theta += m, m = beta m + movement, the mean of (theta_c - theta) over the clients' examples.

        Where weights are held, movement is times `freedom`.

        beta is `train.server_momentum` (Hsu et al., 2019, "Measuring the Effects of Non-Identical Data Distribution for
        Federated Visual Classification"); statistics of BatchNorm have no momentum.
        """
        moved = {name: by.to(self.worker.device) for name, by in movement.items()}
        beta, freedom = self.config.train.server_momentum, self.freedom(round_)
        for name, held in self.held.items():
            moved[name] = torch.where(held, freedom * moved[name], moved[name])
        for name, _ in self.model.named_parameters() if beta else ():
            moved[name] = moved[name] + beta * self.momentum.get(name, 0)
            self.momentum[name] = moved[name]
        self.move(moved)

    def freedom(self, round_: int) -> float:
        """Of held weights in a round: the share of the learning rate's fall that is still to come, squared.

        While much is still to learn held weights move too, or learning would stop; at its end they do not move. A rate
        that never falls has no end that could be waited for: there they do not move from the request on.
        """
        first, now, last = map(self.worker.learning_rate, (1, round_, self.config.rounds))
        return ((now - last) / (first - last)) ** 2 if first > last else 0.0

    def move(self, movement: dict[str, Tensor]) -> None:
        """theta += movement, held or not."""
        theta = self.model.state_dict()
        moved = {name: theta[name] + by.to(self.worker.device) for name, by in movement.items()}
        self.model.load_state_dict(moved, strict=False)

    def train_head(self, moments: dict[int, Tensor], round_: int) -> None:
        """Train the client head from the moments of clients' embeddings, where they sent any; they are not kept."""
        if moments:
            there = {client: value.to(self.worker.device) for client, value in moments.items()}
            generator = generator_of(self.config.seed, round_, HEAD)
            steps = self.config.train.head_steps
            train_client_head(self.model.client_head, there, steps=steps, generator=generator)

    def remember(self, said: Predictions, round_: int) -> None:
        """Keep what the model says of the unseen images after a round."""
        self.answers[str(round_)] = said.class_probs.half()

    def cut_off(self) -> None:
        """Keep nothing of the rounds before a request but the model and what is held: momentum is a sum of past
        movements, of those who leave too, and models that knew them gave the answers."""
        self.momentum.clear()
        self.answers.clear()

    @torch.no_grad()
    def hold(self, before: dict[str, Tensor], share: float) -> None:
        """From now on hold that share of the weights that moved most since `before`, by their layer's measure:
        |move| / root mean square of the layer's moves. None of those that tie with the last one; those held before
        stay held."""
        moves = {name: (value - before[name]).abs() for name, value in self.model.named_parameters()}
        relative = {name: move / move.square().mean().sqrt().clamp(min=1e-12) for name, move in moves.items()}
        everything = torch.cat([value.flatten() for value in relative.values()])
        count = round((1 - share) * len(everything))
        least = everything.kthvalue(count).values if count else -1.0
        for name, value in relative.items():
            self.held[name] = (value > least) | self.held.get(name, False)

    def begin_anew(self, leaving: list[int]) -> None:
        """Back to the run's initial weights, nothing beside; pruned are the neurons of all who left or leave."""
        self.cut_off()
        self.held.clear()
        pruned = self.model.pruned.nonzero()[:, 0].tolist()
        self.model.load_state_dict(model_of(self.config, self.worker.dataset).state_dict())
        prune_clients(self.model, [*pruned, *leaving])

    def beside(self) -> dict[str, Tensor]:
        """What is kept beside the model, by names as in a checkpoint."""
        kept = {"momentum": self.momentum, "held": self.held, "answers": self.answers}
        return {f"{kind}.{name}": value for kind, tensors in kept.items() for name, value in tensors.items()}

    def commit(self, round_: int, request: Request | None = None, **detail: Any) -> Request | None:
        """`Run.commit` of all of it."""
        return self.run.commit(self.model, round_, request, beside=self.beside(), **detail)

    def restore(self) -> int:
        """Take all of it from the run's checkpoint, if there is one; returns its round."""
        round_, kept = self.run.restore(self.model)
        for kind, tensors in (("momentum", self.momentum), ("held", self.held), ("answers", self.answers)):
            tensors.clear()
            tensors |= {n.removeprefix(f"{kind}."): value for n, value in kept.items() if n.startswith(f"{kind}.")}
        return round_
