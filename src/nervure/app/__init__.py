"""Floor 8: run, compare, find and export as functions."""
