"""Flower server strategies of fedunlearn, one algorithm a file, and what they share."""
