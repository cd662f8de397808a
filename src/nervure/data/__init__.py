"""Data sets: bundled, synthetic and the user's own."""
