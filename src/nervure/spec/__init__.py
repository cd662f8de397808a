"""Floor 1: the vocabulary every other floor speaks. Standard library only; torch appears in type hints alone."""

from nervure.spec.card import FAMILIES, PROTOCOLS, Card
from nervure.spec.claim import Check, Claim, claim, claims_of
from nervure.spec.job import Job, Measurement, Notes, Record, Status, canonical_json
from nervure.spec.paper import Paper, arxiv_id
from nervure.spec.protocols import (
    Batch,
    Budget,
    Compressed,
    ContinualLearner,
    Ctx,
    Data,
    Pruner,
    Searcher,
    Task,
    TrainingRule,
)
from nervure.spec.verdict import CheckResult, Outcome, Verdict

__all__ = [
    "FAMILIES",
    "PROTOCOLS",
    "Batch",
    "Budget",
    "Card",
    "Check",
    "CheckResult",
    "Claim",
    "Compressed",
    "ContinualLearner",
    "Ctx",
    "Data",
    "Job",
    "Measurement",
    "Notes",
    "Outcome",
    "Paper",
    "Pruner",
    "Record",
    "Searcher",
    "Status",
    "Task",
    "TrainingRule",
    "Verdict",
    "arxiv_id",
    "canonical_json",
    "claim",
    "claims_of",
]
