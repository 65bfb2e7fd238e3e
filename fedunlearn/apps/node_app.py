"""What Flower loads on a node. It hands every message on to the client app, and imports no torch itself.

Flower starts a process for every message to a real machine. There the client app is in a process that stays.
"""

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedunlearn.apps import resident
from fedunlearn.config import state_home
from fedunlearn.errors import OneLine
from fedunlearn.federation.machine import Machine

CLIENT_APP = "fedunlearn.apps.client_app:app"

logging.getLogger("flwr").addFilter(OneLine())

app = ClientApp()


@app.train()
@app.evaluate()
@app.query()
@app.query("identify")
def hand_on(message: Message, context: Context) -> Message:
    """Let the client app answer: in this process in a simulation, else in the machine's own."""
    machine = Machine.of(context.node_config)
    if machine:
        return resident.answer(message, context, CLIENT_APP, state_home(machine.home) / "resident")
    return resident.app_of(CLIENT_APP)(message, context)
