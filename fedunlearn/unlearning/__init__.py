"""What unlearning is made of, as functions of tensors."""
