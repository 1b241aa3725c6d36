"""Typer verbs and their options."""
