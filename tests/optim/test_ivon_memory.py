"""Parameters that point at a sample against the same ones overwritten with it: whoever looks sees equal weights."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure._kit import UsageError
from nervure.optim import _ivon_memory as memory
from nervure.optim.ivon import IVON

WAYS = pytest.mark.parametrize("points", [True, False], ids=["pointing", "copying"])


@pytest.fixture
def way(monkeypatch):
    """Return what switches pointing off, as a torch without its count of holders does."""

    def choose(points):
        if not points:
            monkeypatch.setattr(memory, "_holders_of_one", lambda: None)

    return choose


def _net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def _ivon(params, **options):
    given = {"lr": 0.1, "ess": 30.0, "hess_init": 0.5, "betas": (0.9, 0.99), "weight_decay": 0.05, **options}
    return IVON(list(params), **{"fused": True, **given})


def _data(dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, generator=draw).to(dtype), torch.randint(3, (12,), generator=draw)


def _train(net, optimizer, steps=4, blocks=1, dtype=torch.float64):
    x, y = _data(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(blocks):
            with optimizer.sample():
                F.cross_entropy(net(x).double(), y).backward()
        optimizer.step()


def _weights(params):
    return torch.cat([p.detach().double().flatten() for p in params])


def _pointers(params):
    return [p.data_ptr() for p in params]


@pytest.mark.parametrize("blocks", [1, 3])
def test_both_ways_take_equal_steps(way, blocks):
    found = []
    for points in (True, False):
        way(points)
        net = _net()
        optimizer, before = _ivon(net.parameters()), _pointers(net.parameters())
        with optimizer.sample():
            inside = [a != b for a, b in zip(_pointers(net.parameters()), before, strict=True)]
        assert inside == [points] * 4
        _train(net, optimizer, blocks=blocks)
        assert _pointers(net.parameters()) == before
        hess = _weights(optimizer.state[p]["hess"] for p in net.parameters())
        found.append((_weights(net.parameters()), hess))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
    unfused = _net()
    optimizer = _ivon(unfused.parameters(), fused=False)
    with optimizer.sample():
        pass
    _train(unfused, optimizer, blocks=blocks)
    torch.testing.assert_close(_weights(unfused.parameters()), found[0][0], rtol=1e-5, atol=1e-6)  # single noise


def _view(p):
    return p.detach()


def _array(p):
    return p.detach().numpy()


@WAYS
@pytest.mark.parametrize("look", [_view, _array, lambda p: p.detach().view(-1)[::2], nn.Parameter])
def test_a_view_from_before_sees_the_sample(way, points, look):
    way(points)
    net = _net()
    first = next(net.parameters())
    held, mean = look(first), first.detach().clone()
    optimizer = _ivon(net.parameters())
    with optimizer.sample():
        assert not torch.equal(first, mean)
        seen = torch.as_tensor(held).detach()
        assert torch.equal(seen, look(first).detach() if isinstance(held, Tensor) else first.detach())
    assert torch.equal(first.detach(), mean)
    with torch.no_grad():
        first.add_(1)
    assert torch.equal(torch.as_tensor(held).detach().flatten(), torch.as_tensor(look(first)).detach().flatten())


@WAYS
def test_a_view_from_inside_stays_a_view(way, points):
    way(points)
    net = _net()
    params = list(net.parameters())
    optimizer, mean = _ivon(params), _weights(params)
    for _ in range(2):  # the second time the parameters lie in the first sample's memory
        with optimizer.sample():
            held = [p.detach() for p in params]
            sampled = _weights(held)
        assert not torch.equal(sampled, mean)
        assert torch.equal(_weights(params), mean)
        assert torch.equal(_weights(held), mean)
        assert _pointers(held) == _pointers(params)
    _train(net, optimizer)
    assert torch.equal(_weights(held), _weights(params))
    other = _net()
    _train(other, second := _ivon(other.parameters()), steps=0)
    second._noise.load_state_dict({**optimizer._noise.state_dict(), "position": 0})
    for _ in range(2):
        with second.sample():
            pass
    _train(other, second)
    torch.testing.assert_close(_weights(other.parameters()), _weights(params), rtol=1e-12, atol=1e-13)


def _twins():
    one = nn.Parameter(torch.arange(6.0, dtype=torch.float64))
    return [one, nn.Parameter(one.detach())], one


def _of_larger():
    whole = torch.arange(12.0, dtype=torch.float64)
    return [nn.Parameter(whole[:4]), nn.Parameter(whole[6:])], whole


def _of_array():
    array = np.arange(5.0)
    return [nn.Parameter(torch.from_numpy(array))], array


def _across_processes():
    p = nn.Parameter(torch.arange(5.0, dtype=torch.float64)).share_memory_()
    return [p], p


@pytest.mark.parametrize("make", [_twins, _of_larger, _of_array, _across_processes])
def test_shared_memory_is_not_left(make):
    params, owner = make()
    params.append(nn.Parameter(torch.ones(3, dtype=torch.float64)))
    optimizer, before, mean = _ivon(params), _pointers(params), torch.as_tensor(owner).detach().clone()
    with optimizer.sample():
        moved = [a != b for a, b in zip(_pointers(params), before, strict=True)]
        assert moved == [False] * (len(params) - 1) + [True]  # the last is seen by nobody else
        assert not torch.equal(torch.as_tensor(owner).detach(), mean)
    assert torch.equal(torch.as_tensor(owner).detach(), mean)
    assert _pointers(params) == before


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("held", ["first", "unused"])
def test_mixed_parameters_take_the_steps_of_copied_ones(way, blocks, held):
    found = []
    for points in (True, False):
        way(points)
        net = _net()
        params = [*net.parameters(), nn.Parameter(torch.ones(5, dtype=torch.float64))]
        seen = (params[0] if held == "first" else params[-1]).detach()
        optimizer = _ivon(params)
        _train(net, optimizer, blocks=blocks)
        assert torch.equal(params[-1], torch.ones(5))
        assert seen.data_ptr() in _pointers(params)
        found.append(_weights(params))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@WAYS
def test_recurrent_network(way, points):
    way(points)
    torch.manual_seed(0)
    lstm, x = nn.LSTM(3, 4, num_layers=2).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    optimizer, before = _ivon(lstm.parameters()), lstm(x)[0].detach()
    with optimizer.sample():
        flat = [p.detach().clone() for p in lstm._flat_weights]
        out = lstm(x)[0]
        out.square().sum().backward()
        again = nn.LSTM(3, 4, num_layers=2).double()
        again.load_state_dict(lstm.state_dict())
        assert torch.equal(again(x)[0], out)
    assert not torch.equal(out, before)
    assert all(not torch.equal(a, b) for a, b in zip(flat, lstm._flat_weights, strict=True))
    assert torch.equal(lstm(x)[0], before)
    optimizer.step()


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x))[:, :3]


def test_tied_modules_point_too(way):
    found = []
    for points in (True, False):
        way(points)
        torch.manual_seed(0)
        net = _Tied().double()
        optimizer = _ivon(net.parameters())
        with optimizer.sample():
            assert net.decode.weight is net.encode.weight
        _train(net, optimizer)
        found.append(_weights(net.parameters()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@WAYS
def test_copies_and_files_made_inside_hold_the_sample(way, points):
    way(points)
    net, file = _net(), io.BytesIO()
    optimizer, mean = _ivon(net.parameters()), _weights(net.parameters())
    with optimizer.sample():
        sampled = _weights(net.parameters())
        copied, state = copy.deepcopy(net), net.state_dict()
        torch.save(state, file)
        assert torch.equal(_weights(state.values()), sampled)
    file.seek(0)
    assert torch.equal(_weights(torch.load(file).values()), sampled)
    assert torch.equal(_weights(copied.parameters()), sampled)
    assert torch.equal(_weights(state.values()), mean)  # views, as ever
    assert torch.equal(_weights(net.parameters()), mean)


@WAYS
def test_what_is_written_inside_is_undone(way, points):
    way(points)
    net, other = _net(), _net().requires_grad_(False)
    for p in other.parameters():
        p.fill_(7)
    optimizer, mean = _ivon(net.parameters()), _weights(net.parameters())
    state = _net(), optimizer.state_dict()
    with optimizer.sample():
        net.load_state_dict(other.state_dict())
        with pytest.raises(UsageError, match="inside a sample"):
            optimizer.load_state_dict(state[1])
    assert torch.equal(_weights(net.parameters()), mean)
    with optimizer.sample():
        held = [p.detach() for p in net.parameters()]  # as many holders as before
        for p in net.parameters():
            p.data = p.data.float() * 0
    assert len(held) == 4
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(_weights(net.parameters()), mean.float().double())


def test_changes_inside_do_not_reach_the_step(way):
    found = []
    for points in (True, False):
        way(points)
        net = _net()
        optimizer, (x, y) = _ivon(net.parameters(), weight_decay=1.0), _data()
        for _ in range(2):
            with optimizer.sample():
                with torch.no_grad():
                    net[0].weight.clamp_(-0.1, 0.1)
                F.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(_weights(net.parameters()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def _convolution():
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 2, bias=False), nn.Flatten()).double()


@WAYS
@pytest.mark.parametrize("make", [_net, _convolution])  # autograd keeps views of the weights, or the weights
def test_backward_after_the_block_is_refused(way, points, make):
    way(points)
    net, (x, y) = make(), _data()
    optimizer = _ivon(net.parameters())
    early = net(x.requires_grad_()).sum()
    with optimizer.sample():
        late = F.cross_entropy(net(x), y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            early.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@WAYS
def test_exceptions_give_the_mean_back(way, points, monkeypatch):
    way(points)
    net = _net()
    optimizer, mean, before = _ivon(net.parameters()), _weights(net.parameters()), _pointers(net.parameters())

    def fail(*_, **__):
        raise KeyboardInterrupt

    for name in ("_foreach_copy_", "_foreach_add_"):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, fail)
            if name == "_foreach_copy_" or not points:
                with pytest.raises(KeyboardInterrupt), optimizer.sample():
                    pass
        assert torch.equal(_weights(net.parameters()), mean)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "increment_version", fail)
        with pytest.raises(KeyboardInterrupt), optimizer.sample():
            pass
    assert torch.equal(_weights(net.parameters()), mean)
    with pytest.raises(UsageError, match="nested"), optimizer.sample(), optimizer.sample():
        pass
    with pytest.raises(ZeroDivisionError), optimizer.sample():
        1 / 0  # noqa: B018
    assert torch.equal(_weights(net.parameters()), mean)
    assert points or _pointers(net.parameters()) == before
    _train(net, optimizer)
    assert not torch.equal(_weights(net.parameters()), mean)


def test_a_compiled_forward_sees_the_sample():
    net, (x, _) = _net(), _data()
    compiled = torch.compile(net, backend="aot_eager")
    optimizer, mean = _ivon(net.parameters()), compiled(x).detach()
    torch.testing.assert_close(mean, net(x).detach(), rtol=1e-12, atol=0)
    for _ in range(2):
        with optimizer.sample():
            out = compiled(x)
            torch.testing.assert_close(out, net(x), rtol=1e-12, atol=1e-14)
            assert not torch.allclose(out, mean)
            out.sum().backward()
            grads = [p.grad.clone() for p in net.parameters()]
            exact = torch.autograd.grad(net(x).sum(), list(net.parameters()))
            torch.testing.assert_close(grads, list(exact), rtol=1e-12, atol=1e-14)
        optimizer.zero_grad()
        torch.testing.assert_close(compiled(x), mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.0)])
def test_other_precisions(way, dtype, close):
    found = []
    for points in (True, False):
        way(points)
        net = _net(dtype)
        optimizer, before = _ivon(net.parameters()), _pointers(net.parameters())
        with optimizer.sample():
            same = _pointers(net.parameters()) == before
        assert same is (not points or dtype is torch.bfloat16)  # a mean of low precision is not had back from a sum
        _train(net, optimizer, dtype=dtype)
        found.append(_weights(net.parameters()))
    torch.testing.assert_close(*found, rtol=close, atol=close)


def test_layout_and_precision_changed_after_the_first_sample():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3))
    optimizer, x = _ivon(net.parameters()), torch.randn(2, 2, 4, 4)
    for change in (lambda: net.to(memory_format=torch.channels_last), net.bfloat16, net.float, lambda: net):
        mean = _weights(change().parameters())
        kinds = [(p.dtype, p.stride()) for p in net.parameters()]
        with optimizer.sample():
            assert kinds == [(p.dtype, p.stride()) for p in net.parameters()]
            net(x.to(kinds[0][0])).sum().backward()
        assert torch.equal(_weights(net.parameters()), mean)
        optimizer.zero_grad()


def test_resume_is_exact(tmp_path):
    net = _net()
    optimizer = _ivon(net.parameters())
    _train(net, optimizer)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    _train(net, optimizer)
    again = _net()
    resumed, saved = _ivon(again.parameters(), seed=9), torch.load(tmp_path / "state.pt")
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    _train(again, resumed)
    assert torch.equal(_weights(again.parameters()), _weights(net.parameters()))


def test_predictions_between_samples_and_step(way):
    found = []
    for points in (True, False):
        way(points)
        net, (x, y) = _net(), _data()
        optimizer = _ivon(net.parameters())
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                first = optimizer.average(lambda net=net, x=x: net(x), samples=2)
            with optimizer.sample():
                F.cross_entropy(net(x), y).backward()
            with mode():
                assert torch.equal(optimizer.average(lambda net=net, x=x: net(x), samples=2), first)
            optimizer.step()
            optimizer.zero_grad()
        found.append(_weights(net.parameters()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_views_taken_in_inference_mode_do_not_stop_training():
    net = _net()
    optimizer = _ivon(net.parameters())
    for _ in range(2):
        with torch.inference_mode(), optimizer.sample():
            held = [p.detach() for p in net.parameters()]
        assert torch.equal(_weights(held), _weights(net.parameters()))
    mean = _weights(net.parameters())
    _train(net, optimizer)
    assert not torch.equal(_weights(net.parameters()), mean)


def test_noise_drawn_after_the_sample_leaves_the_decay_alone(way):
    found = []
    for points in (True, False):
        way(points)
        net, (x, y) = _net(), _data()
        optimizer = _ivon(net.parameters(), weight_decay=1.0)
        with optimizer.sample():
            F.cross_entropy(net(x), y).backward()
        for span in optimizer._spans:
            span.draw(optimizer._noise)
        optimizer.step()
        found.append(_weights(net.parameters()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_large_parameters_of_several_blocks_and_an_unused_block():
    large, unused = (nn.Parameter(torch.ones(700_000)) for _ in range(2))
    optimizer = _ivon([large, unused])
    for _ in range(2):
        with optimizer.sample():
            large.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bool((large != 1).all())
    assert bool((unused == 1).all())
