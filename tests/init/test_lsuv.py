"""LSUV against the layer-by-layer algorithm written out, and on networks that break naive versions."""

import copy

import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import Unsupported, UsageError
from nervure.core import forward, modules, taps
from nervure.init.lsuv import lsuv_


def _layer_by_layer(net, x, tol=0.1):
    """The paper's algorithm for a Sequential: one forward pass for each layer and try."""
    factors = []
    for layer in [layer for layer in net if isinstance(layer, nn.Linear | nn.Conv2d)]:
        factor = 1.0
        for _ in range(10):
            seen = []
            handle = layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
            net(x)
            handle.remove()
            std = float(seen[0].std(correction=0))
            if abs(std**2 - 1) <= tol:
                break
            layer.weight /= std
            factor *= std
        factors.append(factor)
    return factors


def _sequential():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 36, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


@torch.no_grad()
def test_one_pass_equals_layer_by_layer():
    ours = _sequential()
    for p in ours.parameters():
        if p.ndim == 1:
            p.zero_()
    theirs, x = copy.deepcopy(ours), torch.randn(32, 3, 8, 8)
    report = lsuv_(ours, x, orthonormal=False)
    factors = _layer_by_layer(theirs, x)
    torch.testing.assert_close(torch.tensor([*report.scales.values()]), torch.tensor(factors), rtol=1e-4, atol=0)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_weights_are_orthonormal_up_to_the_scale():
    net = _sequential()
    report = lsuv_(net, torch.randn(32, 3, 8, 8))
    for name, scale in report.scales.items():
        layer = net.get_submodule(name)
        for part in layer.weight.detach().chunk(getattr(layer, "groups", 1)):
            matrix = (part * scale).flatten(1).double()
            small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
            torch.testing.assert_close(small, torch.eye(len(small), dtype=torch.float64), rtol=0, atol=1e-5)


class _Permuted(nn.Module):
    """The same network with its attributes registered in the order given."""

    def __init__(self, order):
        super().__init__()
        layers = {"a": nn.Linear(6, 20), "b": nn.Linear(20, 20), "c": nn.Linear(20, 4)}
        for name in order:
            self.add_module(name, layers[name])

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def test_order_of_registration_does_not_matter():
    x, found = torch.randn(64, 6), []
    for order in ("abc", "cab", "bca"):
        net = _Permuted(order)
        report = lsuv_(net, x, generator=torch.Generator().manual_seed(7))
        assert list(report.scales) == ["a", "b", "c"]
        found.append(net.state_dict())
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


def _treated_outputs(model, report):
    """Name the treated layers whose output is their own call's; attention never calls its output projection."""
    layers = dict(model.named_modules())
    plain = [name for name in report.scales if isinstance(layers.get(name), nn.Linear | nn.modules.conv._ConvNd)]
    return [name for name in plain if not name.endswith("out_proj")]


@pytest.mark.parametrize("case", zoo.cases(), ids=lambda case: case.name)
def test_every_zoo_model(case):
    model = case.model()
    model.train()
    inputs = case.batch(1024)[0]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    state, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    report = lsuv_(model, inputs, tol=1e-3)
    assert report.scales
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Every matrix of the model is accounted for.
    told = [*report.scales, *report.skipped]
    for name, held_by in modules.owners(model).items():
        if model.get_parameter(name).ndim >= 2:
            places = [place for place, module in model.named_modules() for holder, _ in held_by if module is holder]
            assert any(one.startswith(place) for one in told for place in places), name
    names = _treated_outputs(model, report)
    batches = ((inputs, 2e-3), (case.batch(1024, seed=5)[0], 0.1))
    for batch, allowed in batches:
        with torch.no_grad(), taps.tap(model, names) as seen:
            _in_batch_statistics(model, batch)
        for name in names:
            assert abs(float(seen[name][0].var(correction=0)) - 1) < allowed, name


def _in_batch_statistics(model, batch):
    twin = [(m, m.training) for m in model.modules()]
    for module, _ in twin:
        module.training = isinstance(module, nn.modules.batchnorm._NormBase)
    forward.call(model, batch)
    for module, flag in twin:
        module.training = flag


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_gate_of_every_recurrent_layer(kind, bidirectional):
    torch.manual_seed(0)
    net = getattr(nn, kind)(5, 8, num_layers=2, batch_first=True, bidirectional=bidirectional)
    x = torch.randn(40, 6, 5) * 3
    lsuv_(net, x, tol=1e-3)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    lower = getattr(nn, kind)(5, 8, batch_first=True, bidirectional=bidirectional)
    lower.load_state_dict({name: p for name, p in net.state_dict().items() if "_l0" in name})
    for layer, data in ((0, x), (1, lower(x)[0].detach())):
        for end in ("", "_reverse")[: 1 + bidirectional]:
            weight = getattr(net, f"weight_ih_l{layer}{end}").detach()
            for part in weight.chunk(gates):
                assert float((data @ part.T).var(correction=0)) == pytest.approx(1, abs=2e-3)
            for part in getattr(net, f"weight_hh_l{layer}{end}").detach().chunk(gates):
                torch.testing.assert_close(part @ part.T, torch.eye(8), rtol=0, atol=1e-5)


def test_attention_projections():
    torch.manual_seed(0)
    net = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    x = torch.randn(20, 7, 12) * 2

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = net

        def forward(self, x):
            return self.attend(x, x, value=x, need_weights=False)[0]

    model = Self()
    report = lsuv_(model, x, tol=1e-3)
    assert list(report.scales) == ["attend.q", "attend.k", "attend.v", "attend.out_proj"]
    assert float(model(x).detach().var(correction=0)) == pytest.approx(1, abs=2e-3)
    for part in net.in_proj_weight.detach().chunk(3):
        assert float((x @ part.T).var(correction=0)) == pytest.approx(1, abs=2e-3)


def test_transposed_and_grouped_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2))
    x = torch.randn(16, 4, 8, 8)
    lsuv_(net, x, tol=1e-3)
    assert float(net(x).detach().var(correction=0)) == pytest.approx(1, abs=2e-3)
    for part in net[2].weight.detach().chunk(2):
        matrix = part.transpose(0, 1).flatten(1)
        gram = matrix @ matrix.T
        torch.testing.assert_close(gram, torch.eye(3) * gram[0, 0], rtol=0, atol=1e-5)


class _Reasons(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight
        self.frozen, self.idle, self.shared = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.mix = nn.Parameter(torch.randn(6, 6))
        self.dead = nn.Linear(6, 6)

    def forward(self, x):
        h = self.shared(self.shared(self.normed(self.frozen(self.table(x)))) @ self.mix)
        return self.head(h) + self.dead(h * 0).sum()


def test_what_is_left_alone_is_named_with_a_reason():
    net = _Reasons()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    report = lsuv_(net, torch.randint(9, (50,)))
    assert set(report.scales) == {"shared"}
    words = {
        "head": "tied",
        "frozen": "frozen",
        "idle": "not called",
        "normed": "parametrised",
        "mix": "no linear",
        "dead": "does not vary",
    }
    for name, word in words.items():
        assert word in report.skipped[name], name
    for name in ("table.weight", "frozen.weight", "idle.weight", "mix"):
        assert torch.equal(before[name], net.get_parameter(name))


def test_targets_skips_and_dict_inputs():
    case = zoo.case("dict-tuple")
    names = list(lsuv_(case.model(), case.batch(64)[0]).scales)
    model = case.model()
    last = {name: p.detach().clone() for name, p in model.get_submodule(names[-1]).named_parameters()}
    report = lsuv_(model, case.batch(64)[0], target={names[0]: 0.5}, skip=[names[-1]], tol=1e-3)
    with torch.no_grad(), taps.tap(model, [names[0]]) as seen:
        forward.call(model, case.batch(64)[0])
    assert float(seen[names[0]][0].std(correction=0)) == pytest.approx(0.5, rel=2e-3)
    assert report.skipped[names[-1]] == "it is in skip"
    assert all(torch.equal(p, last[name]) for name, p in model.get_submodule(names[-1]).named_parameters())


def test_exception_leaves_the_model_as_it_was():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            self.norm(self.body(x))
            raise RuntimeError("stop")

    net = Fails()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="stop"):
        lsuv_(net, torch.randn(8, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.norm.training
    assert not net.body._forward_hooks
    assert not net.body._forward_pre_hooks


def test_seed_decides():
    x = torch.randn(16, 4)

    def weights(seed):
        net = nn.Linear(4, 4)
        lsuv_(net, x, generator=torch.Generator().manual_seed(seed))
        return net.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_refusals():
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UsageError, match="no module"):
        lsuv_(net, torch.randn(4, 4), skip=["head"])
    with pytest.raises(UsageError, match="positive"):
        lsuv_(net, torch.randn(4, 4), tol=0)
    with pytest.raises(UsageError, match="positive"):
        lsuv_(net, torch.randn(4, 4), target=0.0)
    with pytest.raises(Unsupported, match="lazy"):
        lsuv_(nn.LazyLinear(3), torch.randn(4, 4))
