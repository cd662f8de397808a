"""The interaction basis against torch.func.jacrev, dense eigendecompositions, loops and constructions."""

from __future__ import annotations

import copy
import itertools

import networkx
import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from nervure import zoo
from nervure._kit import BadData, NoEffect, Unsupported, UsageError
from nervure.core.forward import call, logits, take, tree_map
from nervure.inspect import interaction_graph, interaction_rotations


def _batch(count, width, *, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, width, generator=draw, dtype=torch.float64), torch.zeros(count)


def _chain(*widths, activation=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).double()


def _folded(model, x, activation=torch.tanh):
    """Return the weights with the bias as last column, and what every layer reads with the constant unit."""
    weights, reads = [], [torch.cat([x, x.new_ones(len(x), 1)], 1)]
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in linear:
        weights.append(torch.cat([layer.weight, layer.bias[:, None]], 1).detach())
        z = reads[-1] @ weights[-1].T
        reads.append(torch.cat([activation(z), z.new_ones(len(z), 1)], 1) if layer is not linear[-1] else z)
    return weights, reads


@pytest.mark.parametrize("points", [0, 5])
def test_full_jacobians_and_dense_eigendecompositions_on_twenty_units(points):
    model, (x, y) = _chain(4, 9, 7, 4, 3), _batch(60, 4)
    weights, reads = _folded(model, x)
    found = interaction_rotations(model, (x, y), points=points)
    nodes, at = torch.ones(1), torch.ones(1)
    if points:
        at, nodes = (torch.as_tensor(one) for one in np.polynomial.legendre.leggauss(points))
        at, nodes = (at + 1) / 2, nodes / 2
    later = torch.eye(3, dtype=torch.float64)
    for index in reversed(range(4)):

        def section(f, W=weights[index], C=later, last=index == 3):
            z = W @ f
            return C.T @ (z if last else torch.cat([torch.tanh(z), f[-1:]]))

        J = sum(w * vmap(jacrev(section))(a * reads[index]) for a, w in zip(at, nodes, strict=True))
        M = torch.einsum("nij,nik->jk", J, J) / len(x)
        G = reads[index].T @ reads[index] / len(x)
        D, U = torch.linalg.eigh(G)
        S = U * D.sqrt()
        L, V = torch.linalg.eigh(S.T @ M @ S)
        order = [k for k in L.argsort(descending=True).tolist() if L[k] > 2**-26 * L.max()]
        later = (U / D.sqrt()) @ V[:, order] * L[order].sqrt()
        one = found.layers[str(2 * index)]
        assert one.directions == len(order)
        assert one.active == len(G)
        torch.testing.assert_close(one.values, L[order], rtol=1e-7, atol=0)
        sign = (one.rotation * later).sum(0).sign()
        torch.testing.assert_close(one.rotation, later * sign, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(one.inverse, (one.rotation / L[order]).T @ G, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(one.inverse @ one.rotation, torch.eye(len(order)).double(), rtol=0, atol=1e-7)
        torch.testing.assert_close(one.coordinates(reads[index][:, :-1]), reads[index] @ one.rotation)
        later = one.rotation


def _units(value, name, model):
    """Return (T, units) of one sample's reading."""
    module = dict(model.named_modules()).get(name.partition("#")[0])
    value = value[0]
    if value.ndim == 1:
        return value[None]
    return value.flatten(1).T if isinstance(module, nn.modules.conv._ConvNd) else value.flatten(0, -2)


def _passed(model, names, inputs, given, tensors):
    """Run one sample with what every layer reads replaced, and return what arrived at each, and the output."""
    arrived, calls, handles = {}, {}, []

    def hook(name):
        def replace(module, args):
            calls[name] = calls.get(name, 0) + 1
            label = name if calls[name] == 1 else f"{name}#{calls[name]}"
            arrived[label] = args[0]
            return (given[label] if given else args[0].clone(), *args[1:])

        return replace

    try:
        for name in dict.fromkeys(name.partition("#")[0] for name in names):
            handles.append(dict(model.named_modules())[name].register_forward_pre_hook(hook(name)))
        arrived["output"] = logits(call(lambda *a, **k: functional_call(model, tensors, a, k), inputs))
    finally:
        for handle in handles:
            handle.remove()
    return arrived


_MODELS = (
    *("deep-conv", "residual-conv", "depthwise", "u-net", "cat-chunk", "vit", "encoder", "lstm", "gru", "tied-lm"),
    *("raw-parameter", "twice-used", "dict-tuple", "graph"),
)


@pytest.mark.parametrize("name", _MODELS)
def test_loops_over_samples_on_the_zoo(name):
    """C'GC is |L|, and the pseudo-inverse whitens the gradients of the later layers' coordinates."""
    case = zoo.case(name)
    model, count = copy.deepcopy(case.model(seed=0)).eval().double(), 3
    inputs = tree_map(lambda v: v.double() if v.is_floating_point() else v, case.batch(count, seed=0)[0])
    leaves = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd | nn.RNNBase)]
    layers = [n for n in leaves if "out_proj" not in n][-3:]
    found = interaction_rotations(model, (inputs, torch.zeros(count)), layers=layers, probes=10**6).layers
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    biases = {f"{n}.bias": m.bias for n, m in model.named_modules() if isinstance(m, kinds) and m.bias is not None}
    biases = {n: value.detach() for n, value in biases.items() if "out_proj" not in n}
    G = dict.fromkeys(found, 0)
    M = dict.fromkeys(found, 0)
    for index in range(count):
        sample = take(inputs, slice(index, index + 1))
        true = {key: value.detach() for key, value in _passed(model, list(found), sample, None, {}).items()}
        c = torch.ones((), dtype=torch.float64)

        def section(reads, c, later, sample=sample):
            arrived = _passed(model, list(found), sample, reads, {n: c * value for n, value in biases.items()})
            units = _units(arrived[later], later, model)
            if later == "output":
                return units.flatten()
            return (units @ found[later].rotation[:-1] + c * found[later].rotation[-1]).flatten()

        for read in found:
            f = _units(true[read], read, model)
            f = torch.cat([f, f.new_ones(len(f), 1)], 1)
            G[read] = G[read] + f.T @ f / len(f) / count
        for later in [*found, "output"]:
            given = {key: value for key, value in true.items() if key != "output"}
            with sdpa_kernel(SDPBackend.MATH):
                slopes, constant = jacrev(section, argnums=(0, 1))(given, c, later)
            for read, slope in slopes.items():
                if slope.abs().max() == 0:
                    continue
                rows = torch.stack([_units(one, read, model) for one in slope])
                share = (constant / rows.shape[1])[:, None, None].expand(-1, rows.shape[1], 1)
                g = torch.cat([rows, share], 2).flatten(0, 1)
                M[read] = M[read] + g.T @ g / rows.shape[1] / count
    for read, one in found.items():
        scale = float(one.values[0])
        torch.testing.assert_close(
            one.rotation.T @ G[read] @ one.rotation, one.values.diag(), rtol=0, atol=1e-7 * scale
        )
        half = one.values.sqrt()[:, None]
        whitened = half * (one.inverse @ M[read] @ one.inverse.T) * half.T
        torch.testing.assert_close(whitened, one.values.diag(), rtol=0, atol=1e-7 * scale)
        D, U = torch.linalg.eigh(G[read])
        S = U[:, 2**-26 * D.max() < D] * D[2**-26 * D.max() < D].sqrt()
        L = torch.linalg.eigvalsh(S.T @ M[read] @ S).flip(0)
        assert one.active == S.shape[1]
        torch.testing.assert_close(one.values, L[: one.directions], rtol=1e-6, atol=1e-9 * scale)
        assert bool((L[one.directions :] < 2**-25 * scale).all())


def test_affine_maps_in_between_change_nothing():
    model, (x, y) = _chain(4, 6, 8, 3), _batch(300, 4)
    there, back = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
    with torch.no_grad():
        back.weight.copy_(torch.linalg.inv(there.weight))
        back.bias.copy_(-back.weight @ there.bias)
    moved = nn.Sequential(*model[:2], there, back, *model[2:])
    one = interaction_rotations(model, (x, y)).layers["2"]
    two = interaction_rotations(moved, (x, y), layers=("0", "3", "6")).layers["3"]
    f = model[:2](x).detach()
    torch.testing.assert_close(two.values, one.values, rtol=1e-6, atol=0)
    first, second = one.coordinates(f), two.coordinates(there(f).detach())
    torch.testing.assert_close(second * (first * second).sum(0).sign(), first, rtol=1e-6, atol=1e-8)


def test_dependent_dead_unread_and_synchronised_units():
    model, batch = _chain(4, 8, 12, 5, activation=nn.ReLU), _batch(2000, 4)
    whole = interaction_rotations(model, batch).layers
    assert (whole["2"].directions, whole["2"].wasted, whole["2"].synchronised) == (9, 0, 0)
    assert (whole["0"].synchronised, whole["4"].directions) == (0, 5)
    dead, twin, unread, proportional = (copy.deepcopy(model) for _ in range(4))
    with torch.no_grad():
        dead[0].bias[0] = -1e3
        twin[0].weight[1], twin[0].bias[1] = twin[0].weight[0], twin[0].bias[0]
        unread[2].weight[:, 0] = 0
        proportional[0].weight[1], proportional[0].bias[1] = 3 * proportional[0].weight[0], 3 * proportional[0].bias[0]
    for changed, active, synchronised in ((dead, 8, 0), (twin, 8, 1), (unread, 9, 0), (proportional, 8, 1)):
        found = interaction_rotations(changed, batch)
        one = found.layers["2"]
        assert (one.active, one.directions, one.dropped, one.synchronised) == (active, 8, 1, synchronised)
        assert one.wasted == 1 + synchronised
        assert one.sure
        assert found.verdict == "warn"


def test_verdicts():
    model = _chain(3, 4, 4, activation=nn.Tanh)
    assert interaction_rotations(model, _batch(400, 3, scale=2.0)).verdict == "ok"
    few = interaction_rotations(model, _batch(4, 3))
    assert few.layers["0"].active == 4
    assert not few.layers["0"].sure
    assert few.verdict == "cannot tell"
    silent = copy.deepcopy(model)
    silent[2].weight.data.zero_()
    silent[2].bias.data.zero_()
    found = interaction_rotations(silent, _batch(400, 3))
    assert [one.directions for one in found.layers.values()] == [0, 0]


def test_batches_and_random_signs():
    case = zoo.case("depthwise")
    model, (x, y) = case.model(seed=0), case.batch(40, seed=0)
    whole = interaction_rotations(model, (x, y), layers=("grouped", "head"), probes=10**4).layers["grouped"]
    parts = [(x[:13], y[:13]), (x[13:], y[13:])]
    split = interaction_rotations(model, parts, layers=("grouped", "head"), probes=10**4).layers["grouped"]
    torch.testing.assert_close(split.values, whole.values, rtol=1e-9, atol=1e-12)
    assert split.sure == whole.sure
    drawn = [
        interaction_rotations(model, (x, y), layers=("grouped", "head"), probes=8, seed=seed).layers["grouped"]
        for seed in range(2)
    ]
    assert not torch.equal(drawn[0].values, drawn[1].values)
    for one in drawn:
        assert one.directions == whole.directions
        assert float(one.values.sum()) == pytest.approx(float(whole.values.sum()), rel=0.1)


def test_edges_against_full_jacobians():
    model, (x, y) = _chain(3, 5, 4, 2), _batch(40, 3)
    basis = interaction_rotations(model, (x, y))
    graph = interaction_graph(model, (x, y), basis)
    weights, reads = _folded(model, x)
    ends = {("0", "2"): 0, ("2", "4"): 1, ("4", "output"): 2}
    assert graph.edges.keys() == ends.keys()
    for (name, later), index in ends.items():
        one, C = basis.layers[name], basis.layers[later].rotation if later != "output" else None

        def section(h, W=weights[index], P=one.inverse, C=C):
            f = P.T @ h
            return W @ f if C is None else C.T @ torch.cat([torch.tanh(W @ f), f[-1:]])

        h = reads[index] @ one.rotation
        wanted = (vmap(jacrev(section))(h) * h[:, None]).square().mean(0)
        torch.testing.assert_close(graph.edges[name, later], wanted, rtol=1e-6, atol=1e-9)
    again = interaction_graph(model, [(x[:7], y[:7]), (x[7:], y[7:])], basis)
    torch.testing.assert_close(again.edges["2", "4"], graph.edges["2", "4"])


def test_edges_of_sequences_under_random_signs():
    case = zoo.case("encoder")
    model, batch = case.model(seed=0), case.batch(64, seed=0)
    layers = ("encoder.layers.1", "head")
    basis = interaction_rotations(model, batch, layers=layers)
    exact, drawn = (interaction_graph(model, batch, basis, probes=probes) for probes in (100, 4))
    for ends, table in exact.edges.items():
        assert float(drawn.edges[ends].sum()) == pytest.approx(float(table.sum()), rel=0.3)


def test_two_networks_side_by_side_are_two_modules():
    model, batch = _chain(4, 8, 8, 4), _batch(500, 4)
    with torch.no_grad():
        for layer in model[::2]:
            rows, columns = (torch.arange(size) < size // 2 for size in layer.weight.shape)
            layer.weight[rows[:, None] != columns] = 0
            layer.bias.zero_()
    basis = interaction_rotations(model, batch)
    graph = interaction_graph(model, batch, basis)
    dense = _chain(4, 8, 8, 4)
    mixed = interaction_graph(dense, batch, interaction_rotations(dense, batch))
    assert graph.modularity > mixed.modularity
    assert graph.modularity > 0.45
    halves = {
        key: (one.inverse[:, : one.units // 2].norm(dim=1) > one.inverse[:, one.units // 2 : -1].norm(dim=1)).tolist()
        for key, one in basis.layers.items()
    } | {"output": [True, True, False, False]}
    weight = networkx.Graph()
    for (layer, later), table in graph.edges.items():
        for i, j in itertools.product(*map(range, table.shape)):
            weight.add_edge((layer, j), (later, i), weight=float(table[i, j].sqrt()))
    assert graph.modularity == pytest.approx(networkx.community.modularity(weight, graph.modules), abs=1e-9)
    sides = [{halves[layer][k] for layer, k in module} for module in graph.modules if len(module) > 1]
    assert sum(len(one) == 1 for one in sides) >= len(sides) - 1


def test_refusals():
    model, batch = _chain(3, 4, 2), _batch(10, 3)
    for options in ({"probes": 0}, {"points": -1}, {"tolerance": 0.0}):
        with pytest.raises(UsageError, match="out of range"):
            interaction_rotations(model, batch, **options)
    with pytest.raises(NoEffect, match="no module nowhere"):
        interaction_rotations(model, batch, layers=("nowhere",))
    with pytest.raises(BadData, match="too few samples"):
        interaction_rotations(model, _batch(1, 3))
    with pytest.raises(Unsupported, match="no linear layer"):
        interaction_rotations(nn.Tanh(), batch)
    language = zoo.case("tied-lm")
    with pytest.raises(Unsupported, match="real numbers"):
        interaction_rotations(language.model(), language.batch(4), layers=("embed",))
    with pytest.raises(NoEffect, match="never calls"):
        interaction_rotations(_Unused(), batch, layers=("unused",))
    with pytest.raises(BadData, match="not one of this model"):
        interaction_graph(_chain(3, 5, 2), batch, interaction_rotations(_chain(3, 4, 2), batch))


class _Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)
