"""What a simulation runs on. Nothing here imports Flower or Ray."""

import os
from dataclasses import asdict, dataclass

from fedunlearn.errors import UserError


@dataclass(frozen=True)
class Resources:
    """What a simulation runs on.

    Attributes:
        engine: `ray` (several worker processes), or `local` (this process alone, ready at once).
        nodes: virtual nodes.
        cpus: of a node while it works; with `workers` all of them.
        gpus: GPU fraction of a node while it works.
        workers: Ray's worker processes; 0 for as many as the machine's CPUs hold.
    """

    engine: str = "ray"
    nodes: int = 10
    cpus: int = 1
    gpus: float = 0.0
    workers: int = 0

    def options(self, *names: str, usual: bool = True) -> list[str]:
        """Write them as options of a command.

        Args:
            names: which; all by default.
            usual: whether also those that are at their defaults.

        Example:
            >>> Resources(nodes=4).options("engine", "nodes"), Resources(nodes=4).options(usual=False)
            (['--engine=ray', '--nodes=4'], ['--nodes=4'])
        """
        own, defaults = asdict(self), asdict(Resources())
        chosen = [name for name in names or own if usual or own[name] != defaults[name]]
        return [f"--{name}={own[name]}" for name in chosen]

    def check(self) -> None:
        """Raise UserError for what no simulation can have."""
        if self.engine not in ("ray", "local"):
            raise UserError(f"--engine {self.engine} is not one of ray, local")
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes} is too few: a simulation has at least 1")
        if self.cpus < 1:
            raise UserError(f"--cpus {self.cpus} is too few: a node needs at least 1")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers} is too few: 0 takes as many as the CPUs hold")
        if self.gpus < 0:
            raise UserError(f"--gpus {self.gpus:g} is too few: 0 takes none")
        here = os.cpu_count() or 1
        if self.engine == "ray" and self.cpus > here and not os.environ.get("RAY_ADDRESS"):
            raise UserError(f"--cpus {self.cpus} of a node: this machine has {here} in all")
        if self.gpus:
            import torch

            if not torch.cuda.is_available():
                raise UserError(f"--gpus {self.gpus:g}: there is no GPU here, leave it out")
