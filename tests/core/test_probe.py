"""The probe: sizes by the budget, the model untouched, and what it refuses."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure._kit import BadData, BadModel, CouldNotRun, OverBudget, Unsupported
from nervure.core.probe import Probe
from nervure.inspect import m_coherence, spectrum


def _data(n=40):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=draw), torch.randint(2, (n,), generator=draw)


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


def test_it_runs_diagnostics_in_eval_mode_on_a_copy_and_hands_over_loss_parameters_and_seed():
    model = _net()
    probe = Probe(model, _data(), loss=F.cross_entropy, parameters=["0"], seed=3)
    assert model.training
    assert not probe.model.training
    assert "training mode" in probe.notes[0]
    found = probe.run(m_coherence, probe.batch(gradients=3))
    assert set(found.layers) == {"0"}
    assert probe.run(spectrum, probe.batch(gradients=3), k=1).parameters == 40
    seen = {}

    def listens(net, batch, *, seed):
        seen.update(seed=seed, batch=len(batch[1]))

    probe.run(listens, probe.batch(gradients=1, most=20))
    assert seen == {"seed": 3, "batch": 20}


def test_batches_are_sized_by_what_a_gradient_costs():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            time.sleep(0.002 * len(x))
            return self.layer(x)

    probe = Probe(Slow(), _data(), loss=F.cross_entropy, seconds=2.0)
    assert 0.0015 < probe.gradient_seconds < 0.02
    with pytest.raises(OverBudget, match="longer than the budget"):
        probe.batch(gradients=1000)
    assert len(probe.batch(gradients=1, share=0.05, least=4)[1]) <= 50
    assert 0 < probe.left < 2


def test_samples_are_drawn_without_replacement_and_inputs_stay_with_their_targets():
    x, y = _data()
    probe = Probe(_net(), (torch.cat([x[:, :3], y[:, None].float()], 1), y), loss=F.cross_entropy)
    first, second = probe.batch(gradients=1, most=20), probe.batch(gradients=1, most=20, skip=20)
    rows = torch.cat([first[0], second[0]])
    assert len(rows.unique(dim=0)) == 40
    assert torch.equal(first[0][:, 3].long(), first[1])
    with pytest.raises(BadData, match="too few"):
        probe.batch(gradients=1, skip=30)


@pytest.mark.parametrize("harm", ["weight", "gradient", "mode", "hook", "statistics", "frozen"])
def test_a_diagnostic_that_touches_the_model_is_an_error(harm):
    probe = Probe(_net(), _data(), loss=F.cross_entropy)

    def touches(net, batch):
        if harm == "weight":
            net[0].weight.data.mul_(1.1)
        if harm == "gradient":
            F.cross_entropy(net(batch[0]), batch[1]).backward()
        if harm == "mode":
            net.train()
        if harm == "hook":
            net[0].register_forward_hook(lambda *a: None)
        if harm == "statistics":
            net[1].running_mean = net[1].running_mean + 1
        if harm == "frozen":
            net[0].weight.requires_grad_(False)

    with pytest.raises(CouldNotRun, match="touches changed the model"):
        probe.run(touches, probe.batch(gradients=1))


def test_what_cannot_be_probed_is_refused():
    x, y = _data()
    with pytest.raises(BadData, match="not one number"):
        Probe(_net(), (x, y), loss=lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with pytest.raises(BadData, match="not finite"):
        Probe(_net(), (x * float("nan"), y), loss=F.cross_entropy)
    with pytest.raises(BadData, match="differ in number"):
        Probe(_net(), (x, y[1:]), loss=F.cross_entropy)
    with pytest.raises(BadModel, match="no parameter"):
        Probe(nn.ReLU(), (x, y), loss=F.cross_entropy)
    odd = nn.Linear(4, 2)
    odd.extra = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(Unsupported, match="complex"):
        Probe(odd, (x, y), loss=F.cross_entropy)
    keeps = nn.Linear(4, 2)
    keeps.kept = keeps(x)
    with pytest.raises(BadModel, match="cannot be copied"):
        Probe(keeps, (x, y), loss=F.cross_entropy)
    half = Probe(nn.Linear(4, 2).bfloat16(), (x, y), loss=F.cross_entropy)
    assert half.model.weight.dtype == torch.float32
    assert "single precision" in half.notes[0]
