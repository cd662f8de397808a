"""The check-up of a user's network: what was measured, what it means, and which method would help."""

from nervure.audit.finding import LEVELS, Audit, Finding, Remedy
from nervure.audit.rounds import CHECKS, audit
from nervure.audit.subject import Subject

__all__ = ["CHECKS", "LEVELS", "Audit", "Finding", "Remedy", "Subject", "audit"]
