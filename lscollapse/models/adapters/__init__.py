"""Checkpoints of every architecture, seen as embed, a stack of blocks, head."""
