"""What the nets are trained on: a source and a seed become tensors."""
