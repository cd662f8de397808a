"""Populations: n networks of one shape trained as one, each equal to being trained alone."""

from nervure.core.population.batched import cross_entropy
from nervure.core.population.engine import Backend
from nervure.core.population.optim import SGD, Adam, AdamW, Optimizer
from nervure.core.population.population import Population, Scores, order

__all__ = ["SGD", "Adam", "AdamW", "Backend", "Optimizer", "Population", "Scores", "cross_entropy", "order"]
