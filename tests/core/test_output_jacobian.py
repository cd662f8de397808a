"""The Jacobian operator against torch.func.jacrev in float64, over the zoo."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from nervure import zoo
from nervure._kit import BadData, NotDeterministic, Unsupported, UsageError
from nervure.core import forward, output_jacobian
from nervure.core.output_jacobian import jacobian
from nervure.core.vectors import flatten, select, unflatten
from nervure.testing.checks import untouched

# A few parameters of the models whose whole Jacobian is large.
PART = {"lenet-300-100": ["head", "fc2.bias"], "lenet": ["conv1", "head"], "mlp": ["layers.1", "head"]}


def _double(value):
    return forward.tree_map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value)


def _case(name, count=3):
    model = zoo.case(name).model().double().eval()
    inputs, targets = zoo.case(name).batch(count)
    return model, (_double(inputs), targets)


def _brute(model, inputs, parameters=None):
    chosen = select(model, parameters)

    def output(vector):
        bound = lambda *args, **kwargs: functional_call(model, unflatten(vector, chosen), args, kwargs)  # noqa: E731
        return forward.outputs(bound, inputs).flatten()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return jacrev(output)(flatten(chosen).detach())


@pytest.mark.parametrize("name", zoo.names())
def test_equals_the_matrix_on_the_zoo(name):
    model, batch = _case(name)
    with untouched(model):
        truth = _brute(model, batch[0], PART.get(name)).detach()
        J = jacobian(model, batch, parameters=PART.get(name))
        assert J.shape == truth.shape == J.T.shape[::-1]
        close = {"rtol": 1e-9, "atol": 1e-12 * float(truth.abs().max())}
        torch.testing.assert_close(J.dense(), truth, **close)
        source = torch.Generator().manual_seed(1)
        v, u = (torch.randn(length, 3, generator=source).double() for length in (J.size, J.shape[0]))
        torch.testing.assert_close(J @ v, truth @ v, **close)
        torch.testing.assert_close(J.T @ u, truth.T @ u, **close)
        torch.testing.assert_close(J @ v[:, 0], truth @ v[:, 0], **close)
        torch.testing.assert_close(J.T @ u[:, 0], truth.T @ u[:, 0], **close)
        torch.testing.assert_close((u * (J @ v)).sum(), ((J.T @ u) * v).sum(), rtol=1e-10, atol=1e-10)
        batches = [(forward.take(batch[0], index), batch[1][index]) for index in (slice(0, 1), slice(1, 3))]
        several = jacobian(model, batches, parameters=PART.get(name))
        assert several.shape == J.shape
        torch.testing.assert_close(several @ v, truth @ v, **close)
        torch.testing.assert_close(several.T @ u[:, 0], truth.T @ u[:, 0], **close)


def test_a_tall_matrix_and_one_by_one_agree(monkeypatch):
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(70, 2).double()
    batch = (x, torch.zeros(70))
    J = jacobian(model, batch)
    assert J.shape == (140, 17)
    truth = _brute(model, x)
    torch.testing.assert_close(J.dense(), truth)
    torch.testing.assert_close(J.T.dense(), truth.T)
    wide = torch.randn(140, 150).double()  # more columns than run together
    torch.testing.assert_close(J.T @ wide, truth.T @ wide)
    assert (J.T @ wide[:, :0]).shape == (17, 0)
    assert (J @ torch.zeros(17, 0).double()).shape == (140, 0)
    monkeypatch.setattr(output_jacobian, "_SMALL", 0)
    torch.testing.assert_close(jacobian(model, batch).T @ wide, truth.T @ wide)
    torch.testing.assert_close(jacobian(model, batch) @ truth.T, truth @ truth.T)


class Branching(torch.autograd.Function):
    """Square by a backward that branches on values, which a batch of gradients cannot."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * (g if bool(g.detach().abs().sum() >= 0) else -g)


class Once(Branching):
    """Square by a backward that leaves torch and so has no derivative."""

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy() * g.detach().numpy())


class Square(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def test_what_cannot_be_batched_runs_one_by_one():
    model, x = nn.Sequential(nn.Linear(2, 3), Square(Branching)).double(), torch.randn(2, 2).double()
    J = jacobian(model, (x, torch.zeros(2)))
    dense = J.dense()
    assert J._one_by_one
    inner = model[0](x).detach()
    for row, (n, o) in enumerate((n, o) for n in range(2) for o in range(3)):
        named = J.named(dense[row])
        weight, bias = torch.zeros(3, 2).double(), torch.zeros(3).double()
        weight[o], bias[o] = 2 * inner[n, o] * x[n], 2 * inner[n, o]
        torch.testing.assert_close(named["0.weight"], weight)
        torch.testing.assert_close(named["0.bias"], bias)


def test_a_backward_pass_without_a_derivative_is_refused():
    model = nn.Sequential(nn.Linear(2, 3), Square(Once)).double()
    batch = (torch.randn(2, 2).double(), torch.zeros(2))
    with untouched(model), pytest.raises(Unsupported, match="differentiated"):
        jacobian(model, batch)


def test_frozen_and_idle_parameters():
    model, (x, y) = _case("twice-used")
    model.stem.requires_grad_(False)
    J = jacobian(model, (x, y))
    assert list(J.parameters) == ["shared.weight", "shared.bias", "head.weight", "head.bias"]
    torch.testing.assert_close(J.dense(), _brute(model, x))
    assert not model.stem.weight.requires_grad
    asked = jacobian(model, (x, y), parameters=["stem"])  # by name a frozen parameter counts
    torch.testing.assert_close(asked.dense(), _brute(model, x, ["stem"]))
    model.idle = nn.Linear(2, 2).double()
    idle = jacobian(model, (x, y), parameters=["idle"])
    assert not idle.dense().any()
    assert not (idle @ torch.ones(6, 2).double()).any()
    assert not (idle.T @ torch.ones(12).double()).any()


def test_outputs_of_other_lengths_in_other_batches():
    model = nn.Linear(2, 1).double()
    batches = [(torch.randn(2, n, 2).double(), torch.zeros(2)) for n in (3, 5)]
    J = jacobian(model, batches)
    assert J.shape == (16, 3)
    truth = torch.cat([_brute(model, x) for x, _ in batches])
    torch.testing.assert_close(J.dense(), truth)
    torch.testing.assert_close(J.T @ truth, truth.T @ truth)


def test_refuses():
    batch = (torch.randn(5, 3), torch.zeros(5))
    with pytest.raises(Unsupported, match="random"):
        jacobian(nn.Sequential(nn.Linear(3, 4), nn.Dropout()), batch)
    with pytest.raises(Unsupported, match="batch normalisation"):
        jacobian(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), batch)
    with pytest.raises(BadData):
        jacobian(nn.Linear(3, 4), [])
    J = jacobian(nn.Linear(3, 4), batch)
    for product in (lambda: J @ torch.ones(3), lambda: J.T @ torch.ones(16), lambda: J @ torch.ones(16, 1, 1)):
        with pytest.raises(UsageError, match="does not fit"):
            product()

    class Drifting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) + self.calls

    with pytest.raises(NotDeterministic):
        jacobian(Drifting(3, 4), batch)
