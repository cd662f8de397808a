"""Floor 5: the fair protocols of compare, and the concrete context of claims."""
