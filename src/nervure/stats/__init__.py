"""Floor 2: paired intervals and the verdict rule."""
