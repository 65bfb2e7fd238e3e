"""Unlearning strategies, one algorithm a file: what it does on the server and what it does on the clients."""
