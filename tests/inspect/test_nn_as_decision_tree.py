"""Paths and trees of networks against linear programmes, closed counts, autograd and the paper's own tree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import nn

from nervure import zoo
from nervure._kit import BadData, Unsupported, UsageError
from nervure.core.forward import outputs, tree_map
from nervure.inspect import affine_piece, decision_tree
from nervure.inspect._tree_trial import network, patterns, regions

EXACT = {"rtol": 0, "atol": 1e-10}


def _draw(seed=0):
    return torch.Generator().manual_seed(seed)


def _box(size, side=2.0):
    return -side * torch.ones(size), side * torch.ones(size)


def _points(count, *shape, side=2.0, seed=1):
    return side * (2 * torch.rand(count, *shape, generator=_draw(seed), dtype=torch.float64) - 1)


def test_the_paper_s_network_of_a_square():
    """Weights, rules and affine maps are those of the paper's published script."""
    model = nn.Sequential(nn.Linear(1, 2), nn.LeakyReLU(0.3), nn.Linear(2, 2), nn.LeakyReLU(0.3), nn.Linear(2, 1))
    given = (
        [[-1.417975902557373], [-2.844531297683716]], [-1.6503010988235474, 0.9194149971008301],
        [[-0.5544683933258057, -1.9900331497192383], [1.934475302696228, 0.7888604998588562]],
        [-1.657207727432251, 0.5763863325119019], [[2.1596546173095703, 1.573018193244934]], [1.419596552848816],
    )  # fmt: skip
    for value, one in zip(model.double().parameters(), given, strict=True):
        value.data.copy_(torch.tensor(one, dtype=torch.float64))
    tree = decision_tree(model, *_box(1, 2.5))
    breaks = sorted((tree.thresholds / tree.rules[:, 0]).tolist())
    assert breaks == pytest.approx([-1.163842797279, 0.112146496773, 0.323221951723, 0.998715341091], abs=1e-6)
    order = tree.points[:, 0].argsort()
    lines = [(-3.667660713196, -3.220932960510), (-1.003839254379, -0.120662927628), (2.373108386993, -0.499375820160),
             (0.547069132328, 0.090840339661), (3.470931053162, -2.829265117645)]  # fmt: skip
    found = list(zip(tree.weight[order, 0, 0].tolist(), tree.bias[order, 0].tolist(), strict=True))
    assert [value for line in found for value in line] == pytest.approx([v for line in lines for v in line], abs=1e-6)


def _feasible(model, inputs):
    """Count the sign patterns whose polytope holds a ball, by one linear programme for each of the 2^n."""
    hidden = [layer for layer in model if isinstance(layer, nn.Linear)][:-1]
    count = 0
    for signs in itertools.product((0.0, 1.0), repeat=sum(layer.out_features for layer in hidden)):
        left = list(signs)
        weight, bias = np.eye(inputs), np.zeros(inputs)
        rows, limits = [np.eye(inputs), -np.eye(inputs)], [np.full(2 * inputs, 2.0)]
        for layer in hidden:
            w, b = (value.detach().numpy() for value in layer.parameters())
            on, left = np.array(left[: len(w)]), left[len(w) :]
            weight, bias = w @ weight, w @ bias + b
            turn = 1 - 2 * on
            rows.append(turn[:, None] * weight)
            limits.append(-turn * bias)
            weight, bias = on[:, None] * weight, on * bias
        a, b = np.concatenate(rows), np.concatenate(limits)
        norms = np.linalg.norm(a, axis=1)
        if (b[norms == 0] < 0).any():
            continue
        a, b, norms = a[norms > 0], b[norms > 0], norms[norms > 0]
        goal = np.append(np.zeros(inputs), -1.0)
        free = [(None, None)] * inputs + [(0, None)]
        found = linprog(goal, A_ub=np.column_stack([a, norms]), b_ub=b, bounds=free)
        count += found.status == 0 and -found.fun > 1e-6
    return count


@pytest.mark.parametrize(("inputs", "hidden"), [(1, (2, 2)), (2, (3, 3)), (3, (4, 2))])
def test_a_leaf_for_each_feasible_pattern(inputs, hidden):
    model = network(inputs, hidden, _draw(inputs))
    tree = decision_tree(model, *_box(inputs))
    assert tree.leaves == _feasible(model, inputs) == len(patterns(model, tree.points).unique())


@pytest.mark.parametrize(("inputs", "width"), [(1, 5), (2, 7), (3, 6), (4, 5), (6, 4)])
def test_one_layer_has_zaslavsky_s_count(inputs, width):
    """In a box that holds every crossing there are sum_k C(n, k) regions, and without biases those of planes."""
    model = network(inputs, (width,), _draw(7))
    tree = decision_tree(model, *_box(inputs, 1e4))
    assert tree.leaves == regions(inputs, (width,))
    model[0].bias.data.zero_()
    central = 2 * sum(len(list(itertools.combinations(range(width - 1), k))) for k in range(inputs))
    assert decision_tree(model, *_box(inputs)).leaves == central


@pytest.mark.parametrize(("inputs", "hidden"), [(2, (8, 8)), (4, (6, 6)), (3, (4, 4, 4)), (8, (6,))])
def test_the_tree_is_the_network(inputs, hidden):
    model = network(inputs, hidden, _draw(3)).requires_grad_(False)
    tree = decision_tree(model, *_box(inputs))
    x = _points(10_000, inputs)
    torch.testing.assert_close(tree(x), model(x), **EXACT)
    # Points of one leaf have one pattern, and points of two leaves two.
    leaf, _ = tree.path(x)
    pairs = torch.stack([leaf, patterns(model, x)], 1).unique(dim=0)
    assert len(pairs) == len(leaf.unique()) == len(pairs[:, 1].unique())
    value, point = tree.maximum(torch.ones(1))
    assert float(model(x).max()) <= value == pytest.approx(float(model(point[None])), abs=1e-10)
    assert value - float(model(x).max()) < {2: 0.05, 3: 0.3, 4: 0.5, 8: 1.0}[inputs]
    assert tree.operations(x) >= inputs


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.PReLU(2)

    def forward(self, x):
        return F.relu6(self.norm(self.conv(x)) + x) - self.act(x)


def test_residual_convolutional_trees():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), Block(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 3)).double()
    model(torch.randn(50, 1, 2, 2, dtype=torch.float64))  # running statistics
    tree = decision_tree(model, *(value.reshape(1, 2, 2) for value in _box(4)))
    x = _points(3000, 1, 2, 2)
    torch.testing.assert_close(tree(x), model.eval()(x), **EXACT)


ACTIVATIONS = {
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "in place": lambda x: F.relu_(x * 1.0),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.3),
    "relu6": lambda x: F.relu6(8 * x),
    "abs": torch.abs,
    "hardsigmoid": lambda x: F.hardsigmoid(5 * x),
    "softshrink": F.softshrink,
    "clamp": lambda x: x.clamp(-0.1, 0.4),
    "clamp min": lambda x: x.clamp(min=0.1),
    "clamp max": lambda x: x.clamp_max(0.1),
    "rectified leaky": lambda x: F.rrelu(x, training=False),
    "rectified leaky, steeper": lambda x: F.rrelu(x, 0.2),
    "prelu": lambda x: F.prelu(x, torch.linspace(-0.5, 0.5, 6, dtype=x.dtype)),
    "maximum": lambda x: torch.maximum(x, 0.3 * x.flip(1)),
    "minimum": lambda x: torch.min(x, 0.2 - x),
    "written into a slice": lambda x: _slices(x),
}  # fmt: skip
MAXIMA = {
    "max": lambda x: x.reshape(-1, 3, 2).max(-1)[0],
    "amax": lambda x: x.reshape(-1, 3, 2).amax(1, keepdim=True).flatten(1),
    "pool 1d": lambda x: F.max_pool1d(x[:, None], 3, 2, 1).flatten(1),
    "pool 2d": lambda x: F.max_pool2d(x.reshape(-1, 1, 2, 3), 2, 1, 1).flatten(1),
}


def _slices(x):
    made = torch.zeros(len(x), 6, dtype=x.dtype)
    made[:, :3] = F.relu(x[:, :3])
    made[:, 3:] = x[:, :3]
    return made


class With(nn.Module):
    def __init__(self, activation, *, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.activation = nn.Linear(2, width).double(), activation
        size = activation(self.first(torch.zeros(1, 2, dtype=torch.float64))).shape[1]
        self.last = nn.Linear(size, 2).double()

    def forward(self, x):
        return self.last(self.activation(self.first(x)))


def _agrees(model, x, *, atol=1e-10):
    piece = affine_piece(model, (x, torch.zeros(len(x))))
    jacobian = torch.autograd.functional.jacobian(lambda one: outputs(model, one), x[:1])
    torch.testing.assert_close(piece.weight, jacobian.reshape(piece.weight.shape), rtol=0, atol=atol)
    torch.testing.assert_close(piece.value, outputs(model, x[:1]).flatten(), **EXACT)
    assert piece.error < 1e-10
    assert bool(piece.contains(piece.centre[None]))
    return piece


@pytest.mark.parametrize("name", [*ACTIVATIONS, *MAXIMA])
def test_activations(name):
    model = With({**ACTIVATIONS, **MAXIMA}[name]).requires_grad_(False)
    x = _points(200, 2)
    # torch's derivative of hardsigmoid is 1/6 in single precision.
    piece = _agrees(model, x, atol=1e-7 if name == "hardsigmoid" else 1e-10)
    inside = x[piece.contains(x)]
    torch.testing.assert_close(piece(inside), model(inside), **EXACT)
    assert len(inside)
    # Beyond the nearest boundary the map is another one.
    near = int(piece.limits.argmin())
    beyond = (x[0] + 1.01 * (piece.limits[near] + 1e-4) * piece.rules[near])[None]
    if bool(piece.contains((x[0] + 0.99 * piece.limits[near] * piece.rules[near])[None])):
        assert float((piece(beyond) - model(beyond)).abs().max()) > 1e-9
    if name in MAXIMA:
        with pytest.raises(Unsupported, match="a maximum of several"):
            decision_tree(model, *_box(2))
    else:
        torch.testing.assert_close(decision_tree(model, *_box(2))(x), model(x), **EXACT)


@pytest.mark.parametrize(
    ("activation", "why"),
    [
        (F.gelu, "gelu is not known"),
        (lambda x: torch.zeros_like(x).index_copy(1, torch.arange(6), x), "index_copy is not known"),
        (lambda x: x * x, "multiplies two things"),
        (lambda x: torch.where(x > 0, x, 0 * x), "gt is not known"),
        (lambda x: x / (1 + x.flip(0)), "div is not linear"),
        (lambda x: x if float(x.detach().sum()) > 0 else -x, "_local_scalar_dense is not known"),
        (lambda x: x - x.mean(0), "mixes samples"),
        (lambda x: x.amax(0, keepdim=True) + x, "over the samples"),
        (lambda x: F.batch_norm(x, None, None, training=True), "not linear"),
        (lambda x: F.rrelu(x, training=True), "rrelu_with_noise is not known"),
        (lambda x: F.dropout(x, 0.5, training=True), "draws random|not known"),
    ],
)
def test_what_is_not_piecewise_linear_is_refused(activation, why):
    model = With(F.relu)
    model.activation = activation
    with pytest.raises(Unsupported, match=why):
        affine_piece(model, (_points(2, 2), torch.zeros(2)))


@pytest.mark.parametrize("name", ["mlp", "lenet-300-100", "lenet", "deep-conv", "residual-conv", "u-net"])
def test_paths_of_the_zoo(name):
    case = zoo.case(name)
    model = case.model(seed=2).double().eval()
    x = tree_map(lambda value: value.double(), case.batch(2)[0])
    steps = F.normalize(torch.randn(3, x[0].numel(), generator=_draw(), dtype=torch.float64))
    whole = _agrees(model, x) if name != "lenet" else None
    some = affine_piece(model, (x, torch.zeros(2)), sample=1, directions=steps)
    jacobian = torch.autograd.functional.jacobian(model, x[1:]).reshape(-1, x[0].numel())
    torch.testing.assert_close(some.weight, jacobian @ steps.T, **EXACT)
    # Along a line the piece ends exactly where a rule says: the slope is the same before, another after.
    assert whole is None or (whole.units >= len(whole.rules) and whole.distance > 0)
    low = torch.zeros(1)
    line = decision_tree(model, low, low + 0.5, plane=(x[0], steps[:1])) if name in ("mlp", "deep-conv") else None
    if line is not None:
        t = torch.linspace(0, 0.5, 400, dtype=torch.float64)[:, None]
        torch.testing.assert_close(line(t), model((x[0].flatten() + t @ steps[:1]).reshape(-1, *x[0].shape)), **EXACT)
        first = line.thresholds[line.rules[:, 0] * line.thresholds > 0].abs().min()
        along = affine_piece(model, (x, torch.zeros(2)), directions=steps[:1])
        ahead = (along.limits[along.rules[:, 0] > 0]).min()
        assert float(first) == pytest.approx(float(ahead), rel=1e-6)


def test_the_region_is_that_of_the_pattern():
    model = network(2, (6, 6), _draw(4))
    x = _points(20_000, 2)
    piece = affine_piece(model, (x, torch.zeros(len(x))), sample=5)
    code = patterns(model, x)
    assert torch.equal(piece.contains(x), code == code[5])
    torch.testing.assert_close(piece.bias[None] + x[5:6] @ piece.weight.T, model(x[5:6]), **EXACT)


def test_several_inputs_and_what_does_not_move():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(4, 3), nn.Linear(3, 5)

        def forward(self, x, y, kind):
            return F.relu(self.layer(x - y) + 1) * self.table(kind).sum(-1, keepdim=True)

    torch.manual_seed(1)
    model, inputs = Two(), {"x": torch.randn(2, 3), "y": torch.randn(2, 3), "kind": torch.tensor([1, 2])}
    piece = affine_piece(model, (inputs, torch.zeros(2)), sample=1)
    assert piece.weight.shape == (5, 6)
    torch.testing.assert_close(piece.weight[:, :3], -piece.weight[:, 3:], **EXACT)
    torch.testing.assert_close(piece.value.float(), model(**inputs)[1])
    with pytest.raises(Unsupported, match="no input is a floating-point"):
        affine_piece(nn.Embedding(4, 3), (torch.tensor([[1]]), torch.zeros(1)))


def test_limits_are_told():
    model = network(2, (8, 8), _draw())
    with pytest.raises(Unsupported, match="more than 5 leaves"):
        decision_tree(model, *_box(2), most=5)
    with pytest.raises(BadData, match="outside"):
        decision_tree(model, *_box(2))(torch.full((1, 2), 2.1))
    with pytest.raises(UsageError, match="empty or unbounded"):
        decision_tree(model, torch.ones(2), torch.ones(2))
    with pytest.raises(Unsupported, match="too many corners"):
        decision_tree(network(15, (2,), _draw()), *_box(15))
    with pytest.raises(Unsupported, match="rules have too many entries"):
        affine_piece(model, (torch.zeros(1, 2), torch.zeros(1)), most=10)
    with pytest.raises(Unsupported, match="inputs have too many entries"):
        affine_piece(model, (torch.zeros(1, 2), torch.zeros(1)), most=5)
    with pytest.raises(UsageError, match="directions do not fit"):
        affine_piece(model, (torch.zeros(1, 2), torch.zeros(1)), directions=torch.ones(1, 3))
    line = decision_tree(nn.Linear(2, 3), *_box(2))
    assert (line.leaves, len(line.rules)) == (1, 0)
    torch.testing.assert_close(affine_piece(nn.Linear(2, 3), (torch.ones(1, 2), torch.ones(1))).distance, float("inf"))
