"""Floor 5: small models, each with one property that breaks naive methods, tagged by it."""

from nervure.zoo.cases import Case, build, case, cases, names

__all__ = ["Case", "build", "case", "cases", "names"]
