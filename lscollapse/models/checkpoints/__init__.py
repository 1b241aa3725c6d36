"""Checkpoints of any format, read."""
