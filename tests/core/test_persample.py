"""Per-sample gradients against autograd on one sample at a time, in float64, on modules made to break them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure import zoo
from nervure._kit import Unsupported, UsageError
from nervure.adapt.ewc import fisher_diagonal
from nervure.core.forward import outputs, take, tree_map
from nervure.core.jacobian import Engine
from nervure.core.operators import hessian
from nervure.core.persample import PerSample
from nervure.core.vectors import flatten, only, select, unflatten
from nervure.kernels.pseudo_ntk import pntk


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5, padding_idx=0)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)).mean(1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)) + F.linear(x, self.inner.weight * 2))


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.inner, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 6), nn.Linear(6, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.inner(x).relu_() * self.scale)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x)[:, 0])


class TimeFirst(nn.Module):
    """Keeps samples on axis 1, where a batch of as many samples as time steps looks just the same."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).transpose(0, 1).sum(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Dict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, left, right):
        return {"logits": self.a(left) * self.b(right)}


class Halved(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / 2, self.bias)


class Branching(nn.Module):
    """Looks at the values of its input, so that vmap cannot follow."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return torch.stack([row @ self.a if row.sum().item() > 0 else (row @ self.a) ** 2 for row in x])


def _conv(*layers):
    return nn.Sequential(*layers, nn.Flatten())


IMAGE = (3, 4, 9, 8)
CASES = {
    "in-place-relu": (nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (5, 6)),
    "sequence": (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten()), (5, 3, 4)),
    "four-axes": (nn.Sequential(nn.Linear(4, 2, bias=False), nn.Flatten()), (5, 2, 3, 4)),
    "grouped": (_conv(nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2, padding=(1, 2)), nn.Tanh()), IMAGE),
    "depthwise-reflect": (_conv(nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect")), IMAGE),
    "circular-same": (_conv(nn.Conv2d(4, 2, (2, 3), padding="same", padding_mode="circular", bias=False)), IMAGE),
    "zeros-same-even": (_conv(nn.Conv2d(4, 2, 4, padding="same")), IMAGE),
    "replicate-valid": (_conv(nn.Conv2d(4, 2, 3, padding="valid", padding_mode="replicate")), IMAGE),
    "conv1d": (_conv(nn.Conv1d(4, 6, 3, groups=2, padding=2, dilation=2, stride=2)), (4, 4, 11)),
    "conv3d": (_conv(nn.Conv3d(2, 4, 2, groups=2, padding=1, stride=(1, 2, 1))), (3, 2, 4, 4, 3)),
    "transposed": (_conv(nn.ConvTranspose2d(4, 2, 3, stride=2)), (3, 4, 3, 3)),
    "group-norm": (_conv(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.SiLU()), IMAGE),
    "batch-norm": (_conv(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval(), IMAGE),
    "layer-norm-2": (_conv(nn.LayerNorm((9, 8)), nn.Conv2d(4, 2, 3)), IMAGE),
    "rms-norm": (nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 2)), (5, 6)),
    "twice": (Twice(), (5, 6)),
    "functional": (Functional(), (5, 6)),
    "raw": (Raw(), (5, 6)),
    "subclass": (nn.Sequential(Halved(6, 5), nn.Linear(5, 2)), (5, 6)),
    "parametrized": (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 2)), (5, 6)),
    "attention": (Attention(), (4, 5, 8)),
    "time-first": (TimeFirst(), (6, 6, 4)),
    "time-first-3": (TimeFirst(), (3, 3, 4)),
    "recurrent": (Recurrent(), (4, 3, 4)),
    "branching": (Branching(), (5, 4)),
}
FALLS_BACK = {"transposed", "functional", "raw", "subclass", "parametrized", "attention", "time-first", "time-first-3"}


def _loss(output, target):
    return (output.tanh() * target).sum(1).square().mean() + F.cross_entropy(output, target.softmax(1))


def _reference(model, inputs, targets, names):
    chosen = select(model, names)
    rows = []
    for n in range(len(targets)):
        part = {key: value[n : n + 1] for key, value in inputs.items()} if isinstance(inputs, dict) else None
        output = model(**part)["logits"] if part else model(inputs[n : n + 1])
        value = _loss(output, targets[n : n + 1])
        found = torch.autograd.grad(value, list(chosen.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(chosen.values(), found, strict=True)])
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(chosen)}


def _inputs(name):
    if name == "tied":
        return Tied().double(), torch.randint(0, 7, (5, 4))
    if name == "dict":
        return Dict().double(), {"left": torch.randn(5, 3).double(), "right": torch.randn(5, 2).double()}
    model, shape = CASES[name]
    return model.double(), torch.randn(shape).double()


# torch itself warns that an even kernel with "same" padding costs a copy.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", [*CASES, "tied", "dict"])
def test_every_form_equals_autograd_sample_by_sample(name):
    model, inputs = _inputs(name)
    with torch.no_grad():
        output = model(**inputs)["logits"] if isinstance(inputs, dict) else model(inputs)
    targets = torch.randn_like(output)
    truth = _reference(model, inputs, targets, None)
    engine = PerSample(model, (inputs, targets), _loss)
    batch = (inputs, targets)
    found = engine.gradients(batch)
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)
    flat = torch.cat([value.flatten(1) for value in truth.values()], 1)
    for key, value in engine.squared_sums(batch).items():
        torch.testing.assert_close(value, truth[key].square().sum(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(engine.squared_norms(batch), flat.square().sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(engine.inner_products(batch), flat @ flat.T, rtol=1e-10, atol=1e-12)
    direction = {key: torch.randn_like(value[0]) for key, value in truth.items()}
    for key, (norms, along) in engine.against(batch, direction).items():
        rows = truth[key].flatten(1)
        torch.testing.assert_close(norms, rows.square().sum(1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(along, rows @ direction[key].flatten(), rtol=1e-10, atol=1e-12)
    if name in FALLS_BACK:
        assert engine.engine.mapped
    if name in {"recurrent", "branching"}:
        assert engine.engine.looped
    if name not in FALLS_BACK | {"recurrent", "branching"}:
        assert engine.engine.closed == frozenset(engine.engine.chosen)


def test_a_user_hook_that_replaces_the_output_does_not_come_between():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model[0].register_forward_hook(lambda module, args, output: output * 3 + output.sin())
    inputs, targets = torch.randn(4, 4).double(), torch.randn(4, 2).double()
    truth = _reference(model, inputs, targets, None)
    engine = PerSample(model, (inputs, targets), _loss)
    for key, value in engine.gradients((inputs, targets)).items():
        torch.testing.assert_close(value, truth[key])
    assert engine.engine.closed == frozenset(truth)
    assert len(model[0]._forward_hooks) == 1


def test_an_input_overwritten_after_the_call_does_not_take_the_closed_form():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Conv1d(3, 2, 1)

        def forward(self, x):
            x = x * 1
            y = self.a(x)
            return y + x.zero_()

    model = Overwrites().double()
    with pytest.raises(RuntimeError, match="inplace"):
        PerSample(model, (torch.randn(4, 3).double(), torch.randn(4, 3).double()), _loss)


def test_small_chunks_give_the_same():
    model, inputs = _inputs("grouped")
    targets = torch.randn_like(model(inputs).detach())
    whole = PerSample(model, (inputs, targets), _loss).squared_sums((inputs, targets))
    engine = PerSample(model, (inputs, targets), _loss, memory=1)
    assert engine.chunk == 1
    for key, value in engine.squared_sums((inputs, targets)).items():
        torch.testing.assert_close(value, whole[key])


def test_subset_by_prefix_and_frozen_parts():
    model, inputs = _inputs("in-place-relu")
    targets = torch.randn(5, 3).double()
    model[0].requires_grad_(False)
    truth = _reference(model, inputs, targets, None)
    assert set(PerSample(model, (inputs, targets), _loss).gradients((inputs, targets))) == set(truth)
    named = PerSample(model, (inputs, targets), _loss, parameters=["0"]).gradients((inputs, targets))
    assert set(named) == {"0.weight", "0.bias"}
    assert not model[0].weight.requires_grad
    with pytest.raises(UsageError, match="no parameter has this name"):
        PerSample(model, (inputs, targets), _loss, parameters=["nothing"])
    model.requires_grad_(True)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval(),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
        nn.Sequential(nn.Softmax(0), nn.Linear(4, 4)),
    ],
    ids=["batch-norm-train", "batch-norm-without-statistics", "dropout", "softmax-over-samples"],
)
def test_samples_that_have_no_gradient_of_their_own_are_refused(model):
    state = torch.get_rng_state()
    with pytest.raises(Unsupported):
        PerSample(model, (torch.randn(5, 4), torch.randn(5, 4)), _loss)
    torch.set_rng_state(state)
    with pytest.raises(Unsupported):
        Engine(model, torch.randn(5, 4))


def test_the_model_and_the_generators_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(4, 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    batch = (torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(6, 2))
    PerSample(model, batch, F.mse_loss).gradients(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones(4, 4))
    assert model[2].weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_flat_vectors_go_there_and_back_and_count_tied_weights_once():
    model = Tied()
    chosen = select(model)
    vector = flatten(chosen)
    assert vector.numel() == 7 * 5 + 5 + 5 + 7
    for name, value in unflatten(vector, chosen).items():
        assert torch.equal(value, chosen[name])
    assert list(select(model, ["head"])) == ["embed.weight", "head.bias"]
    with pytest.raises(UsageError, match="does not fit"):
        unflatten(vector[1:], chosen)
    with pytest.raises(KeyError), only(model, select(model, ["norm"])):
        raise KeyError
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_model_has_its_gradients_ntk_fisher_and_hessian(name):
    case = zoo.case(name)
    model = case.model(seed=0).eval().double()
    inputs, targets = case.batch(4, seed=0)
    inputs = tree_map(lambda value: value.double() if value.is_floating_point() else value, inputs)

    def loss(output, target):
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    found = PerSample(model, (inputs, targets), loss).gradients((inputs, targets))
    chosen = select(model)
    truth, sums = [], []
    for n in range(4):
        output = outputs(model, take(inputs, slice(n, n + 1)))
        value = loss(output, targets[n : n + 1])
        for rows, wanted in ((truth, value), (sums, output.sum() / output.numel() ** 0.5)):
            part = torch.autograd.grad(wanted, list(chosen.values()), allow_unused=True, retain_graph=True)
            rows.append(
                flatten([torch.zeros_like(p) if g is None else g for g, p in zip(part, chosen.values(), strict=True)])
            )
    flat = torch.cat([value.flatten(1) for value in found.values()], 1)
    assert float(flat.abs().max()) > 0
    torch.testing.assert_close(flat, torch.stack(truth), rtol=1e-9, atol=1e-12)
    J = torch.stack(sums)
    torch.testing.assert_close(pntk(model, inputs).full, J @ J.T, rtol=1e-9, atol=1e-11)
    fisher = fisher_diagonal(model, [(inputs, targets)], estimate="empirical")
    if targets.ndim == 1:
        torch.testing.assert_close(
            flatten([fisher[key] for key in chosen]), flat.square().mean(0), rtol=1e-9, atol=1e-14
        )
    operator = hessian(model, (inputs, targets), loss)
    v, w = torch.randn(2, operator.size).double()
    torch.testing.assert_close(v @ (operator @ w), w @ (operator @ v), rtol=1e-8, atol=1e-10)
