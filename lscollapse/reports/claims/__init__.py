"""The paper's sentences as predicates on the table."""
