"""Finished run folders -> verdicts, figures, pages; no torch."""
