"""Configuration -> run folder: load, plan memory, cut, share out, train."""
