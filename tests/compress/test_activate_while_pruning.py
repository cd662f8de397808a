"""Dead-neuron rates against counts by hand and, on the whole zoo, against pre-activations seen from outside."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nervure import zoo
from nervure._kit import BadData, Unsupported, UsageError
from nervure.compress import dead_neurons
from nervure.core import forward
from nervure.testing import DiagnosticContract

SILENT = dict.fromkeys(("lstm", "gru", "twice-used"), "no activation that can be off")


class TestDeadNeurons(DiagnosticContract):
    unsupported = SILENT

    def run(self, model, task, *, seed):
        found = dead_neurons(model, task.inputs)
        return {name: [rates.dynamic, rates.static or 0.0] for name, rates in found.layers.items()}


class _Before(TorchFunctionMode):
    """Count what goes into activations that is not positive, at the level of Python's functions."""

    NAMES = ("relu", "relu_", "gelu", "silu", "hardswish", "relu6")

    def __init__(self):
        super().__init__()
        self.dead = self.total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            # A GELU of -20 is -0 in single precision: off like its input.
            self.dead += int((args[0] <= 0).sum())
            self.total += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [one for one in zoo.cases() if one.name not in SILENT], ids=lambda case: case.name)
def test_the_zoo_against_pre_activations(case, monkeypatch):
    model, (inputs, _) = case.model(seed=0), case.batch(6, seed=0)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _Before() as expected, torch.no_grad(), forward.mode(model, train=False):
            forward.call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    found = dead_neurons(model, inputs)
    assert sum(rates.outputs for rates in found.layers.values()) == expected.total > 0
    assert found.dynamic == expected.dead / expected.total
    assert torch.backends.mha.get_fastpath_enabled() == fast


class _Kinds(nn.Module):
    """Call ReLU as a module, a function, a method, in place, as a clamp, and twice."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))

    def forward(self, x):
        one, two = self.act(x), self.act(-x)
        three, four = F.relu(x - 1), (x + 1).relu_()
        five, six = x.clamp(min=0), x.clamp_min(0.0)
        return one + two + three + four + five + six + self.inner(x) + x.clamp(-1, 1) + F.leaky_relu(x)


def test_every_way_to_call_one_is_counted_and_named():
    x = torch.randn(9, 4)
    model = _Kinds()
    found = dead_neurons(model, x, batch=4)  # batches of 4, 4 and 1
    inner = F.linear(x, model.inner[0].weight, model.inner[0].bias)
    before = {
        "act": x,
        "act#2": -x,
        "relu": x - 1,
        "relu#2": x + 1,
        "clamp": x,
        "clamp#2": x,
        "inner.1": inner.detach(),
    }
    assert set(found.layers) == set(before)
    for name, value in before.items():
        assert found.layers[name].dynamic == pytest.approx(float((value <= 0).double().mean()))
        assert found.layers[name].static == pytest.approx(float((value <= 0).all(0).double().mean()))
    every = torch.cat(list(before.values()), 1)
    assert found.dynamic == pytest.approx(float((every <= 0).double().mean()))
    assert found.static == pytest.approx(float((every <= 0).all(0).double().mean()))
    assert found.samples == 9


def test_thresholds_and_smooth_activations():
    x = torch.tensor([[-3.0, -0.1, 0.2, 2.0]])
    assert dead_neurons(nn.Sequential(nn.GELU()), x).dynamic == 0.5
    assert dead_neurons(nn.Sequential(nn.SiLU()), x, threshold=0.15).dynamic == 0.75


def test_a_plain_recurrent_network_with_relu_is_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(3, 5, nonlinearity="relu", batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    model, x = Net(), torch.randn(6, 4, 3)
    found = dead_neurons(model, x)
    with torch.no_grad():
        states = model(x)
    assert found.dynamic == pytest.approx(float((states <= 0).double().mean()))
    assert sum(rates.outputs for rates in found.layers.values()) == states.numel()


def test_units_are_not_guessed_where_samples_are_not_the_first_axis():
    class Turned(nn.Module):
        def forward(self, x):
            return F.relu(x.transpose(0, 1))

    found = dead_neurons(Turned(), torch.randn(5, 3))
    assert found.static is None
    assert 0 < found.dynamic < 1


def test_dropout_is_off_and_bad_arguments_raise():
    model = nn.Sequential(nn.Dropout(0.9), nn.ReLU()).train()
    assert dead_neurons(model, torch.ones(50, 10)).dynamic == 0
    assert model[0].training
    with pytest.raises(Unsupported, match="can be off"):
        dead_neurons(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(UsageError, match="not negative"):
        dead_neurons(model, torch.ones(1, 2), threshold=-1)
    with pytest.raises(BadData, match="no sample"):
        dead_neurons(model, torch.ones(0, 2))
