"""Random draws that depend on where they are used and on nothing else."""

import numpy as np
import torch


def generator_of(seed: int, *place: int) -> torch.Generator:
    """Random draws that depend on the seed and on where they are used (round, client, ...) alone.

    Zeros at the end of a place do not count: a client's draws of a round are those of its epoch 0.
    """
    state = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
