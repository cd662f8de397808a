"""Curvature operators against matrices formed by torch.func in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from nervure._kit import BadData, NervureError, NotDeterministic, Unsupported, UsageError
from nervure.core import operators
from nervure.core.operators import hessian
from nervure.core.persample import PerSample
from nervure.core.vectors import flatten, select, unflatten


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)
        self.b.weight = self.a.weight
        self.idle = nn.Linear(1, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.mix(x).chunk(3, -1)
        return self.head(self.norm(F.scaled_dot_product_attention(q, k, v)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def _conv():
    layers = nn.Conv2d(2, 4, 2, groups=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)
    return nn.Sequential(*layers).eval()


MODELS = {
    "tied": (Tied, (7, 3)),
    "conv": (_conv, (7, 2, 3, 3)),
    "attention": (Attention, (7, 3, 4)),
    "recurrent": (Recurrent, (7, 3, 2)),
}


def _differences(function, start, step=1e-5):
    """Central differences of the gradient: torch.func.jacrev twice is wrong for the attention model (torch 2.13)."""

    def gradient(vector):
        leaf = vector.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    rows = [gradient(start + step * unit) - gradient(start - step * unit) for unit in torch.eye(len(start)).double()]
    return torch.stack(rows) / (2 * step)


def _dense(kind, model, x, y):
    chosen = select(model)
    start = flatten(chosen).detach()

    def output(vector, inputs):
        return functional_call(model, unflatten(vector, chosen), (inputs,))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if kind == "hessian":
            return _differences(lambda v: F.cross_entropy(output(v, x), y), start)
        if kind in ("gauss_newton", "fisher"):
            J = jacrev(lambda v: output(v, x))(start)
            p = output(start, x).softmax(-1).detach()
            H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
            return torch.einsum("nop,noq,nqr->pr", J, H, J) / len(x)
        G = jacrev(lambda v: F.cross_entropy(output(v, x), y, reduction="none"))(start)
        second = G.T @ G / len(x)
        return second - torch.outer(G.mean(0), G.mean(0)) if kind == "gradient_covariance" else second


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "fisher", "empirical_fisher", "gradient_covariance"])
@pytest.mark.parametrize("name", MODELS)
def test_every_operator_equals_its_matrix(name, kind):
    factory, shape = MODELS[name]
    model = factory().double()
    x, y = torch.randn(shape).double(), torch.randint(0, 4, (7,))
    truth = _dense(kind, model, x, y)
    make = getattr(operators, kind)
    more = () if kind == "fisher" else (F.cross_entropy,)
    operator = make(model, (x, y), *more)
    scale = float(truth.abs().max())
    close = {"rtol": 0, "atol": 1e-8 * scale} if kind == "hessian" else {"rtol": 1e-9, "atol": 1e-11 * scale}
    torch.testing.assert_close(operator.dense(), truth, **close)
    if kind == "gradient_covariance":
        return
    streamed = make(model, [(x[:3], y[:3]), (x[3:], y[3:])], *more)
    v = torch.randn(operator.size).double()
    torch.testing.assert_close(streamed @ v, operator @ v, rtol=1e-9, atol=1e-11 * scale)


def test_a_subset_is_a_block():
    model = Tied().double()
    x, y = torch.randn(7, 3).double(), torch.randint(0, 4, (7,))
    whole = operators.hessian(model, (x, y), F.cross_entropy)
    block = operators.hessian(model, (x, y), F.cross_entropy, parameters=["head"])
    start = flatten({k: v for k, v in whole.parameters.items() if k in ("a.weight", "a.bias", "b.bias")}).numel()
    torch.testing.assert_close(block.dense(), whole.dense()[start : start + 16, start : start + 16])
    assert list(block.named(torch.ones(16))) == ["head.weight", "head.bias"]
    with pytest.raises(UsageError):
        block @ torch.ones(3)


def test_sampled_fisher_averages_to_the_exact_one():
    model, x = nn.Linear(2, 3).double(), torch.randn(4, 2).double()
    x = x.repeat(1500, 1)
    batch = (x, torch.zeros(len(x), dtype=torch.long))
    exact, sampled = operators.fisher(model, batch).dense(), operators.sampled_fisher(model, batch, seed=0).dense()
    assert (exact - sampled).norm() < 0.1 * exact.norm()
    again = operators.sampled_fisher(model, batch, seed=0).dense()
    assert torch.equal(sampled, again)
    gaussian = operators.fisher(model, batch, likelihood="gaussian").dense()
    drawn = operators.sampled_fisher(model, batch, seed=0, likelihood="gaussian").dense()
    assert (gaussian - drawn).norm() < 0.1 * gaussian.norm()


def test_refuses_what_is_not_deterministic():
    batch = (torch.randn(5, 3), torch.randint(0, 4, (5,)))
    with pytest.raises(Unsupported, match="random"):
        operators.hessian(nn.Sequential(nn.Linear(3, 4), nn.Dropout()), batch, F.cross_entropy)
    with pytest.raises(Unsupported, match="batch normalisation"):
        operators.hessian(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), batch, F.cross_entropy)
    calls = []

    def drifting(output, target):
        calls.append(1)
        return F.cross_entropy(output, target) + len(calls)

    with pytest.raises(NotDeterministic):
        operators.hessian(nn.Linear(3, 4), batch, drifting)
    with pytest.raises(BadData):
        operators.hessian(nn.Linear(3, 4), [], F.cross_entropy)


def test_leaves_the_model_alone():
    model = Tied()
    model.head.bias.requires_grad_(False)
    batch = (torch.randn(5, 3), torch.randint(0, 4, (5,)))
    operator = operators.hessian(model, batch, F.cross_entropy, parameters=["head"])
    operator @ torch.ones(16)
    assert not model.head.bias.requires_grad
    assert model.a.weight.requires_grad
    assert all(value.grad is None for value in model.parameters())


def _bad(kind):
    model, x, y = nn.Linear(4, 2), torch.randn(8, 4), torch.randint(2, (8,))
    loss = F.cross_entropy
    if kind == "vector":
        loss = lambda output, target: F.cross_entropy(output, target, reduction="none")  # noqa: E731
    elif kind == "nan":
        x = x * float("nan")
    elif kind == "half":
        model, x = model.bfloat16(), x.bfloat16()
    else:
        model.extra = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return model, (x, y), loss


@pytest.mark.parametrize(
    ("kind", "told"),
    [("vector", "not one number"), ("nan", "not finite"), ("half", "half precision"), ("complex", "is complex")],
)
def test_bad_losses_and_precisions_are_refused(kind, told):
    model, batch, loss = _bad(kind)
    with pytest.raises(NervureError, match=told):
        hessian(model, batch, loss)


@pytest.mark.parametrize(("kind", "told"), [("nan", "not finite"), ("complex", "is complex")])
def test_bad_outputs_and_parameters_have_no_gradient_by_sample(kind, told):
    model, batch, loss = _bad(kind)
    with pytest.raises(NervureError, match=told):
        PerSample(model, batch, loss)
