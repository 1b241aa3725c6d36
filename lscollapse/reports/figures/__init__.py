"""Table -> figure."""
