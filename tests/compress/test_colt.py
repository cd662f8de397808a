"""COLT against the lottery ticket and torch.nn.utils.prune."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from nervure._kit import BadBudget, UsageError
from nervure.compress import Colt
from nervure.compress.colt import intersection
from nervure.compress.recipe import Recipe
from nervure.core import masks
from nervure.spec import Budget
from nervure.testing import toy_task


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3))


def conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3)
    )


def test_identical_parts_give_the_lottery_ticket():
    """Both copies agree, so the intersection is one mask: iterative magnitude pruning with rewinding.

    312 weights are halved three times without rounding.
    """
    task, rounds, density = toy_task(), 3, 0.125
    kept = list(Colt(rate=0.5).cycles(conv(), [task, task], density, steps=10))
    theirs = conv()
    recipe = Recipe(name="IMP", when="train", allocator="global")
    for index in recipe.iterate(theirs, task, Budget(target=density), count=rounds, steps=10):
        if index == rounds:
            break
    assert len(kept) == rounds
    expected = masks.read(theirs)
    assert all(torch.equal(kept[-1][name], expected[name]) for name in expected)


def test_a_cycle_is_the_intersection_of_torchs_masks():
    task, model = toy_task(), conv()
    parts = task.parts(2, by="class", seed=0)
    first = next(Colt(rate=0.3).cycles(copy.deepcopy(model), parts, 0.1, steps=15))
    theirs = []
    for part in parts:
        twin = copy.deepcopy(model)
        part.train(twin, steps=15)
        places = [(layer, "weight") for layer in twin if hasattr(layer, "weight")]
        prune.global_unstructured(places, pruning_method=prune.L1Unstructured, amount=0.3)
        theirs.append([layer.weight_mask.bool() for layer, _ in places])
    for name, one, two in zip(first, *theirs, strict=True):
        assert torch.equal(first[name], one & two)


def test_survivors_are_at_their_first_values_and_the_density_is_met_to_the_weight():
    model, task = net(), toy_task()
    start = {name: value.clone() for name, value in model.named_parameters()}
    total = sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
    for kept in Colt(rate=0.25).cycles(model, task.parts(2, by="chance", seed=0), 0.2, steps=10):
        for name, mask in kept.items():
            assert torch.equal(model.get_parameter(name)[mask], start[name][mask])
    assert sum(int(mask.sum()) for mask in kept.values()) == round(0.2 * total)


def test_fewer_cycles_than_where_the_copies_agree():
    method = Colt(rate=0.2)
    found = list(method.cycles(net(), toy_task().parts(2, by="class", seed=0), 0.1, steps=30))
    assert len(found) < method.most_cycles(net(), 0.1)


def test_every_step_is_counted():
    seen = []

    class Counting(type(toy_task())):
        def train(self, model, *, steps, part=0, after_step=None):
            seen.append(steps)
            super().train(model, steps=steps, part=part, after_step=after_step)

        def parts(self, count, *, by, seed):
            return [Counting(one.inputs, one.targets) for one in super().parts(count, by=by, seed=seed)]

    task = toy_task()
    Colt().fit(net(), Counting(task.inputs, task.targets), Budget(target=0.3, steps=101), seed=0)
    assert sum(seen) == 101


def test_intersection_keeps_what_all_keep():
    one, two = {"w": torch.tensor([True, True, False])}, {"w": torch.tensor([False, True, True])}
    assert intersection([one, two])["w"].tolist() == [False, True, False]


def test_bad_arguments():
    with pytest.raises(UsageError, match="parts"):
        Colt(parts=1)
    with pytest.raises(BadBudget, match="every copy"):
        Colt().fit(net(), toy_task(), Budget(target=0.1, steps=5), seed=0)
    with pytest.raises(UsageError, match="4 parts"):
        toy_task().parts(4, by="class", seed=0)
