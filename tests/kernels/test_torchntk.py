"""The empirical NTK against J J' of torch.func in float64, on models made to break hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from nervure._kit import Unsupported, UsageError
from nervure.core import layerwise
from nervure.kernels import torchntk
from nervure.kernels.torchntk import entk


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3)
        self.group = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        return self.head((x + self.group(self.block(x)).relu_()).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 24)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v) + x).mean(1)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))) + F.linear(x, self.inner.weight * 2))


def _mlp():
    return nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)
    )


MODELS = {
    "mlp": (_mlp, lambda n: torch.randn(n, 5).double()),
    "residual": (lambda: Residual().eval(), lambda n: torch.randn(n, 2, 6, 6).double()),
    "transformer": (Transformer, lambda n: torch.randint(0, 9, (n, 4))),
    "reused": (Reused, lambda n: torch.randn(n, 5).double()),
    "image-output": (lambda: nn.Conv1d(2, 2, 2), lambda n: torch.randn(n, 2, 3).double()),
}


def _parts(model, x, z):
    """One sample at a time, no vmap, no hooks."""
    values = dict(model.named_parameters())

    def rows(inputs):
        found = [
            jacrev(lambda p, n=n: functional_call(model, p, (inputs[n : n + 1],)))(values) for n in range(len(inputs))
        ]
        return {
            key: torch.stack([f[key].detach().flatten(0, -values[key].ndim - 1).flatten(1) for f in found])
            for key in values
        }

    left, right = rows(x), rows(z)
    return {key: torch.einsum("nof,mpf->nmop", left[key], right[key]) for key in values}


@pytest.mark.parametrize("impl", ["structured", "jacobian"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_equals_brute_force(name, impl):
    factory, draw = MODELS[name]
    model = factory().double()
    x, z = draw(5), draw(4)
    for other in (None, z):
        parts = _parts(model, x, x if other is None else other)
        truth = sum(parts.values())
        tolerance = {"rtol": 1e-12, "atol": 1e-12 * float(truth.abs().max())}
        for block in (None, 2):
            kernel = entk(model, x, other, impl=impl, block=block)
            torch.testing.assert_close(kernel.full, truth, **tolerance)
            for key, value in kernel.components().items():
                torch.testing.assert_close(value, parts[key], **tolerance)
            assert kernel.components().keys() == parts.keys()
            count, width = len(x), truth.shape[-1]
            assert torch.equal(kernel.matrix().view(width, count, width, -1)[1, 2, 0], kernel.full[2, :, 1, 0])
            diagonal = truth.diagonal(dim1=2, dim2=3)
            wanted = {
                "per_class": diagonal.permute(2, 0, 1),
                "trace": diagonal.sum(-1),
                "sum_logits": truth.sum((2, 3)) / width,
            }
            for outputs, value in wanted.items():
                found = entk(model, x, other, outputs=outputs, impl=impl, block=block)
                torch.testing.assert_close(found.full, value, **tolerance)


def test_tiles_of_several_outputs_and_of_one_give_the_same(monkeypatch):
    model, x = _mlp().double(), torch.randn(6, 5).double()
    whole = entk(model, x).full
    for tile in (1, 12, 13):
        monkeypatch.setattr(layerwise, "TILE", tile)
        torch.testing.assert_close(entk(model, x).full, whole)


def test_layers_choose_the_parts():
    model, x = _mlp(), torch.randn(4, 5)
    parts = entk(model, x).components()
    torch.testing.assert_close(entk(model, x, layers=["0"]).full, parts["0.weight"] + parts["0.bias"])


def test_refuses_what_has_no_kernel():
    with pytest.raises(Unsupported, match="batch normalisation"):
        entk(Residual(), torch.randn(4, 2, 6, 6))
    with pytest.raises(UsageError):
        entk(_mlp(), torch.randn(4, 5), outputs="all")
    with pytest.raises(UsageError):
        entk(_mlp(), torch.randn(4, 5), block=0)


def test_far_faster_than_the_tutorial_recipe():
    import time

    model, x = torchntk._lenet(torch.Generator().manual_seed(0)), torch.randn(64, 1, 28, 28)
    seconds = []
    for function in (torchntk.jacobian_entk, lambda m, v: entk(m, v).full):
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            value = function(model, x)
            best = min(best, time.process_time() - started)
        seconds.append((best, value))
    torch.testing.assert_close(seconds[0][1], seconds[1][1], rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    # The benchmark measures 15; half of the claim's five keeps a busy machine from failing this.
    assert seconds[0][0] > 2.5 * seconds[1][0]


def test_parts_of_a_blocked_kernel_are_not_computed_from_another_model():
    model, x = _mlp(), torch.randn(4, 5)
    kept, blocked = entk(model, x), entk(model, x, block=3)
    parts = kept.components()
    torch.testing.assert_close(blocked.full, kept.full)
    with torch.no_grad():
        model[0].weight.add_(1)
    torch.testing.assert_close(kept.components()["2.weight"], parts["2.weight"])
    with pytest.raises(UsageError, match="has changed"):
        blocked.components()
