"""Tests of the tests: every saboteur is caught by its contract, for the right check, and the honest method passes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure._kit import BadData
from nervure.compress.robust_prune_init import Snip
from nervure.compress.structurally_prune_anything import Spa
from nervure.learn.mono_forward import MonoForward
from nervure.search.pbt import PBT
from nervure.search.space import Range
from nervure.testing import (
    ChannelPrunerContract,
    ContinualLearnerContract,
    DiagnosticContract,
    InitialiserContract,
    KernelContract,
    LayerContract,
    LossContract,
    OptimizerContract,
    PrunerContract,
    SearcherContract,
    TrainingRuleContract,
    matrix,
    saboteurs,
    table,
)
from nervure.testing.contracts import CONTRACTS

SMALL = ("mlp", "residual-conv", "dict-tuple")
CAUGHT = {
    "NoOp": "test_budget_is_met",
    "RandomScores": "test_scores_are_informed",
    "UnseededScores": "test_same_seed_same_result",
    "GlobalSeed": "test_what_is_the_users_is_untouched",
    "GlobalNoise": "test_same_seed_same_result",
    "StateLeaker": "test_same_seed_same_result",
    "ModeFlipper": "test_what_is_the_users_is_untouched",
    "HookLeaker": "test_what_is_the_users_is_untouched",
    "ParameterHookLeaker": "test_what_is_the_users_is_untouched",
    "GradEraser": "test_what_is_the_users_is_untouched",
    "Freezer": "test_what_is_the_users_is_untouched",
    "WeightToucher": "test_what_is_the_users_is_untouched",
    "DtypeChanger": "test_what_is_the_users_is_untouched",
    "GradSwitcher": "test_what_is_the_users_is_untouched",
    "Untidy": "test_untouched_after_an_exception",
    "WrongBudget": "test_budget_is_met",
    "LooseMasks": "test_outputs_and_training",
    "LyingReport": "test_report_equals_a_recount",
}


class HonestPruner(PrunerContract):
    cases = SMALL

    def method(self):
        return Snip()


class HonestChannelPruner(ChannelPrunerContract):
    cases = ("mlp", "residual-conv")

    def method(self):
        return Spa()


def broken(contract) -> set[str]:
    return {name.partition("[")[0] for name in contract.failures()}


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (saboteurs.MaskedChannels, "test_budget_is_met"),
        (saboteurs.HookedResult, "test_result_is_a_plain_smaller_network"),
        (saboteurs.FrozenResult, "test_result_is_a_plain_smaller_network"),
        (saboteurs.GlobalSeed, "test_what_is_the_users_is_untouched"),
        (saboteurs.StateLeaker, "test_same_seed_same_result"),
    ],
)
def test_channel_pruner_saboteurs_are_caught(kind, check, monkeypatch):
    monkeypatch.setattr(HonestChannelPruner, "test_new_process_same_results", lambda self: None)
    contract = type("Sabotaged", (HonestChannelPruner,), {"method": lambda self: kind(Spa())})()
    assert check in broken(contract)


def test_the_honest_channel_pruner_passes():
    assert HonestChannelPruner().failures() == {}


def test_the_honest_pruner_passes():
    assert HonestPruner().failures() == {}


@pytest.mark.parametrize("kind", saboteurs.PRUNERS, ids=lambda kind: kind.__name__)
def test_pruner_saboteurs_are_caught(kind, monkeypatch):
    # The new process runs the honest class of the file's name; it has its own test below.
    monkeypatch.setattr(HonestPruner, "test_new_process_same_results", lambda self: None)
    contract = type("Sabotaged", (HonestPruner,), {"method": lambda self: kind(Snip())})()
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    assert CAUGHT[kind.__name__] in broken(contract)
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before


class HashDependent(HonestPruner):
    """Depends on the order of a set of texts: the same in one process, another in the next."""

    cases = ("mlp",)

    def run(self, model, task, *, seed):
        made = super().run(model, task, seed=seed)
        with torch.no_grad():
            next(made.parameters()).mul_(1 + 1e-3 * (hash("weight") % 97))
        return made


def test_a_result_that_depends_on_the_process_is_caught():
    assert broken(HashDependent()) == {"test_new_process_same_results"}


class Works(HonestPruner):
    cases = ("mlp", "lstm")
    unsupported = {"lstm": "no reason at all"}  # noqa: RUF012


def test_a_stale_line_of_the_table_is_caught():
    assert "test_refusals" in broken(Works())


class HonestSGD(OptimizerContract):
    def make(self, parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_torch_optimizers_pass(make):
    contract = type("Own", (OptimizerContract,), {"make": lambda self, parameters: make(parameters, lr=0.01)})()
    assert contract.failures() == {}


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (saboteurs.StillOptimizer, "test_the_loss_falls"),
        (saboteurs.ForgetfulOptimizer, "test_state_resumes_exactly"),
        (saboteurs.GrouplessOptimizer, "test_groups_have_their_own_rate"),
    ],
)
def test_optimizer_saboteurs_are_caught(kind, check):
    contract = type("Own", (HonestSGD,), {"make": lambda self, parameters: kind(parameters, lr=0.1, momentum=0.9)})()
    assert check in broken(contract)


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        (F.cross_entropy, set()),
        (saboteurs.sum_loss_of_first, {"test_order_of_the_batch_does_not_matter"}),
        (saboteurs.detached_loss, {"test_gradient_is_right"}),
        (lambda outputs, targets: F.cross_entropy(outputs.mul_(2), targets), None),
        (lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"), None),
    ],
)
def test_losses(loss, wanted):
    contract = type("Own", (LossContract,), {"loss": lambda self: loss})()
    found = broken(contract)
    assert found == wanted if wanted is not None else "test_scalar_finite_and_untouched" in found


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (lambda: nn.Linear(2, 2), set()),
        (saboteurs.BatchMixer, {"test_samples_do_not_mix"}),
        (saboteurs.UnusedParameter, {"test_gradients_are_right"}),
    ],
)
def test_layers(kind, wanted):
    contract = type(
        "Own",
        (LayerContract,),
        {"layer": lambda self: kind(), "inputs": lambda self, count: torch.ones(count, 2).cumsum(0)},
    )()
    assert broken(contract) == wanted


def parameter_gram(model, inputs):
    rows = []
    for index in range(len(inputs)):
        score = model(inputs[index : index + 1]).sum()
        grads = torch.autograd.grad(score, list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    stacked = torch.stack(rows)
    return stacked @ stacked.T


@pytest.mark.parametrize(
    ("gram", "check"),
    [
        (parameter_gram, None),
        (lambda model, x: parameter_gram(model, x).triu(), "test_symmetric_and_positive"),
        (lambda model, x: -parameter_gram(model, x), "test_symmetric_and_positive"),
        (lambda model, x: parameter_gram(model, x) / len(x), "test_samples_do_not_mix"),
        (lambda model, x: parameter_gram(model.train(), x), "test_what_is_the_users_is_untouched"),
    ],
)
def test_kernels(gram, check):
    contract = type("Own", (KernelContract,), {
        "cases": ("mlp",), "gram": lambda self, model, inputs: gram(model, inputs),
        "test_new_process_same_results": lambda self: None,
    })()  # fmt: skip
    assert broken(contract) == set() if check is None else check in broken(contract)


def norms(model, task, seed):
    return {name: float(parameter.detach().norm()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("run", "check"),
    [
        (norms, None),
        (lambda model, task, seed: {"constant": 1.0}, "test_result_depends_on_the_model"),
        (lambda model, task, seed: {"nothing": float("nan")}, "test_result_is_finite"),
        (
            lambda model, task, seed: {**norms(model, task, seed), "noise": float(torch.rand(()))},
            "test_same_seed_same_result",
        ),
    ],
)
def test_diagnostics(run, check):
    contract = type("Own", (DiagnosticContract,), {
        "cases": ("mlp",), "run": lambda self, model, task, *, seed: run(model, task, seed),
        "test_new_process_same_results": lambda self: None,
        "test_untouched_after_an_exception": lambda self: None,
    })()  # fmt: skip
    assert broken(contract) == set() if check is None else check in broken(contract)


def orthogonal(model, task, seed):
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter, generator=draw)


def half(model, task, seed):
    orthogonal(model, task, seed)
    model.eval()


@pytest.mark.parametrize(
    ("initialise", "check"),
    [
        (orthogonal, None),
        (lambda model, task, seed: None, "test_weights_change_and_nothing_else"),
        (half, "test_weights_change_and_nothing_else"),
        (
            lambda model, task, seed: [nn.init.normal_(p) for p in model.parameters()],
            "test_what_is_the_users_is_untouched",
        ),
    ],
)
def test_initialisers(initialise, check):
    contract = type("Own", (InitialiserContract,), {
        "cases": ("mlp",), "initialise": lambda self, model, task, *, seed: initialise(model, task, seed),
        "test_new_process_same_results": lambda self: None,
    })()  # fmt: skip
    assert broken(contract) == set() if check is None else check in broken(contract)


class Anchor:
    """L2 to the old weights."""

    def __init__(self, model, sign=1.0):
        self.model, self.sign, self.old = model, sign, None

    def end_task(self, batches):
        self.old = [parameter.detach().clone() for parameter in self.model.parameters()]

    def penalty(self):
        pairs = zip(self.model.parameters(), self.old, strict=True)
        return self.sign * sum((new - old).square().sum() for new, old in pairs)


class Trains(Anchor):
    def end_task(self, batches):
        super().end_task(batches)
        self.model.eval()


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (Anchor, None),
        (lambda model: Anchor(model, sign=0.0), "test_penalty_pulls_back"),
        (Trains, "test_remembering_leaves_the_model_alone"),
    ],
)
def test_continual_learners(make, check):
    contract = type("Own", (ContinualLearnerContract,), {
        "cases": ("mlp",), "make": lambda self, model, task: make(model),
        "test_new_process_same_results": lambda self: None,
    })()  # fmt: skip
    assert broken(contract) == set() if check is None else check in broken(contract)


class Lazy(MonoForward):
    def step(self, batch):
        if len(batch[0]) != len(batch[1]):
            raise BadData("lengths differ")
        return {"loss": 0.0}


class Careless(MonoForward):
    def step(self, batch):
        found = super().step(batch)
        self.model.eval()
        return found


class Forgetful(MonoForward):
    def state_dict(self):
        return {
            **super().state_dict(),
            "optimizers": [made.__class__(made.param_groups[0]["params"]).state_dict() for made in self.optimizers],
        }


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (MonoForward, None),
        (Lazy, "test_it_learns"),
        (Careless, "test_modes_and_frozen_weights_stay"),
        (Forgetful, "test_resumes_exactly"),
    ],
)
def test_training_rules(kind, check):
    contract = type("Own", (TrainingRuleContract,), {
        "cases": ("mlp",), "make": lambda self, model, inputs: kind(model, inputs),
        "test_new_process_same_results": lambda self: None,
    })()  # fmt: skip
    assert broken(contract) == set() if check is None else check in broken(contract)


SPACE = {"a": Range(0.1, 1.0), "b": Range(0.1, 1.0)}


class Deaf(PBT):
    def tell(self, config, score):
        super().tell(config, 0.0)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (lambda seed: PBT(SPACE, members=4, seed=seed), None),
        (lambda seed: Deaf(SPACE, members=4, seed=seed), "test_it_learns_from_scores"),
        (lambda seed: PBT(SPACE, members=4, seed=3), "test_same_seed_same_proposals"),
        (
            lambda seed: PBT(SPACE, members=4, seed=torch.initial_seed() + int(torch.rand(()) * 99)),
            "test_same_seed_same_proposals",
        ),
    ],
)
def test_searchers(make, check):
    contract = type("Own", (SearcherContract,), {"make": lambda self, *, seed: make(seed)})()
    assert broken(contract) == set() if check is None else check in broken(contract)


def test_importing_the_package_loads_no_pytest():
    code = "import sys; from nervure.testing import toy_task, PrunerContract; print('pytest' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


def test_every_protocol_has_a_contract():
    from nervure.spec import PROTOCOLS

    assert set(CONTRACTS) == set(PROTOCOLS)


def test_bad_tables_are_refused(tmp_path):
    for text in ('[snip]\nnope = "a reason"\n', '[snip]\nmlp = " "\n'):
        (tmp_path / "expected.toml").write_text(text)
        with pytest.raises(BadData, match="no pair|bad line"):
            table.read(tmp_path / "expected.toml")


def test_the_matrix_is_written_from_the_table(tmp_path):
    (tmp_path / "expected.toml").write_text('[lottery-ticket]\nlstm = "a reason"\n')
    matrix.main(tmp_path / "expected.toml", tmp_path / "matrix.md")
    text = (tmp_path / "matrix.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| lottery-ticket"))
    assert row.count("refused") == 1
    assert row.count("yes") == 17
    assert "- **lottery-ticket** on lstm: a reason" in text
