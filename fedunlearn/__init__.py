"""Federated unlearning: a shared two-head model that can forget one of its clients."""

__version__ = "0.1.0"
