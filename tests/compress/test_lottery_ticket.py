import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from nervure import zoo
from nervure._kit import BadBudget, NoEffect, Unsupported
from nervure.compress import LearningRateRewinding, LotteryTicket
from nervure.compress.lottery_ticket import flip_signs, shuffle
from nervure.compress.recipe import Recipe, snapshot
from nervure.core import allocate, masks, modules
from nervure.spec import Budget
from nervure.testing import ToyTask, toy_task


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))


def no_training():
    return Budget(target=0.3, steps=0)


def test_layerwise_masks_equal_torch_prune_applied_n_times():
    model, rounds, rate = net(), 4, 0.25
    peer = copy.deepcopy(model)
    for _ in range(rounds):
        for index in (0, 2, 4):
            prune.l1_unstructured(peer[index], "weight", amount=rate / 2 if index == 4 else rate)
    target = allocate.density_after(model, rate=rate, rounds=rounds)
    recipe = Recipe(name="LTH", when="train", allocator="layerwise")
    for _ in recipe.iterate(model, toy_task(), Budget(target=target), count=rounds, steps=0):
        pass
    for index in (0, 2, 4):
        mine = masks.read(model)[f"{index}.weight"]
        other = peer[index].weight_mask.bool()
        # Rounding n times and rounding the n-th power may differ by a weight; the order of dropping may not.
        assert abs(int(mine.sum()) - int(other.sum())) <= rounds
        assert bool((mine <= other).all()) or bool((mine >= other).all())


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_global_masks_equal_torch_prune_entry_for_entry(keep):
    model = zoo.case("lenet").model()
    weights = modules.weights(model)
    whole = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    mine = allocate.globally({n: w.abs() for n, w in weights.items()}, whole, density=keep)
    peer = copy.deepcopy(model)
    places = [(peer.get_submodule(name.rpartition(".")[0]), "weight") for name in weights]
    total = sum(weight.numel() for weight in weights.values())
    dropped = total - round(keep * total)
    prune.global_unstructured(places, pruning_method=prune.L1Unstructured, amount=dropped)
    for name, (module, _) in zip(weights, places, strict=True):
        assert torch.equal(mine[name], module.weight_mask.bool())


def test_ties_fall_as_in_torch_prune():
    layer = nn.Linear(10, 10, bias=False)
    layer.weight.data = torch.randint(-2, 3, (10, 10)).float()
    mine = allocate.drop_smallest(layer.weight.abs(), torch.ones(10, 10, dtype=torch.bool), 37)
    prune.l1_unstructured(layer, "weight", amount=37)
    assert torch.equal(mine, layer.weight_mask.bool())


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_density_is_the_power_of_the_rate_within_a_weight_a_layer(rate):
    model, rounds = net(), 3
    recipe = Recipe(name="LTH", when="train", rate=rate)
    target = allocate.density_after(model, rate=rate, rounds=rounds)
    for index in recipe.iterate(model, toy_task(), Budget(target=target), count=rounds, steps=0):
        for name, mask in masks.read(model).items():
            share = (1 - (rate / 2 if name == "4.weight" else rate)) ** index
            assert abs(int(mask.sum()) - share * mask.numel()) <= 1


def test_rewinding_puts_survivors_back_bit_for_bit():
    model = net()
    start = snapshot(model)
    recipe = Recipe(name="LTH", when="train", rate=0.5)
    seen = []

    class Watch(ToyTask):
        def train(self, model, *, steps, part=0, after_step=None):
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
            super().train(model, steps=steps, part=part, after_step=after_step)

    task = Watch(toy_task().inputs, toy_task().targets)
    recipe.fit(model, task, Budget(target=0.25, steps=30), seed=0)
    assert len(seen) == 3
    for began in seen[1:]:
        for name, value in began.items():
            alive = value != 0
            assert torch.equal(value[alive], start[name][alive])


def test_rewinding_to_a_later_step_restores_that_step():
    model = net()
    task, kept = toy_task(), {}
    twin = copy.deepcopy(model)
    task.train(twin, steps=10, after_step=lambda step: kept.update(snapshot(twin)) if step == 4 else None)
    recipe = Recipe(name="LTH", when="train", rate=0.5, rewind=4)
    began = []
    for index in recipe.iterate(model, task, Budget(target=0.5), count=1, steps=10):
        began.append(index)
        if index == 0:
            trained = snapshot(model)
    late = Recipe(name="LTH", when="train", rewind=4)
    assert late._train_with_snapshot(net(), task, 10).keys() == kept.keys()
    for name, value in late._train_with_snapshot(net(), task, 10).items():
        assert torch.equal(value, kept[name])
    assert not torch.equal(trained["0.weight"], kept["0.weight"])
    with pytest.raises(BadBudget, match="rewinds to step 4"):
        late._train_with_snapshot(net(), task, 3)


def test_learning_rate_rewinding_goes_on_from_the_learnt_weights():
    began = []

    class Watch(ToyTask):
        def train(self, model, *, steps, part=0, after_step=None):
            began.append(snapshot(model))
            super().train(model, steps=steps, part=part, after_step=after_step)
            began.append(snapshot(model))

    task = Watch(toy_task().inputs, toy_task().targets)
    LearningRateRewinding(rate=0.5).fit(net(), task, Budget(target=0.5, steps=20), seed=0)
    learnt, goes_on = began[1]["0.weight"], began[2]["0.weight"]
    alive = goes_on != 0
    assert torch.equal(learnt[alive], goes_on[alive])


def test_the_total_of_steps_is_spent_whatever_the_rounds():
    from nervure.core import Meter

    for method in (LotteryTicket(rate=0.5), LearningRateRewinding(rate=0.3), LotteryTicket(rate=0.2)):
        with Meter(track_saved=False) as meter:
            method.fit(net(), toy_task(), Budget(target=0.1, steps=41), seed=0)
        assert meter.steps == 41


def test_controls_are_what_they_say():
    model = net()
    result = LotteryTicket(rate=0.5).fit(model, toy_task(), Budget(target=0.25, steps=9), seed=0)
    draw = torch.Generator().manual_seed(0)
    mixed = shuffle(result.masks, generator=draw)
    assert all(int(mixed[n].sum()) == int(m.sum()) for n, m in result.masks.items())
    assert any(not torch.equal(mixed[n], m) for n, m in result.masks.items())
    start = snapshot(model)
    flipped = flip_signs(start, result.masks, generator=draw)
    for name in result.masks:
        assert torch.equal(flipped[name].abs(), start[name].abs())
        share = float((flipped[name] != start[name]).double().mean())
        assert 0.3 < share < 0.7
    assert torch.equal(flipped["0.bias"], start["0.bias"])


def test_wrong_budgets_and_models_are_refused():
    with pytest.raises(BadBudget, match="trains 8 times"):
        LotteryTicket(rate=0.35).fit(net(), toy_task(), Budget(target=0.05, steps=5), seed=0)
    with pytest.raises(BadBudget, match="a density"):
        LotteryTicket().fit(net(), toy_task(), Budget(target=0.5, metric="macs"), seed=0)
    with pytest.raises(Unsupported, match="no trainable weight"):
        LotteryTicket().fit(nn.LayerNorm(8), toy_task(), Budget(target=0.5), seed=0)
    with pytest.raises(NoEffect):
        LotteryTicket().fit(net(), toy_task(), Budget(target=1.0), seed=0)
    with pytest.raises(BadBudget, match="not a share"):
        Budget(target=0.0)
