"""Training loops and training rules."""
