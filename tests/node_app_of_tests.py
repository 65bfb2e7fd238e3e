"""A client app that imports no torch: it says in which process it is, and does what a message says."""

import os
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedunlearn.errors import UserError

app = ClientApp()


class ManyError(UserError):
    """Cannot be pickled: it is not made of what it says."""

    def __init__(self, things, kind):
        super().__init__(f"{things} {kind}")


@app.query()
def answer(message, context):
    wanted = message.content["do"]["what"]
    if wanted == "fail":
        raise ValueError("no such thing")
    if wanted == "fail in its own way":
        raise ManyError(3, "things")
    if wanted == "end":
        os._exit(1)
    if wanted == "wait":
        time.sleep(60)
    return Message(
        RecordDict({"about": ConfigRecord({"pid": os.getpid(), "home": str(context.node_id)})}), reply_to=message
    )
