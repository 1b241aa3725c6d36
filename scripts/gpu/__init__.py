"""What gpu_check.py runs on a card, and what gpu_cost.py counts without one."""
