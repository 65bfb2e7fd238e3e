"""Measure what a model still reveals about the forget clients."""
