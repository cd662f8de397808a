"""Floor 9: the pages. No logic of its own: what they show comes from `nervure.app` and `nervure.catalogue`."""
