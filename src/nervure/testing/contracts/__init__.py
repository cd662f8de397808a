"""Contracts: classes of named checks. A plugin subclasses one, says how its method is made, and runs pytest."""

from nervure.testing.contracts.base import Contract, ZooContract
from nervure.testing.contracts.channels import ChannelPrunerContract
from nervure.testing.contracts.search import SearcherContract
from nervure.testing.contracts.training import (
    ContinualLearnerContract,
    LayerContract,
    LossContract,
    OptimizerContract,
    TrainingRuleContract,
)
from nervure.testing.contracts.whole_model import (
    DiagnosticContract,
    InitialiserContract,
    KernelContract,
    PrunerContract,
)

CONTRACTS: dict[str, type[Contract]] = {
    "pruner": PrunerContract,
    "channel-pruner": ChannelPrunerContract,
    "initialiser": InitialiserContract,
    "optimizer": OptimizerContract,
    "loss": LossContract,
    "layer": LayerContract,
    "diagnostic": DiagnosticContract,
    "kernel": KernelContract,
    "continual-learner": ContinualLearnerContract,
    "training-rule": TrainingRuleContract,
    "searcher": SearcherContract,
}

__all__ = [
    "CONTRACTS",
    "ChannelPrunerContract",
    "ContinualLearnerContract",
    "Contract",
    "DiagnosticContract",
    "InitialiserContract",
    "KernelContract",
    "LayerContract",
    "LossContract",
    "OptimizerContract",
    "PrunerContract",
    "SearcherContract",
    "TrainingRuleContract",
    "ZooContract",
]
