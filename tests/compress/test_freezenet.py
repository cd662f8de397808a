"""FreezeNet against autograd, and what freezing must mean."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from nervure.compress import FreezeNet
from nervure.core import modules, seeded
from nervure.spec import Budget
from nervure.testing import toy_task


def net():
    return seeded.draw_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), seed=3)


def test_chosen_weights_are_autograds_top_share_and_the_others_never_move():
    model, task = net(), toy_task()
    result = FreezeNet().fit(model, task, Budget(target=0.2, steps=30), seed=0)
    twin = copy.deepcopy(model)
    x, y = task.batches(1)[0]
    F.cross_entropy(twin(x), y).backward()
    worth = torch.cat([(w.detach() * w.grad).abs().flatten() for w in modules.weights(twin).values()])
    chosen = torch.cat([mask.flatten() for mask in result.masks.values()])
    best = torch.zeros_like(chosen)
    best[worth.argsort(descending=True)[: int(chosen.sum())]] = True
    assert torch.equal(chosen, best)
    assert int(chosen.sum()) == round(0.2 * len(worth))
    for name, mask in result.masks.items():
        before, after = model.get_parameter(name), result.model.get_parameter(name)
        assert torch.equal(before[~mask], after[~mask])
        assert bool((before[mask] != after[mask]).any())


def test_frozen_signs_have_one_size_a_layer():
    result = FreezeNet(frozen="signs").fit(net(), toy_task(), Budget(target=0.2, steps=5), seed=0)
    for name, mask in result.masks.items():
        sizes = result.model.get_parameter(name)[~mask].abs()
        assert torch.allclose(sizes, sizes[:1].expand_as(sizes))
        assert torch.equal(result.model.get_parameter(name)[~mask].sign(), net().get_parameter(name)[~mask].sign())


def test_a_trained_network_goes_through_a_seeded_file(tmp_path):
    result = FreezeNet().fit(net(), toy_task(), Budget(target=0.2, steps=20), seed=0)
    path = seeded.save(result.model, tmp_path / "small.safetensors", seed=3)
    again = seeded.load(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), path)
    x = torch.randn(5, 8)
    assert torch.equal(again(x), result.model(x))
