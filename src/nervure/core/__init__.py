"""Floor 3: primitives on torch that more than one paper needs."""
