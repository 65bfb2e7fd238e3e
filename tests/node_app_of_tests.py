"""A client app that imports no torch: it says in which process it is, and does what a message says."""

import os
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def answer(message, context):
    wanted = message.content["do"]["what"]
    if wanted == "fail":
        raise ValueError("no such thing")
    if wanted == "end":
        os._exit(1)
    if wanted == "wait":
        time.sleep(60)
    return Message(
        RecordDict({"about": ConfigRecord({"pid": os.getpid(), "home": str(context.node_id)})}), reply_to=message
    )
