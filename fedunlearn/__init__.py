"""Federated unlearning: ten clients train one model together, and it forgets the one that withdraws.

The public names are loaded when they are first used, so that a look at a run does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0.dev0"

if TYPE_CHECKING:
    from fedunlearn.composing import compose
    from fedunlearn.config import Config, Settings
    from fedunlearn.errors import NotNowError, UserError
    from fedunlearn.federation.client import Client
    from fedunlearn.federation.handle import Federation, ForgetSet
    from fedunlearn.federation.strategy import Strategy
    from fedunlearn.federation.tasks import Update, client_task
    from fedunlearn.live.handle import LiveRun
    from fedunlearn.live.starting import open_run, run
    from fedunlearn.runs.run import Run

_PUBLIC = {
    "Client": "fedunlearn.federation.client",
    "Config": "fedunlearn.config",
    "Federation": "fedunlearn.federation.handle",
    "ForgetSet": "fedunlearn.federation.handle",
    "LiveRun": "fedunlearn.live.handle",
    "NotNowError": "fedunlearn.errors",
    "Run": "fedunlearn.runs.run",
    "Settings": "fedunlearn.config",
    "Strategy": "fedunlearn.federation.strategy",
    "Update": "fedunlearn.federation.tasks",
    "UserError": "fedunlearn.errors",
    "client_task": "fedunlearn.federation.tasks",
    "compose": "fedunlearn.composing",
    "open_run": "fedunlearn.live.starting",
    "run": "fedunlearn.live.starting",
}

__all__ = [
    "Client",
    "Config",
    "Federation",
    "ForgetSet",
    "LiveRun",
    "NotNowError",
    "Run",
    "Settings",
    "Strategy",
    "Update",
    "UserError",
    "__version__",
    "client_task",
    "compose",
    "open_run",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fedunlearn' has no attribute {name!r}")
