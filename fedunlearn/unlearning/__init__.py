"""Provide what unlearning is made of, as functions of tensors."""
