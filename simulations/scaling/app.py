"""Flower looks here for what runs on the server; what runs on nodes is `fedunlearn.apps.node_app`."""

from pathlib import Path

from fedunlearn.apps import server_app as on_the_server

server_app = on_the_server.server_app(Path(__file__).parent / "conf")
