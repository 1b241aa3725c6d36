"""Malformed input of every format that is read from outside, through the verbs that read it."""
