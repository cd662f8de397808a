"""Floor 5: the fair protocols of compare, and the concrete context of claims."""

from nervure.arena.context import Context, OverBudget
from nervure.arena.measure import find_claim, measure

__all__ = ["Context", "OverBudget", "find_claim", "measure"]
