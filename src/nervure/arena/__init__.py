"""Floor 5: the fair protocols of compare, and the concrete context of claims."""

from nervure.arena.context import Context
from nervure.arena.measure import find_claim, measure

__all__ = ["Context", "find_claim", "measure"]
