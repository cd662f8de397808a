"""Self-distillation against a loop written out in float64, its head against numpy, starts against their formula."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadBudget, BadModel, Unsupported, UsageError
from nervure.core import rng
from nervure.learn._teacher_trial import convolutional, noise_like
from nervure.learn.loop import Loop
from nervure.learn.random_teacher import ProjectionHead, learn_from_random, reshuffled, start_near
from nervure.testing import DiagnosticContract
from nervure.testing.checks import untouched


def small(width, seed=0):
    with rng.scope("head", seed):
        return ProjectionHead(width, hidden=(12,), bottleneck=6, outputs=20, std=0.3)


class TestLearnFromRandom(DiagnosticContract):
    """A student of any zoo model; its scores, flattened, are the features."""

    def run(self, model, task, *, seed):
        with torch.no_grad():
            width = zoo_width(model, task.inputs)
        return learn_from_random(model, task.inputs, steps=2, head=small(width, seed), lr=0.01, seed=seed)


def zoo_width(model, inputs):
    from nervure.learn._many_heads import width_of

    with rng.scope():
        return width_of(model, inputs)


def test_the_head_is_its_formula():
    head, x = small(7).double(), torch.randn(5, 7, dtype=torch.float64)
    weights = {name: value.detach().numpy() for name, value in head.named_parameters()}
    hidden = x.numpy() @ weights["layers.0.weight"].T + weights["layers.0.bias"]
    hidden = hidden * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(hidden)
    z = hidden @ weights["bottleneck.weight"].T + weights["bottleneck.bias"]
    rows = weights["directions.weight"]
    cosines = z @ rows.T / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(head(x).detach().numpy(), cosines, rtol=1e-12)
    paper = [value.numel() for value in ProjectionHead(512).parameters()]
    assert sum(paper) == 512 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256 + 256 * 65536
    draw = ProjectionHead(400, hidden=(400,), bottleneck=2, outputs=2).layers[0]
    assert abs(draw.weight.std().item() - 0.02) < 1e-3
    assert not draw.bias.any()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_weights_equal_those_of_a_loop_written_out(temperature):
    # Another loss (cross-entropy with a softmax of exponentials), another order of work, the same AdamW and batches.
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()).double()
    fresh = copy.deepcopy(encoder)
    nn.init.normal_(fresh[0].weight)
    head, x = small(48).double(), torch.randn(20, 1, 6, 6, dtype=torch.float64)
    found = learn_from_random(
        encoder, x, steps=6, alpha=0.3, head=head, fresh=fresh, batch_size=8, temperature=temperature, seed=5
    )
    student, mine = copy.deepcopy(encoder), reshuffled(head, seed=5)
    scale = math.sqrt(0.3**2 + 0.7**2)
    for one, two in [(student, fresh), (mine, head)]:
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            a, b = (0.7, 0.3) if one is student else (0.3, 0.7)
            p.data = p.data.clone() if torch.equal(p, q) else (a * p.data + b * q.data) / scale
    assert all(torch.equal(p, q) or torch.allclose(p, q, atol=1e-14, rtol=0)
               for p, q in zip(student.parameters(), found.start.parameters(), strict=True))  # fmt: skip
    optimizer = torch.optim.AdamW([*student.parameters(), *mine.parameters()], lr=1e-3, weight_decay=0.0)
    teacher = copy.deepcopy(encoder).eval()
    batches = Loop(student, optimizer, (x, torch.arange(20)), batch_size=8, seed=5)
    losses = []
    for step in range(6):
        part, _ = batches.batch(step)
        with torch.no_grad():
            target = (head(teacher(part)) / temperature).exp()
            target = target / target.sum(1, keepdim=True)
        scores = (mine(student(part)) / temperature).exp()
        given = scores / scores.sum(1, keepdim=True)
        optimizer.zero_grad()
        entropy = -(target * target.log()).sum(1).mean()
        loss = -(target * given.log()).sum(1).mean()
        losses.append(float((loss - entropy).detach()))
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(found.losses.double(), torch.tensor(losses).double(), rtol=1e-5, atol=1e-9)
    for name, value in found.student.state_dict().items():
        torch.testing.assert_close(value, student.state_dict()[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("learned_statistics", [False, True])
def test_a_student_that_starts_as_its_teacher_learns_nothing_but_batch_statistics(learned_statistics):
    norm = nn.BatchNorm1d(8) if learned_statistics else nn.LayerNorm(8)
    encoder = nn.Sequential(nn.Linear(5, 8), norm, nn.ReLU()).double()
    x = torch.randn(32, 5, dtype=torch.float64)
    found = learn_from_random(encoder, x, steps=1, alpha=0.0, head=small(8).double(), batch_size=32, lr=0.01)
    moved = max((p - q).abs().max().item() for p, q in zip(found.student.parameters(), encoder.parameters(),
                                                           strict=True))  # fmt: skip
    if learned_statistics:
        assert found.losses[0] > 1e-5
        assert moved > 0.9 * 0.01
    else:
        assert found.losses.abs().max() < 1e-12
        assert moved < 1e-6  # of a rate of 0.01, which is what Adam's first step moves where there is a gradient


def test_the_teacher_stays_bit_for_bit_and_the_student_comes_back_in_eval_mode():
    encoder, fresh = (convolutional(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    encoder[0].weight.requires_grad_(False)
    head, x = small(576), torch.randn(40, 1, 28, 28)
    with untouched(encoder, fresh, head):
        found = learn_from_random(encoder, x, steps=3, head=head, fresh=fresh, batch_size=20)
    assert not any(module.training for one in (found.student, found.start) for module in one.modules())
    assert torch.equal(found.student[0].weight, encoder[0].weight)  # frozen: kept at the start and in training
    assert torch.equal(found.start[3].weight, fresh[3].weight)  # alpha 1
    assert not torch.equal(found.student[3].weight, fresh[3].weight)
    assert torch.equal(found.start[1].running_var, torch.ones(16))
    assert not torch.equal(found.student[1].running_var, torch.ones(16))
    assert all(p.grad is None for p in found.student.parameters())
    assert found.last == pytest.approx(found.losses[-1].item())


def test_starts():
    teacher, fresh = nn.Linear(300, 300), nn.Linear(300, 300)
    for alpha in (0.0, 0.01, 0.5, 1.0):
        made = start_near(teacher, fresh, alpha)
        right = ((1 - alpha) * teacher.weight + alpha * fresh.weight) / math.sqrt((1 - alpha) ** 2 + alpha**2)
        torch.testing.assert_close(made.weight, right)
        assert abs(made.weight.std() / teacher.weight.std() - 1) < 0.02
    norms = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    norms[1].running_mean.fill_(3.0)
    assert torch.equal(start_near(*norms, 0.5).weight, torch.ones(4))
    assert not start_near(*norms, 0.5).running_mean.any()
    with pytest.raises(UsageError, match="no such start"):
        start_near(teacher, fresh, 1.5)
    with pytest.raises(BadModel, match="two shapes"):
        start_near(teacher, nn.Linear(300, 2), 0.5)


def test_a_reshuffled_network_is_another_draw():
    model = zoo.case("residual-conv").model()
    made, again = reshuffled(model, seed=1), reshuffled(model, seed=1)
    for name, value in model.named_parameters():
        other = dict(made.named_parameters())[name]
        assert torch.equal(value.flatten().sort().values, other.flatten().sort().values)
        assert torch.equal(other, dict(again.named_parameters())[name])
        assert value.unique().numel() == 1 or not torch.equal(value, other)
    weight = nn.Linear(400, 400).weight.detach()
    layer = nn.Linear(400, 400)
    layer.weight.data = weight
    two = torch.stack([weight.flatten(), reshuffled(layer).weight.detach().flatten()])
    assert abs(torch.corrcoef(two)[0, 1]) < 0.01  # four standard errors of independent draws


def test_errors_and_noise():
    encoder, x = nn.Linear(4, 6), torch.randn(10, 4)
    with pytest.raises(BadBudget, match="nothing to train"):
        learn_from_random(encoder, x, steps=0, head=small(6))
    with pytest.raises(UsageError, match="temperature"):
        learn_from_random(encoder, x, steps=1, head=small(6), temperature=0.0)
    with pytest.raises(Unsupported, match="shape"):
        learn_from_random(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), x, steps=1)
    images = 3 + 2 * torch.rand(50, 1, 20, 20)
    noise = noise_like(images, torch.Generator().manual_seed(0))
    assert abs(noise.mean() - images.mean()) < 0.02
    assert abs(noise.std() - images.std()) < 0.02
