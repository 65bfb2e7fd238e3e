"""Flower looks here for the two components of the app."""

from pathlib import Path

from fedunlearn.apps import client_app as on_the_nodes
from fedunlearn.apps import server_app as on_the_server

client_app = on_the_nodes.app
server_app = on_the_server.server_app(Path(__file__).parent / "conf")
