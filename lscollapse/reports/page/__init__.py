"""Run folders -> one self-contained page that opens from disk."""
