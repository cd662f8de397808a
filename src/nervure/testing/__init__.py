"""The contracts and saboteurs, shipped for plugins.

from nervure.testing import PrunerContract

class TestMine(PrunerContract):
def method(self):
return Mine()
"""

from __future__ import annotations

import importlib
from typing import Any

from nervure.testing.toy import ToyTask, toy_task

_CONTRACTS = (
    "ChannelPrunerContract",
    "ContinualLearnerContract",
    "DiagnosticContract",
    "InitialiserContract",
    "KernelContract",
    "LayerContract",
    "LossContract",
    "OptimizerContract",
    "PrunerContract",
    "SearcherContract",
    "TrainingRuleContract",
)
__all__ = ["ToyTask", "toy_task"]


def __getattr__(name: str) -> Any:
    """Import a contract on its first use.

    Raises:
        AttributeError: If there is none of that name.
    """
    if name in _CONTRACTS:
        return getattr(importlib.import_module("nervure.testing.contracts"), name)
    raise AttributeError(f"module 'nervure.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_CONTRACTS])
