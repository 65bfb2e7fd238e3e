"""The server, the clients, and what they say to each other."""
