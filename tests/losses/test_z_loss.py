"""The Z-loss against autograd of its formula, the factored layer against dense SGD."""

import copy

import pytest
import torch
from torch import nn

from nervure._kit import Diverged, UsageError
from nervure.losses import spherical
from nervure.losses.spherical import SphericalLinear, squared_error, taylor_softmax
from nervure.losses.z_loss import ZLoss, zloss


def _plain(logits, target, a, b):
    """The formula, sample by sample."""
    losses = []
    for row, c in zip(logits, target, strict=True):
        z = (row[c] - row.mean()) / ((row - row.mean()) ** 2).mean().sqrt()
        losses.append(torch.log1p(torch.exp(a * (b - z))) / a)
    return torch.stack(losses)


@pytest.mark.parametrize(("a", "b"), [(0.1, 10.0), (1.0, 3.0), (5.0, 1.0)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_loss_and_gradient_equal_the_formula(a, b, dtype, close):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 40, dtype=torch.float64, generator=draw).to(dtype)
    target = torch.randint(40, (6,), generator=draw)
    ours, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()
    expected = _plain(plain, target, a, b)
    found = zloss(ours, target, a=a, b=b, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
    expected.mean().backward()
    ZLoss(a, b)(ours, target).backward()
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=close * 10, atol=close)


def test_invariant_to_shift_and_scale():
    logits, target = torch.randn(5, 20, dtype=torch.float64), torch.arange(5)
    torch.testing.assert_close(zloss(4 * logits - 9, target), zloss(logits, target), rtol=1e-12, atol=0)


def test_weights_ignored_targets_and_positions():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, 3, dtype=torch.float64, generator=draw, requires_grad=True)
    target, weight = torch.randint(7, (4, 3), generator=draw), torch.rand(7, dtype=torch.float64, generator=draw)
    target[1, 2] = target[3, 0] = -100
    kept = target != -100
    rows = logits.transpose(1, 2)[kept]
    losses, shares = _plain(rows, target[kept], 0.1, 10.0), weight[target[kept]]
    torch.testing.assert_close(zloss(logits, target, weight=weight), (losses * shares).sum() / shares.sum())
    torch.testing.assert_close(zloss(logits, target, reduction="sum"), losses.sum())
    torch.testing.assert_close(zloss(logits, target), losses.mean())
    each = zloss(logits, target, reduction="none")
    assert each.shape == target.shape
    assert bool((each[~kept] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    logits, target = (torch.randn(4, 30) * 20).to(dtype).requires_grad_(), torch.arange(4)
    loss = zloss(logits, target)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, zloss(logits.float(), target))
    loss.backward()
    assert bool(torch.isfinite(logits.grad).all())


def test_equal_logits_have_a_finite_loss_and_no_gradient():
    logits = torch.zeros(2, 5, requires_grad=True)
    zloss(logits, torch.tensor([0, 4])).backward()
    assert bool((logits.grad == 0).all())


def _one_hot_error(logits, target):
    return ((logits - nn.functional.one_hot(target, logits.shape[1])) ** 2).sum(1) / 2


def _dense_taylor(logits, target):
    p = 1 + logits + logits**2 / 2
    return -(p.gather(1, target[:, None])[:, 0] / p.sum(1)).log()


PAIRS = {
    "z-loss": (ZLoss().spherical, lambda o, y: _plain(o, y, 0.1, 10.0), 1.0),
    "squared error": (squared_error, _one_hot_error, 1e-3),
    "taylor softmax": (taylor_softmax, _dense_taylor, 0.3),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_factored_step_is_dense_sgd(name, decay):
    factored, plain, lr = PAIRS[name]
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(120, 16, dtype=torch.float64, generator=draw) / 4
    head = SphericalLinear(16, 120, loss=factored, dtype=torch.float64)
    head.set_weight(start)
    dense = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([dense], lr=lr, weight_decay=decay)
    for _ in range(60):
        h = torch.randn(8, 16, dtype=torch.float64, generator=draw)
        y = torch.randint(5, (8,), generator=draw)  # few classes, so that targets repeat in a batch
        ours, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
        optimizer.zero_grad()
        loss = plain(theirs @ dense.T, y).mean()
        loss.backward()
        optimizer.step()
        found = head(ours, y)
        found.backward()
        head.step(lr, weight_decay=decay)
        torch.testing.assert_close(found, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)
    change = (dense.detach() - start).abs().max()
    assert float((head.weight - dense.detach()).abs().max() / change) < 1e-10
    W = dense.detach()
    torch.testing.assert_close(head.Q, W.T @ W, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(head.S, W.sum(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(head.logits(h), h @ W.T, rtol=1e-9, atol=1e-9)


def test_scaled_and_accumulated_losses():
    draw = torch.Generator().manual_seed(0)
    h, y = torch.randn(12, 6, dtype=torch.float64, generator=draw), torch.randint(30, (12,), generator=draw)
    whole = SphericalLinear(6, 30, loss=ZLoss().spherical, dtype=torch.float64)
    parts = copy.deepcopy(whole)
    whole(h, y).backward()
    for part in (slice(0, 4), slice(4, 12)):
        (parts(h[part], y[part]) * (len(h[part]) / 12)).backward()
    for head in (whole, parts):
        head.step(2.0)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-12, atol=1e-12)


def test_trunk_trains_through_the_head():
    torch.manual_seed(0)
    trunk, head = nn.Linear(5, 6), SphericalLinear(6, 50, loss=ZLoss(1.0, 5.0).spherical)
    x, y = torch.randn(32, 5), torch.arange(32)
    optimizer = torch.optim.Adam(trunk.parameters(), lr=1e-2)
    start = float(head(trunk(x), y).detach())
    for _ in range(100):
        optimizer.zero_grad()
        loss = head(trunk(x), y)
        loss.backward()
        optimizer.step()
        head.step(0.1)  # ten times less than where plain SGD on this loss becomes unstable
    assert float(loss.detach()) < start - 0.5
    dense = ZLoss(1.0, 5.0)(trunk(x) @ head.weight.T, y)
    torch.testing.assert_close(head(trunk(x), y), dense, rtol=1e-4, atol=1e-5)
    assert not list(head.parameters())


def test_no_drift_in_single_precision_over_10000_steps(monkeypatch):
    monkeypatch.setattr(spherical, "_RENEW_EVERY", 10**9)  # leave rounding alone with the factors
    draw = torch.Generator().manual_seed(0)
    head = SphericalLinear(8, 60, loss=ZLoss().spherical, generator=draw)
    for _ in range(10_050):
        head(torch.randn(4, 8, generator=draw), torch.randint(60, (4,), generator=draw)).backward()
        head.step(0.5, weight_decay=1e-4)
    W = head.weight.double()
    gram = W.T @ W
    assert float((head.Q.double() - gram).abs().max() / gram.abs().max()) < 1e-3
    assert float((head.S.double() - W.sum(0)).abs().max() / (60 * gram.abs().max()).sqrt()) < 1e-3
    assert float((head.U @ head.inverse - torch.eye(8)).abs().max()) < 1e-3


def test_single_precision_follows_double():
    draw = torch.Generator().manual_seed(0)
    single = SphericalLinear(8, 60, loss=ZLoss().spherical, generator=draw)
    double = SphericalLinear(8, 60, loss=ZLoss().spherical, dtype=torch.float64)
    start = single.weight.double()
    double.set_weight(start)
    for _ in range(2000):
        h, y = torch.randn(4, 8, generator=draw), torch.randint(60, (4,), generator=draw)
        for head, x in ((single, h), (double, h.double())):
            head(x, y).backward()
            head.step(0.5, weight_decay=1e-4)
    change = (double.weight - start).abs().max()
    assert float((single.weight.double() - double.weight).abs().max() / change) < 1e-3


def test_backward_after_the_step_is_refused():
    head, h, y = SphericalLinear(4, 20, loss=ZLoss().spherical), torch.randn(3, 4), torch.tensor([1, 2, 3])
    for change in (lambda: head.step(0.1), lambda: head.set_weight(torch.ones(20, 4))):
        early = head(h, y)
        head(h, y).backward()
        change()
        with pytest.raises(UsageError, match="has changed since"):
            early.backward()
    head._pending.clear()
    with torch.inference_mode():
        assert bool(head(h, y).isfinite())  # what is kept from here serves training too
    head(h, y).backward()
    head.step(0.1)


def test_spherical_slopes_are_the_derivatives():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 40, dtype=torch.float64, generator=draw)
    logits[0] = 2.0  # no z-score
    sums = [logits.sum(1), (logits**2).sum(1), logits[:, 3]]
    losses, *slopes = ZLoss(0.7, 2.0).spherical(*sums, 40)
    torch.testing.assert_close(losses, zloss(logits, torch.full((6,), 3), a=0.7, b=2.0, reduction="none"))
    assert all(float(slope[0]) == 0 for slope in slopes)
    for place, slope in enumerate(slopes):
        ends = []
        for sign in (1, -1):
            moved = [one + sign * 1e-5 * (place == which) for which, one in enumerate(sums)]
            ends.append(ZLoss(0.7, 2.0).spherical(*moved, 40)[0])
        torch.testing.assert_close(slope[1:], ((ends[0] - ends[1]) / 2e-5)[1:], rtol=1e-7, atol=1e-9)
    broken = [one.index_fill(0, torch.tensor([1]), float("nan")) for one in sums]
    assert bool(ZLoss().spherical(*broken, 40)[0][1].isnan())  # what is broken is not called flat


def test_state_goes_through_a_file(tmp_path):
    head = SphericalLinear(4, 20, loss=ZLoss().spherical)
    head(torch.randn(3, 4), torch.tensor([1, 2, 3])).backward()
    head.step(1.0)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = SphericalLinear(4, 20, loss=ZLoss().spherical)
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert torch.equal(other.weight, head.weight)


def test_refusals():
    head = SphericalLinear(2, 5, loss=squared_error, dtype=torch.float64)
    with pytest.raises(UsageError, match="no gradient"):
        head.step(0.1)
    with pytest.raises(UsageError, match="do not fit"):
        head(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
    head(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])).backward()
    before = head.weight
    with pytest.raises(Diverged):
        head.step(1.0)  # W loses a direction: its factors would have no inverse
    assert torch.equal(head.weight, before)
    with pytest.raises(UsageError, match="weights"):
        ZLoss(weight=torch.ones(5)).spherical(*torch.ones(3, 2), 5)
    with pytest.raises(UsageError, match="slope"):
        ZLoss(0.0)
    with pytest.raises(UsageError, match="do not fit"):
        zloss(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UsageError, match="reduction"):
        zloss(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), reduction="median")
