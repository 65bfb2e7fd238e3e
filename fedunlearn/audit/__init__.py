"""What a model still knows of those who left."""
