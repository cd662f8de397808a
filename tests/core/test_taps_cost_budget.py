import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nervure import zoo
from nervure._kit import NoEffect
from nervure.core import Meter, forward, masks, modules, taps
from nervure.core.cost import bytes_on_disk, cost, latency


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_taps_come_off_after_an_exception():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with pytest.raises(RuntimeError), taps.tap(net, ["0"]):
        net(torch.ones(1, 7))
    assert hooks_of(net) == 0


def test_taps_see_each_use_and_survive_in_place_operations():
    model = zoo.case("twice-used").model()
    with taps.tap(model, ["shared"]) as seen:
        model(torch.randn(5, 16))
    assert [tuple(value.shape) for value in seen["shared"]] == [(5, 24), (5, 24)]
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True))
    x = torch.randn(4, 3)
    with taps.tap(net, ["0"]) as seen:
        net(x)
    assert torch.equal(seen["0"][0], F.linear(x, net[0].weight, net[0].bias))


def test_taps_can_stay_in_the_graph():
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    with taps.tap(net, ["0"], detach=False) as seen:
        net(torch.ones(1, 3))
    seen["0"][0].sum().backward()
    assert net[0].weight.grad is not None


def test_an_unknown_name_is_refused():
    with pytest.raises(NoEffect, match="no module nope"), taps.tap(nn.Linear(1, 1), ["nope"]):
        pass


def test_execution_order_is_not_registration_order():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 3)
            self.unused = nn.Linear(1, 1)

        def forward(self, x):
            return self.last(self.first(x))

    assert taps.execution_order(Backwards(), torch.ones(1, 4)) == ["first", "last"]


@pytest.mark.parametrize("name", zoo.names())
def test_dense_networks_have_as_many_nonzero_macs_as_physical_ones(name):
    entry = zoo.case(name)
    model = entry.model()
    inputs, _ = entry.batch(2)
    found = cost(model, inputs)
    assert found.nonzero_macs == found.macs > 0
    assert hooks_of(model) == 0
    if entry.tags.isdisjoint({"recurrent"}):
        counter = FlopCounterMode(display=False)
        torch.backends.mha.set_fastpath_enabled(False)
        with counter, forward.mode(model, train=False), torch.no_grad():
            forward.call(model, inputs)
        torch.backends.mha.set_fastpath_enabled(True)
        assert found.macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", zoo.names())
def test_a_mask_saves_nonzero_macs_only(name):
    entry = zoo.case(name)
    model = entry.model()
    inputs, _ = entry.batch(1)
    before = cost(model, inputs)
    layers = {
        key: torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        for key, weight in modules.weights(model).items()
    }
    masks.attach(model, layers)
    after = cost(model, inputs)
    assert after.macs == before.macs
    assert after.bytes == before.bytes
    assert after.nonzero_macs < before.nonzero_macs
    assert after.nonzeros < before.nonzeros


def test_recurrent_macs_are_the_closed_form():
    steps, features, width = 5, 6, 12
    for name, gates in (("lstm", 4), ("gru", 3)):
        found = cost(zoo.case(name).model(), zoo.case(name).batch(1)[0])
        assert found.macs == steps * gates * (features * width + width * width) + width * 4


def test_bytes_are_those_of_a_real_file(tmp_path):
    from safetensors.torch import save_file

    model = zoo.case("lenet").model()
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    assert bytes_on_disk(model) == (tmp_path / "net.safetensors").stat().st_size
    tied, untied = zoo.case("tied-lm").model(), zoo.case("tied-lm").model()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    assert bytes_on_disk(untied) - bytes_on_disk(tied) >= 20 * 16 * 4


def test_latency_is_positive_and_leaves_the_mode():
    model = zoo.case("mlp").model()
    least, median = latency(model, torch.randn(1, 1, 8, 8), repeats=3)
    assert 0 < least <= median
    assert model.training


def test_the_meter_counts_and_lets_go():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(3, 4)
    with Meter(net) as meter:
        for _ in range(2):
            optimizer.zero_grad()
            net(x).sum().backward()
            optimizer.step()
        with torch.no_grad():
            net(x)
    assert (meter.forwards, meter.backwards, meter.steps) == (3, 2, 2)
    # Kept for backward: the input, tanh's output (once for tanh, once as the next layer's input); not the weights.
    assert meter.peak_saved_bytes == 4 * (3 * 4 + 3 * 8 + 3 * 8)
    assert meter.saved_bytes == 0
    assert hooks_of(net) == 0
    net(x).sum().backward()
    optimizer.step()
    assert meter.steps == 2


def test_the_meter_lets_go_after_an_exception():
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="stop"), Meter(net) as meter:
        raise ValueError("stop")
    net(torch.ones(1, 2))
    assert meter.forwards == 0
