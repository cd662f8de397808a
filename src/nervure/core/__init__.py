"""Floor 3: primitives on torch that more than one paper needs."""

from nervure.core.budget import Meter

__all__ = ["Meter"]
