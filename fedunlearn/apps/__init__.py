"""What people and Flower start."""
