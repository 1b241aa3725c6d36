"""What the theorems promise for a checkpoint, beside the lambda that it needs."""
