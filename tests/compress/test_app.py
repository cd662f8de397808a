"""APP: the schedule, the scores against autograd, and the errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import BadData, UsageError
from nervure.compress import ProgressivePruner
from nervure.core import masks, modules, rng


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 4))
    return net, torch.randn(60, 10), torch.randint(4, (60,))


def test_densities_are_the_schedules_to_one_weight():
    net, x, y = problem()
    pruner, total = ProgressivePruner(chunks=8), 10 * 30 + 30 * 4
    for t in range(8):
        pruner.arrive(net, (x, y), loss=F.cross_entropy)
        kept = sum(int(mask.sum()) for mask in masks.read(net).values())
        assert kept == round(0.8 ** (1 + 3.5 * t / 7) * total)


def test_the_kept_weights_are_autograds_largest():
    net, x, y = problem()
    some = torch.randperm(60, generator=rng.generator("progressive", 3, 0))[:12]
    loss = F.cross_entropy(net(x[some]), y[some])
    weights = [net[0].weight, net[2].weight]
    worth = torch.cat(
        [(w * g).abs().flatten() for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]
    )
    ProgressivePruner(chunks=3, seed=3).arrive(net, (x, y), loss=F.cross_entropy)
    kept = torch.cat([mask.flatten() for mask in masks.read(net).values()])
    expected = torch.zeros_like(kept)
    expected[worth.argsort(descending=True)[: int(kept.sum())]] = True
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("score", ["sensitivity", "magnitude", "chance"])
def test_masks_are_nested_and_hold_in_training(score):
    net, x, y = problem()
    pruner, before = ProgressivePruner(chunks=3, score=score), None
    for _ in range(3):
        pruner.arrive(net, (x, y), loss=F.cross_entropy)
        now = masks.read(net)
        assert before is None or not any(bool((now[name] & ~before[name]).any()) for name in now)
        before = now
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        assert all(bool((net.get_parameter(name)[~mask] == 0).all()) for name, mask in now.items())


@pytest.mark.parametrize("case", zoo.cases(), ids=lambda case: case.name)
def test_every_zoo_model_meets_the_density_and_keeps_its_buffers(case):
    model = case.model(seed=0)
    inputs, targets = case.batch(8, seed=0)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    rows = targets.reshape(len(targets), -1)[:, 0] if targets.ndim > 1 else targets

    def loss(outputs, chosen):
        scores = outputs.reshape(len(chosen), -1, outputs.shape[-1]).mean(1)
        return F.cross_entropy(scores, chosen)

    pruner = ProgressivePruner(chunks=2, share=1.0)
    found = pruner.arrive(model, (inputs, rows), loss=loss)
    total = sum(weight.numel() for weight in modules.weights(model).values())
    assert found == pytest.approx(0.8, abs=1 / total)
    assert all(torch.equal(dict(model.named_buffers())[name], value) for name, value in buffers.items())


def test_errors():
    net, x, y = problem()
    pruner = ProgressivePruner(chunks=1)
    with pytest.raises(BadData, match="no sample"):
        pruner.arrive(net, (x[:0], y[:0]), loss=F.cross_entropy)
    pruner.arrive(net, (x, y), loss=F.cross_entropy)
    with pytest.raises(UsageError, match="have come"):
        pruner.arrive(net, (x, y), loss=F.cross_entropy)
    with pytest.raises(UsageError, match="outside its range"):
        ProgressivePruner(chunks=0)
