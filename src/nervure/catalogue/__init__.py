"""Floor 2: the index of cards and its search."""
