"""Provide images: data sets, who owns which image, batches."""
