"""How numbers are held: X carried in a scale, modules in float64, attention scores."""
