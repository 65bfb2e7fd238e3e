"""Provide the model, how it is trained and how it is evaluated."""
