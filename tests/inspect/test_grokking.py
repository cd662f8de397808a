"""Grokking: tables by brute force, concentration by numpy.fft, the recorder in loops and on every zoo model."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure import zoo
from nervure._kit import Diverged, UsageError
from nervure.core import forward
from nervure.core.group_tables import cyclic, symmetric, why_no_group
from nervure.inspect._delayed import shuffled, split, table_task, train
from nervure.inspect.grokking import Grokking, concentration, operation
from nervure.learn import Loop


@pytest.mark.parametrize("name", ["a+b", "a-b", "a*b", "a^2+b^2", "a^2+ab+b^2", "a^3+ab"])
def test_tables_equal_python_arithmetic(name):
    code = name.replace("^", "**").replace("ab", "a*b")
    table = operation(name, 7)
    assert all(int(table[a, b]) == eval(code, {"a": a, "b": b}) % 7 for a in range(7) for b in range(7))
    assert (why_no_group(table) is None) == (name == "a+b")


def test_division_undoes_multiplication():
    table = operation("a/b", 11)
    assert (table[:, 0] == -1).all()
    assert all(int(table[a, b]) * b % 11 == a for a in range(11) for b in range(1, 11))
    with pytest.raises(UsageError, match="prime"):
        operation("a/b", 9)
    with pytest.raises(UsageError, match="no such operation"):
        operation("a?b", 5)


def test_concentration_counts_frequencies():
    n, t = 11, torch.arange(11, dtype=torch.float64)
    one = torch.cos(2 * math.pi * 3 * t / n + 0.4)
    two = one + torch.sin(2 * math.pi * 4 * t / n)
    impulse = torch.eye(n, dtype=torch.float64)[0]
    found = concentration(torch.stack([one + 5, two, impulse, torch.ones(n).double()], 1), cyclic(n))
    assert found.tolist() == pytest.approx([1, 2, 5, 0], abs=1e-9)
    noise = torch.randn(n, 4, dtype=torch.float64)
    energy = (np.abs(np.fft.rfft(noise.numpy(), axis=0)) ** 2)[1:]
    shares = energy / energy.sum(0)
    assert concentration(noise, cyclic(n)).tolist() == pytest.approx((1 / (shares**2).sum(0)).tolist())


def test_a_network_that_learns_late_is_told_from_one_that_does_not():
    values = {"train": 0.0, "test": 0.0}

    class Known(nn.Module):
        """Answer right for as many samples as it is told to."""

        def forward(self, x):
            share = values["train"] if float(x[0, 1]) else values["test"]
            return F.one_hot((torch.arange(len(x)) >= share * len(x)).long(), 2).float()

    def data(flag):
        return torch.stack([torch.ones(100), torch.full((100,), flag)], 1), torch.zeros(100, dtype=torch.long)

    watch = Grokking(Known(), data(1.0), data(0.0))
    for t in range(1001):
        values["train"], values["test"] = min(1.0, t / 50), 1.0 if t >= 600 else 0.5
        watch.step(t)
        if t == 40:
            assert watch.report().verdict == "cannot tell"
            assert math.isnan(watch.report().delay)
        if t == 500:
            assert watch.report().verdict == "warn"
    report = watch.report()
    assert report.verdict == "ok"
    assert report.memorise.after < 49.5 <= report.memorise.time <= 56
    assert report.generalise.after < 600 <= report.generalise.time <= 672
    assert 10 < report.delay < 14
    assert report.curves["test_accuracy"][-1] == 1


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_model_can_be_watched_and_is_left_alone(name):
    case = zoo.case(name)
    model, (x, y) = case.model(), case.batch(8)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def loss(output, targets):
        return F.cross_entropy(output.flatten(0, -2), targets.flatten())

    half = slice(0, 4), slice(4, 8)
    watch = Grokking(model, *((forward.take(x, part), y[part]) for part in half), loss=loss)
    watch.step(0)
    watch.step(1)
    report = watch.report()
    assert report.steps.tolist() == [0, 1]
    assert all(bool(curve.isfinite().all()) for curve in report.curves.values())
    answers = forward.predict(model, x).argmax(-1)[:4]
    assert float(report.curves["train_accuracy"][0]) == pytest.approx(float((answers == y[:4]).double().mean()))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_it_is_a_hook_of_the_loop_and_takes_measures():
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    model = nn.Linear(4, 3)
    watch = Grokking(model, (x, y), (x, y), measures={"bias": lambda: model.bias.norm()})
    Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), hooks=[watch]).run(30)
    report = watch.report()
    assert len(report.steps) > 10
    assert float(report.curves["bias"][-1]) > 0
    assert float(report.curves["train_loss"][-1]) < float(report.curves["train_loss"][0])
    with pytest.raises(UsageError, match="there already"):
        Grokking(model, (x, y), (x, y), measures={"weight_norm": lambda: 0.0})
    with pytest.raises(UsageError, match="no such accuracy"):
        Grokking(model, (x, y), (x, y), memorised=2)


def test_a_transformer_of_two_tokens_can_be_watched():
    table = operation("a+b", 5)
    tokens = torch.cartesian_prod(torch.arange(5), torch.arange(5))

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.read = nn.Embedding(5, 8), nn.Linear(8, 5)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.read(self.layer(self.embed(x))[:, -1])

    model = Reader()
    watch = Grokking(
        model,
        (tokens[:20], table.flatten()[:20]),
        (tokens[20:], table.flatten()[20:]),
        measures={"irreps": lambda: concentration(model.embed.weight, cyclic(5)).mean()},
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for t in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:20]), table.flatten()[:20]).backward()
        optimizer.step()
        watch.step(t)
    assert 1 <= float(watch.report().curves["irreps"][-1]) <= 2
    assert float(watch.report().curves["train_loss"][-1]) < 0.8 * float(watch.report().curves["train_loss"][0])


def test_the_bench_splits_cells_and_shuffles_tables():
    table = symmetric(3).table
    seen, unseen = split(36, 0.75, 0)
    assert len(seen) == 27
    assert sorted([*seen.tolist(), *unseen.tolist()]) == list(range(36))
    mixed = shuffled(table, 0)
    assert torch.equal(mixed.flatten().bincount(), table.flatten().bincount())
    assert not torch.equal(mixed, table)
    task = table_task(operation("a/b", 5), 0.5, seed=0)
    assert len(task.train[1]) + len(task.test[1]) == 20
    x, y = task.train
    a, b = x[:, :5].argmax(1), x[:, 5:].argmax(1)
    assert torch.equal(y, operation("a/b", 5)[a, b])


def test_the_bench_trains_as_torch_does_and_repeats():
    task = table_task(symmetric(3).table, 0.8, seed=0)
    runs = [train(task, seed=3, steps=40) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True))
    assert runs[0].memorise.observed
    assert runs[0].delay == pytest.approx(runs[0].generalise.time / runs[0].memorise.time)
    sgd = train(task, optimizer=lambda p: torch.optim.SGD(p, 0.0), seed=3, steps=3, penalty=lambda m: m[0].weight.sum())
    assert sgd.recorder.steps == [0, 1, 2, 3]
    assert not sgd.memorise.observed
    assert sgd.delay == 0


def test_the_bench_stops_where_it_generalised_and_draws_batches_by_seed():
    task = table_task(symmetric(3).table, 0.8, seed=0)
    easy = replace(task, test=task.train, generalised=0.5)
    times = train(easy, seed=0, steps=500, until_generalised=True)
    steps = times.recorder.steps
    assert times.generalise.observed
    assert times.horizon == steps[-1] < 500
    assert steps[steps.index(times.generalise.time) + 1] <= times.horizon
    runs = [train(task, seed=seed, steps=5, batch_size=8).model[0].weight for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], train(task, seed=1, steps=5).model[0].weight)
    with pytest.raises(Diverged):
        train(task, optimizer=lambda p: torch.optim.SGD(p, 1e30), seed=0, steps=30)
