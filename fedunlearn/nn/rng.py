"""Make random draws that depend on where they are used and on nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Let what draws without a generator, as new layers and dropout do, draw with the seed of this one meanwhile.

    Args:
        generator: whose first seed is taken; it is as before at the end.

    Example:
        >>> draws = []
        >>> for _ in range(2):
        ...     with drawing_from(generator_of(0, 1)):
        ...         draws.append(torch.rand(()))
        >>> bool(draws[0] == draws[1])
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        yield
