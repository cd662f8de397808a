"""EWC against a loop over samples and classes in float64, and against the sum over tasks written out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure._kit import BadData, BadModel, Unsupported, UsageError
from nervure.adapt.ewc import EWC, fisher_diagonal
from nervure.spec import ContinualLearner


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens).mean(1)) * self.scale)


def _conv():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: torch.randn(10, 4).double()),
    "conv": (_conv, lambda: torch.randn(10, 2, 4, 4).double()),
    "tied": (Tied, lambda: torch.randint(0, 6, (10, 3))),
}


def _loop(model, x, labels=None):
    """Square the gradient of every log-probability of every sample, weighted by its probability."""
    values = {name: value for name, value in model.named_parameters() if value.requires_grad}
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    for n in range(len(x)):
        logp = model(x[n : n + 1]).log_softmax(1)[0]
        classes = range(len(logp)) if labels is None else [int(labels[n])]
        for c in classes:
            weight = logp[c].exp().detach() if labels is None else 1.0
            grads = torch.autograd.grad(logp[c], list(values.values()), retain_graph=True)
            for name, g in zip(values, grads, strict=True):
                total[name] += weight * g.square() / len(x)
    return total


@pytest.mark.parametrize("name", CASES)
def test_fisher_equals_the_loop_for_any_batch_size(name):
    factory, draw = CASES[name]
    model, x = factory().double(), draw()
    classes = 6 if name == "tied" else 3
    y = torch.randint(0, classes, (10,))
    model.eval()
    exact, empirical = _loop(model, x), _loop(model, x, y)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    for size in (1, 3, 10):
        batches = [(x[i : i + size], y[i : i + size]) for i in range(0, 10, size)]
        for key, value in fisher_diagonal(model, batches).items():
            torch.testing.assert_close(value, exact[key], rtol=1e-9, atol=1e-14)
        for key, value in fisher_diagonal(model, batches, estimate="empirical").items():
            torch.testing.assert_close(value, empirical[key], rtol=1e-9, atol=1e-14)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_fisher_averages_to_the_exact_one():
    model, x = CASES["mlp"][0]().double(), torch.randn(10, 4).double()
    many = (x.repeat(800, 1), torch.zeros(8000, dtype=torch.long))
    exact = fisher_diagonal(model, [many])
    sampled = fisher_diagonal(model, [many], estimate="sampled")
    for key, value in exact.items():
        assert float((sampled[key] - value).norm() / value.norm()) < 0.08
    gaussian = fisher_diagonal(model, [many], likelihood="gaussian")
    drawn = fisher_diagonal(model, [many], likelihood="gaussian", estimate="sampled")
    for key, value in gaussian.items():
        assert float((drawn[key] - value).norm() / value.norm()) < 0.08


def _task(model, seed):
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=source).double())
    return [(torch.randn(9, 4, generator=source).double(), torch.randint(0, 3, (9,), generator=source))]


@pytest.mark.parametrize("decay", [None, 0.7])
def test_folded_penalty_equals_the_sum_over_tasks(decay):
    model = CASES["mlp"][0]().double()
    ewc = EWC(model, strength=12.0, decay=decay)
    assert isinstance(ewc, ContinualLearner)
    assert ewc.penalty().item() == 0
    kept = []
    for seed in range(3):
        batches = _task(model, seed)
        kept.append((fisher_diagonal(model, batches), {k: v.detach().clone() for k, v in model.named_parameters()}))
        ewc.end_task(batches)
    _task(model, 9)
    values = dict(model.named_parameters())
    if decay is None:
        truth = sum((f[k] * (values[k] - a[k]) ** 2).sum() for f, a in kept for k in values) * 6
    else:
        truth = 6 * sum(
            ((0.49 * kept[0][0][k] + 0.7 * kept[1][0][k] + kept[2][0][k]) * (values[k] - kept[2][1][k]) ** 2).sum()
            for k in values
        )
    torch.testing.assert_close(ewc.penalty(), truth, rtol=1e-12, atol=0)
    found = torch.autograd.grad(ewc.penalty(), list(values.values()))
    for g, wanted in zip(found, torch.autograd.grad(truth, list(values.values())), strict=True):
        torch.testing.assert_close(g, wanted, rtol=1e-11, atol=1e-12)


def test_a_head_may_grow_and_not_shrink():
    model = CASES["mlp"][0]().double()
    ewc = EWC(model)
    ewc.end_task(_task(model, 0))
    old = model[2]
    model[2] = nn.Linear(5, 5).double()
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = old.weight, old.bias
    assert ewc.penalty().item() == 0
    with torch.no_grad():
        model[2].weight[3:] += 1
    assert ewc.penalty().item() == 0
    with torch.no_grad():
        model[2].weight[0] += 1
    assert ewc.penalty().item() > 0
    ewc.end_task(_task(model, 1))
    assert ewc.stiffness["2.weight"].shape == (5, 5)
    model[2] = old
    with pytest.raises(BadModel, match=r"2\.weight"):
        ewc.penalty()


def test_frozen_parts_and_bad_calls():
    model = CASES["mlp"][0]().double()
    model[0].requires_grad_(False)
    batches = _task(model, 0)
    assert set(fisher_diagonal(model, batches)) == {"2.weight", "2.bias"}
    with pytest.raises(BadData):
        fisher_diagonal(model, [])
    with pytest.raises(UsageError):
        EWC(model, strength=-1.0)
    with pytest.raises(UsageError):
        fisher_diagonal(model, batches, estimate="guess")
    with pytest.raises(Unsupported, match="exact needs outputs"):
        fisher_diagonal(nn.Linear(4, 3), [(torch.randn(5, 2, 4), torch.zeros(5, 2, dtype=torch.long))])
    tokens = [(torch.randn(5, 2, 4), torch.zeros(5, 2, dtype=torch.long))]
    assert set(fisher_diagonal(nn.Linear(4, 3), tokens, estimate="sampled")) == {"weight", "bias"}


def test_springs_hold_an_old_task():
    source = torch.Generator().manual_seed(0)
    x = torch.randn(400, 10, generator=source)
    tasks = [(x, (x[:, 0] > 0).long()), (x, (x[:, 0] + 2 * x[:, 1] > 0).long())]

    def run(strength):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
        ewc = EWC(model, strength=strength)
        for batch in tasks:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for _ in range(60):
                optimizer.zero_grad()
                (F.cross_entropy(model(batch[0]), batch[1]) + ewc.penalty()).backward()
                optimizer.step()
            ewc.end_task([batch])
        return float((model(x).argmax(1) == tasks[0][1]).float().mean())

    assert run(3000.0) > run(0.0) + 0.1


_LESSON = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
from nervure.adapt.ewc import EWC

def model():
    source = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=source))
    return net

def learn(net, optimizer, ewc, tasks):
    for task in tasks:
        source = torch.Generator().manual_seed(task)
        x, y = torch.randn(20, 4, generator=source), torch.randint(0, 3, (20,), generator=source)
        for _ in range(15):
            optimizer.zero_grad()
            (F.cross_entropy(net(x), y) + ewc.penalty()).backward()
            optimizer.step()
        ewc.end_task([(x, y)])

def start(decay):
    net = model()
    ewc = EWC(net, strength=40.0, decay=decay, estimate="sampled")
    return net, torch.optim.Adam(net.parameters(), lr=0.01), ewc
"""


@pytest.mark.parametrize("decay", [None, 0.7])
def test_a_state_continues_bit_for_bit_in_a_fresh_process(tmp_path, decay):
    names: dict = {}
    exec(_LESSON, names)
    net, optimizer, ewc = names["start"](decay)
    names["learn"](net, optimizer, ewc, (1, 2))
    saved = tmp_path / "half.pt"
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "ewc": ewc.state_dict()}, saved)
    names["learn"](net, optimizer, ewc, (3, 4))
    script = f"""{_LESSON}
net, optimizer, ewc = start({decay!r})
state = torch.load({str(saved)!r}, weights_only=True)
net.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
ewc.load_state_dict(state["ewc"])
learn(net, optimizer, ewc, (3, 4))
torch.save({{"model": net.state_dict(), "ewc": ewc.state_dict()}}, {str(tmp_path / "full.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    again = torch.load(tmp_path / "full.pt", weights_only=True)
    state = ewc.state_dict()
    assert again["ewc"]["tasks"] == state["tasks"] == 4
    assert torch.equal(torch.as_tensor(again["ewc"]["constant"]), torch.as_tensor(state["constant"]))
    for key in ("stiffness", "anchor"):
        assert all(torch.equal(again["ewc"][key][name], value) for name, value in state[key].items())
    assert all(torch.equal(again["model"][name], value) for name, value in net.state_dict().items())


def test_a_state_is_a_copy_and_fits_a_grown_head():
    model = CASES["mlp"][0]().double()
    ewc = EWC(model)
    ewc.end_task(_task(model, 0))
    state = ewc.state_dict()
    state["anchor"]["0.bias"] += 1
    assert ewc.penalty().item() == 0
    grown = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))
    other = EWC(grown)
    other.load_state_dict(state)
    state["anchor"]["0.bias"] += 1
    assert other.anchor["0.bias"].dtype == torch.float32
    torch.testing.assert_close(other.anchor["0.bias"].double(), ewc.anchor["0.bias"] + 1)
    assert other.penalty().item() > 0


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    model = CASES["mlp"][0]()
    ewc, source = EWC(model), EWC(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    source.end_task([(torch.randn(9, 4), torch.randint(0, 3, (9,)))])
    with pytest.raises(BadModel, match=r"0\.weight"):
        ewc.load_state_dict(source.state_dict())
    source.model = nn.Sequential(source.model)
    source.stiffness = {f"0.{name}": value for name, value in source.stiffness.items()}
    source.anchor = {f"0.{name}": value for name, value in source.anchor.items()}
    with pytest.raises(BadModel, match=r"0\.0\.weight"):
        ewc.load_state_dict(source.state_dict())
    with pytest.raises(BadData, match="no state"):
        ewc.load_state_dict({"tasks": 1})
    broken = source.state_dict()
    broken["anchor"].popitem()
    with pytest.raises(BadData, match="different"):
        ewc.load_state_dict(broken)
    assert ewc.tasks == 0
    assert ewc.stiffness == ewc.anchor == {}
