"""Images: data sets, whose they are, batches."""
