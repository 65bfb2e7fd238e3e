"""Which way updates point: those of honest clients, and the same ones turned round.

Federations of digits (600 images, width 8, six clients) train 40 honest rounds under `robust=median`, from an untrained
model on. What `fedunlearn.federation.direction` finds of every update, and would find of its opposite, is counted.
"""

from pathlib import Path
from unittest.mock import patch

from benchmarks import timing
from benchmarks.reliability.liars import trained
from benchmarks.reliability.lying import LyingGrid
from fedunlearn.federation import direction
from fedunlearn.federation.replies import RefusedError
from fedunlearn.runs.uncertainty import Estimate

ALPHAS = (0.01, 0.1, 0.6, 100)
WORDS = "data.limit=600 clients=6 model.width=8 rounds=40 evaluate_every=40 robust=median seed={seed} "
SPLIT = "partition.dirichlet_alpha={alpha}"
check = direction.check_direction


def measure(home: Path, seeds: int) -> None:
    """Print one table: by how uneven the split is, what is found of honest updates and of their opposites."""
    rows = []
    for alpha in ALPHAS:
        honest: list[Estimate] = []
        refused = [0, 0]

        def look(*about, refused: list[int] = refused, honest: list[Estimate] = honest) -> None:
            probs, of_opposite, *client = about
            honest.append(direction.lost_by(*about))
            for place, pair in enumerate(((probs, of_opposite), (of_opposite, probs))):
                try:
                    check(*pair, *client)
                except RefusedError:
                    refused[place] += 1

        with patch.object(direction, "check_direction", look):
            for seed in range(seeds):
                trained(home, f"{alpha}-{seed}", WORDS.format(seed=seed) + SPLIT.format(alpha=alpha), LyingGrid(None))
        most = max(honest, key=lambda found: found.value)
        n = len(honest)
        rows.append([alpha, n, f"{refused[0]} of {n}", str(most), f"{refused[1]} of {n}"])
        print(*rows[-1], flush=True)
    columns = ("Dirichlet", "updates", "honest: refused", "opposite better by, at most", "turned round: refused")
    timing.table("which way updates point", columns, rows)
