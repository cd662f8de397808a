"""Low-rank starts against dense decompositions, and the kernel of the claim against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import UsageError
from nervure.core.layerwise import tangent_kernel
from nervure.init import low_rank_, low_rank_start_
from nervure.init._rank_trial import mean, moved, recurrent, settle, streams
from nervure.init.init_rank_rich_lazy import _matrices

KINDS = ("gaussian", "flat", "truncated", "cell-types", "dale")


def _weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (8, 4, 3, 3)])
def test_rank_and_norm_are_exact(kind, norm, shape):
    weight, order = _weight(*shape), {"frobenius": "fro", "spectral": 2}[norm]
    before = weight.flatten(1).clone()
    assert low_rank_(weight, 3, kind=kind, norm=norm, gain=1.5) is weight
    values = torch.linalg.svdvals(weight.flatten(1))
    assert int((values > 1e-10 * values[0]).sum()) == 3
    wanted = 1.5 * torch.linalg.matrix_norm(before, order)
    torch.testing.assert_close(torch.linalg.matrix_norm(weight.flatten(1), order), wanted)
    if kind == "flat":
        torch.testing.assert_close(values[:3], values[:1].expand(3))
    if kind == "truncated":
        u, s, v = torch.linalg.svd(before, full_matrices=False)
        best = sum(s[k] * torch.outer(u[:, k], v[k]) for k in range(3))
        torch.testing.assert_close(weight.flatten(1), best * wanted / torch.linalg.matrix_norm(best, order))


def test_cell_types_and_dale():
    types = low_rank_(_weight(12, 20), 3, kind="cell-types")
    assert len(torch.unique(types)) == 9
    assert len(torch.unique(types, dim=0)) == len(torch.unique(types, dim=1).T) == 3
    dale = low_rank_(_weight(12, 20), 3, kind="dale")
    assert all(len(torch.unique(column.sign())) == 1 for column in dale.T)
    assert len(torch.unique(dale.sign())) == 2


@pytest.mark.parametrize("kind", ["gaussian", "flat"])
def test_only_the_given_directions_are_answered(kind):
    span = torch.linalg.qr(_weight(20, 4, seed=1))[0].T
    weight = low_rank_(_weight(12, 20), 2, kind=kind, directions=span)
    torch.testing.assert_close(weight @ span.T @ span, weight)
    assert int(torch.linalg.matrix_rank(weight)) == 2


def test_the_seed_decides_and_a_large_rank_is_full():
    one, two, other = (low_rank_(_weight(6, 9), 99, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert int(torch.linalg.matrix_rank(one)) == 6


@pytest.mark.parametrize("name", zoo.names())
def test_every_matrix_of_every_zoo_model(name):
    model, fresh = zoo.case(name).model(seed=0), zoo.case(name).model(seed=0)
    report = low_rank_start_(model, rank=2)
    assert report.ranks
    owners = {}
    for place, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None:
                owners.setdefault(id(value), (module, f"{place}.{key}" if place else key))
    for key, value in model.named_parameters():
        old = fresh.get_parameter(key)
        if key not in report.ranks:
            assert torch.equal(value, old)
            continue
        owner = owners[id(value)][0]
        for part, before in zip(_matrices(value.detach(), owner), _matrices(old.detach(), owner), strict=True):
            assert int(torch.linalg.matrix_rank(part.flatten(1), rtol=1e-4)) <= report.ranks[key] <= 2
            torch.testing.assert_close(part.norm(), before.norm())


def test_gates_projections_and_groups_are_matrices_of_their_own():
    lstm, attention = nn.LSTM(5, 8), nn.MultiheadAttention(8, 2)
    grouped, transposed = nn.Conv2d(8, 12, 3, groups=2), nn.ConvTranspose2d(8, 12, 3, groups=2)
    shapes = {
        lstm: (lstm.weight_hh_l0, 4, (8, 8)), attention: (attention.in_proj_weight, 3, (8, 8)),
        grouped: (grouped.weight, 2, (6, 4, 3, 3)), transposed: (transposed.weight, 2, (6, 4, 3, 3)),
    }  # fmt: skip
    for owner, (weight, count, shape) in shapes.items():
        assert [tuple(part.shape) for part in _matrices(weight, owner)] == [shape] * count
        low_rank_start_(owner, rank=1)
        parts = list(_matrices(weight.detach(), owner))
        assert all(int(torch.linalg.matrix_rank(part.flatten(1))) == 1 for part in parts)
        assert int(torch.linalg.matrix_rank(torch.cat([part.flatten(1) for part in parts]))) == min(count, 8)


def test_what_is_left_alone_is_named_with_a_reason():
    net = nn.ModuleDict({
        "table": nn.Embedding(9, 6), "normed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        "zero": nn.Linear(6, 6), "kept": nn.Linear(6, 6),
    })  # fmt: skip
    nn.init.zeros_(net["zero"].weight)
    report = low_rank_start_(net, rank=2)
    assert list(report.ranks) == ["kept.weight"]
    assert report.skipped["table.weight"] == "it is an embedding table"
    assert report.skipped["zero.weight"] == "it is zero"
    assert "it is parametrised" in report.skipped.values()
    assert list(low_rank_start_(net, rank=2, parameters=["table"]).ranks) == ["table.weight"]


def test_refusals():
    for options in ({"rank": 0}, {"rank": 1, "gain": 0.0}):
        with pytest.raises(UsageError, match="no such matrix"):
            low_rank_(_weight(4, 4), **options)
    with pytest.raises(UsageError, match="no such matrix"):
        low_rank_(_weight(4), 1)
    with pytest.raises(UsageError, match="no such kind"):
        low_rank_(_weight(4, 4), 1, kind="sparse")
    with pytest.raises(UsageError, match="do not fit"):
        low_rank_(_weight(4, 4), 1, directions=_weight(1, 3))


def test_the_kernel_of_a_linear_network_is_its_closed_form():
    net = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 1, bias=False)).double()
    x = _weight(6, 5)
    w1, w2 = (layer.weight.detach() for layer in net)
    closed = w2.square().sum() * x @ x.T + x @ w1.T @ w1 @ x.T
    torch.testing.assert_close(tangent_kernel(net, x), closed, rtol=1e-10, atol=1e-10)


def test_the_kernel_of_a_recurrent_network_is_that_of_autograd():
    net = recurrent(torch.Generator().manual_seed(0)).double()
    x = streams(torch.Generator().manual_seed(1), 3)[0].double()
    rows = [torch.autograd.grad(net(one[None]).squeeze(), list(net.parameters())) for one in x]
    jacobian = torch.stack([torch.cat([value.flatten() for value in row]) for row in rows])
    torch.testing.assert_close(tangent_kernel(net, x), jacobian @ jacobian.T)


def test_a_settled_network_has_its_loss_and_what_moved_is_measured():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = _weight(30, 4), _weight(30, 1, seed=1)
    first = float((net(x) - y).detach().square().mean())
    start = settle(net, (x, y), rate=0.05, goal=0.8 * first, most=5000)
    found = moved(net, start, x[:8], "0.weight", hidden="0")
    assert 0.7 * first < found.loss((x, y)) <= 0.8 * first
    assert found.weight == pytest.approx(
        float((net[0].weight - start[0].weight).detach().norm() / start[0].weight.detach().norm())
    )
    still = moved(start, start, x[:8], "0.weight", hidden="0")
    assert (still.weight, still.kernel, still.features) == pytest.approx((0, 0, 0), abs=1e-12)
    assert mean([found, still])["weight"] == pytest.approx(found.weight / 2)
