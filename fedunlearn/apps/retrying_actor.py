"""Flower's Ray worker, restarted when its process dies.

Flower 1.41 puts a dead actor back into its pool, last in and first out, where it answers every further message with an
error at once. Here Ray restarts the actor and repeats what it was doing, up to two times. What a worker replies
depends on its message alone, so that repeating it changes nothing.
"""

import logging
from collections.abc import Callable

import ray
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor

from fedunlearn import malloc


@ray.remote(max_restarts=-1, max_task_retries=2, runtime_env={"env_vars": malloc.ENVIRONMENT})
class RetryingActor(VirtualClientEngineActor):
    """Flower's `ClientAppActor` with restarts and retries, in a process of our `malloc.ENVIRONMENT`."""

    def __init__(self, on_actor_init_fn: Callable[[], None] | None = None) -> None:
        super().__init__()
        logging.getLogger("flwr").setLevel(logging.ERROR)  # else it warns of its own end
        if on_actor_init_fn:
            on_actor_init_fn()

    @ray.method(max_task_retries=0)  # an exit that is wanted is no failure
    def terminate(self) -> None:
        """As Flower's."""
        super().terminate()


def install() -> None:
    """Have Flower's simulations of this process use it; Flower has no setting for its actor class."""
    raybackend.ClientAppActor = RetryingActor  # pyright: ignore[reportPrivateImportUsage]
