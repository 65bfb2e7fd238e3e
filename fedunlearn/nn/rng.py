"""Make random draws that depend on where they are used and on nothing else."""

import numpy as np
import torch


def generator_of(seed: int, *place: int) -> torch.Generator:
    """Make a generator whose draws depend on the seed and on the place of use alone.

    Args:
        seed: of the run.
        place: where the draws are used, such as round, client and epoch; 0 or more each. Zeros at the end do not
            count: a client's draws of a round are those of its epoch 0.

    Returns:
        A new generator on the CPU.

    Example:
        >>> first, again, other = (torch.rand((), generator=generator_of(0, *at)) for at in [(1, 2), (1, 2), (2,)])
        >>> bool(first == again), bool(first == other)
        (True, False)
    """
    state = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
