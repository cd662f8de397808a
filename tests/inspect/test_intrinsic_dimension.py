"""Random subspaces against matrices written out, and the dimension against problems where it is known."""

from __future__ import annotations

import copy

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

from nervure import zoo
from nervure._kit import BadData, UsageError
from nervure.core.forward import outputs
from nervure.inspect import objective_dimension, train_in_subspace
from nervure.inspect._subspace import Projection, hadamard

KINDS = ("fastfood", "dense", "sparse", "axes")


def _matrix(projection):
    eye = torch.eye(projection.dimension, dtype=projection.dtype)
    return torch.stack([projection.apply(z) for z in eye], 1)


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 8, 11])
def test_the_fast_transform_is_the_matrix_of_scipy(bits):
    x = torch.randn(2**bits, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    matrix = torch.from_numpy(scipy.linalg.hadamard(2**bits)).double()
    torch.testing.assert_close(hadamard(x), matrix @ x)


def test_fastfood_is_the_product_of_its_matrices():
    one = Projection(200, 200, dtype=torch.float64)
    h = torch.from_numpy(scipy.linalg.hadamard(256)).double()
    permutation = torch.eye(256, dtype=torch.float64)[one.order]
    whole = h @ torch.diag(one.scales) @ permutation @ h @ torch.diag(one.signs)
    torch.testing.assert_close(_matrix(one), whole[:200, :200])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [2**27, 0])
def test_the_transpose_the_norms_and_the_nesting(kind, memory):
    options = {"kind": kind, "seed": 3, "dtype": torch.float64, "memory": memory}
    large, small = Projection(300, 150, **options), Projection(300, 70, **options)
    matrix = _matrix(large)
    torch.testing.assert_close(_matrix(small), matrix[:, :70])
    g = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(large.pull(g), matrix.T @ g)
    norms = matrix.norm(dim=0)
    if kind == "fastfood":  # 300 of 512 rows are kept: of norm one in the mean
        assert float(norms.square().mean()) == pytest.approx(1, abs=0.1)
    else:
        torch.testing.assert_close(norms, torch.ones(150, dtype=torch.float64))
    if kind in ("sparse", "axes"):
        assert int((matrix != 0).sum(0).max()) == int((matrix != 0).sum(0).min()) == {"sparse": 17, "axes": 1}[kind]
    assert not torch.equal(_matrix(Projection(300, 70, **{**options, "seed": 4})), matrix[:, :70])


@pytest.mark.parametrize("kind", ["fastfood", "sparse"])
def test_columns_are_as_orthonormal_as_dense_ones(kind):
    moments = {}
    for each in (kind, "dense"):
        grams = [(m := _matrix(Projection(256, 256, kind=each, seed=s, dtype=torch.float64))).T @ m for s in range(4)]
        off = torch.stack(grams) - torch.eye(256, dtype=torch.float64)
        moments[each] = float(off.square().mean().sqrt())
        diagonal = torch.stack([gram.diagonal() for gram in grams])
        torch.testing.assert_close(diagonal, torch.ones_like(diagonal))  # 256 entries a column: second moment 1 / 256
    # Inner products of two columns: 1 / 256 of variance for dense ones, 2 / 256 for the Walsh transform of G^2.
    assert moments["dense"] == pytest.approx(256**-0.5, rel=0.05)
    assert moments[kind] <= 1.5 * 256**-0.5


class _Sums(nn.Module):
    """A thousand parameters, of which the sums of ten blocks of a hundred are the output."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1000))

    def forward(self, x):
        return x @ self.theta.reshape(10, 100).sum(1)


def _sums():
    return torch.eye(10), torch.arange(1.0, 11.0)


@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse"])
def test_ten_constraints_have_dimension_ten(kind):
    # By least squares, so that training plays no part: nine coordinates leave a residual, ten none.
    residuals = []
    for d in (9, 10):
        a = _matrix(Projection(1000, d, kind=kind, dtype=torch.float64)).reshape(10, 100, d).sum(1)
        b = _sums()[1].double()[:, None]
        residuals.append(float((a @ torch.linalg.lstsq(a, b, driver="gelsd").solution - b).norm() / b.norm()))
    assert residuals[0] > 1e-3
    assert residuals[1] < 1e-9


def test_the_search_brackets_the_dimension():
    # One parameter of its own for each input: d axes satisfy d constraints exactly, so the share reached is d / 24.
    class Each(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(24))

        def forward(self, x):
            return x @ self.theta

    batch = (torch.eye(24), torch.ones(24))
    options = {
        "loss": F.mse_loss, "score": lambda out, y: float(((out - y).abs() < 0.1).double().mean()), "kind": "axes",
        "steps": 60, "learning_rate": 0.05, "start": 3, "tolerance": 0.01,
    }  # fmt: skip
    found = objective_dimension(Each(), batch, **options)
    assert found.full == 1.0
    assert (found.below, found.dimension) == (21, 22)  # 0.9 of 24 is 21.6
    assert objective_dimension(Each(), batch, **{**options, "start": 24}).dimension == 22
    none = objective_dimension(Each(), batch, most=10, **options)
    assert none.dimension is None
    assert none.verdict == "cannot tell"
    assert none.trials[-1].dimension == 10
    assert objective_dimension(Each(), batch, goal=-1.0, **options).dimension == 0


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_model_moves_in_its_subspace_alone(name):
    case = zoo.case(name)
    model = case.model(seed=0)
    before = copy.deepcopy(model.state_dict())
    batch = case.batch(8, seed=0)
    loss = lambda out, y: F.cross_entropy(out.flatten(0, -2), y.flatten())  # noqa: E731
    found = train_in_subspace(model, batch, 5, loss=loss, steps=3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert found.coordinates.abs().min() > 0
    moved = found.projection.apply(found.coordinates)
    start = torch.cat([value.detach().flatten() for value in model.parameters()])
    now = torch.cat([value.detach().flatten() for value in found.model.parameters()])
    torch.testing.assert_close(now, start + moved)
    again = Projection(len(start), 5)
    torch.testing.assert_close(again.apply(found.coordinates), moved)
    assert len(list(found.model.parameters())) == len(list(model.parameters()))
    assert torch.isfinite(outputs(found.model, batch[0])).all()


def test_the_gradient_of_the_coordinates_is_that_of_autograd():
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3).double(), torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    start = torch.cat([value.detach().flatten() for value in model.parameters()])
    matrix = _matrix(Projection(21, 4, dtype=torch.float64))
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.005 * (21 / 4) ** 0.5)
    for _ in range(20):
        optimizer.zero_grad()
        w = start + matrix @ z
        F.cross_entropy(x @ w[:18].reshape(3, 6).T + w[18:], y).backward()
        optimizer.step()
    found = train_in_subspace(model, (x, y), 4, steps=20)
    torch.testing.assert_close(found.coordinates, z.detach())


def test_refusals():
    x, y = torch.randn(20, 4), torch.randn(20)
    with pytest.raises(UsageError, match="no such subspace"):
        Projection(10, 11)
    with pytest.raises(UsageError, match="out of range"):
        objective_dimension(nn.Linear(4, 2), (x, y), steps=0)
    with pytest.raises(UsageError, match="negative score"):
        objective_dimension(nn.Linear(4, 1), (x, y), loss=lambda out, y: out.mean(), score=lambda out, y: -1.0, steps=1)
    with pytest.raises(BadData, match="no classes"):
        objective_dimension(nn.Linear(4, 1), (x, y), loss=lambda out, y: F.mse_loss(out[:, 0], y), steps=1)
