"""Table 1: the grid, one cell, its schema."""
