"""Nets that this package trains itself."""
