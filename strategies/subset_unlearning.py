"""The project's own strategy (the paper's Algorithm 1, federated)."""

from strategies.ssd import SelectiveDampening


class SubsetUnlearning(SelectiveDampening):
    """To be."""
