"""The sections of bench.py."""
