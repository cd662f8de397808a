"""The parts of structured pruning against brute force."""

import copy
import itertools

import pytest
import torch
from torch import nn

from nervure._kit import BadBudget, BadData, Unsupported
from nervure.compress import structured
from nervure.compress.structured import ChannelRecipe
from nervure.core import forward, state
from nervure.core.channels import ChannelGraph, recipe
from nervure.core.cost import macs
from nervure.core.renorm import reestimate_
from nervure.spec import Budget
from nervure.testing import toy_task


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))


def conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


def test_group_scores_are_means_over_the_slices_written_out():
    model = conv()
    group = ChannelGraph.of(model, torch.randn(2, 8)).groups[0]
    worth = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    for channel in range(6):
        columns = slice(channel * 6, channel * 6 + 6)
        made = [
            worth["1.weight"][channel].flatten(),
            *(worth[n][channel : channel + 1] for n in ("1.bias", "2.weight")),
        ]
        made.append(worth["2.bias"][channel : channel + 1])
        every = torch.cat([*made, worth["5.weight"][:, columns].flatten()])
        assert float(structured.group_scores(group, worth)[channel]) == pytest.approx(float(every.mean()), rel=1e-6)
        own = structured.group_scores(group, worth, slices="producers")[channel]
        assert float(own) == pytest.approx(float(torch.cat(made).mean()), rel=1e-6)


def test_ranked_is_the_largest_choice_of_lowest_scores_that_fits():
    """All prefixes of the sorted scores are tried."""
    model, x = net(), torch.randn(1, 8)
    graph = ChannelGraph.of(model, x)
    found = [
        torch.rand(group.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for group in graph.groups
    ]
    limit = 0.55 * macs(model, x)
    chosen = structured.ranked(found, lambda keep: macs(graph.cut(model, keep), x) <= limit, least=0.0)
    everything = sorted((float(score), g, c) for g, one in enumerate(found) for c, score in enumerate(one))
    protected = {(g, int(one.argmax())) for g, one in enumerate(found)}
    order = [(g, c) for _, g, c in everything if (g, c) not in protected]
    for count in range(len(order) + 1):
        keep = {g: torch.ones(len(one), dtype=torch.bool) for g, one in enumerate(found)}
        for g, c in order[:count]:
            keep[g][c] = False
        if macs(graph.cut(model, keep), x) <= limit:
            break
    assert all(torch.equal(chosen[g], keep[g]) for g in keep)


def test_large_groups_keep_a_multiple_and_small_ones_do_not_care():
    found = [torch.rand(67), torch.rand(13), torch.rand(64)]
    for limit in (40, 70, 100, 130):
        chosen = structured.ranked(
            found, lambda keep, n=limit: sum(int(k.sum()) for k in keep.values()) <= n, multiple=8
        )
        kept = [int(flags.sum()) for flags in chosen.values()]
        assert kept[0] in (67, *range(8, 65, 8))
        assert kept[2] % 8 == 0
        assert sum(kept) <= limit
        for one, flags in zip(found, chosen.values(), strict=True):
            assert flags.all() or float(one[flags].min()) >= float(one[~flags].max())


def test_uniform_drops_the_same_share_everywhere():
    found = [torch.rand(20), torch.rand(10)]
    chosen = structured.uniform(found, lambda keep: sum(int(one.sum()) for one in keep.values()) <= 15)
    assert [int(one.sum()) for one in chosen.values()] == [10, 5]
    for one, flags in zip(found, chosen.values(), strict=True):
        assert float(one[flags].min()) >= float(one[~flags].max())


@pytest.mark.parametrize("metric", ["macs", "params", "bytes"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_target_is_met_in_every_unit_and_rounds(metric, rounds):
    model, task = conv(), toy_task()
    x = task.inputs[:1]
    small = ChannelRecipe(name="x", rounds=rounds).fit(model, task, Budget(target=0.6, metric=metric, steps=8), seed=0)
    assert structured.spent(small.model, x, metric) <= 0.6 * structured.spent(model, x, metric)
    assert len(small.rounds) == rounds
    assert small.rounds == sorted(small.rounds, reverse=True)


def test_kept_channels_of_several_rounds_are_those_of_the_original():
    model, task = net(), toy_task()
    small = ChannelRecipe(name="x", rounds=3, when="init").fit(model, task, Budget(target=0.4, metric="macs"), seed=0)
    again = small.graph.cut(model, small.keep)
    for one, two in zip(again.parameters(), small.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_network_without_channels_and_a_target_out_of_reach_are_refused():
    with pytest.raises(Unsupported, match="no channel can be cut"):
        ChannelRecipe(name="x").fit(nn.Linear(8, 3), toy_task(), Budget(target=0.5, metric="macs"), seed=0)
    with pytest.raises(BadBudget, match="at the smallest"):
        ChannelRecipe(name="x").fit(net(), toy_task(), Budget(target=0.001, metric="macs"), seed=0)
    with pytest.raises(BadBudget, match="macs, params, bytes or ms"):
        ChannelRecipe(name="x").fit(net(), toy_task(), Budget(target=0.5), seed=0)


def test_nan_scores_are_refused_and_the_model_stays():
    model = net()
    with torch.no_grad():
        model[0].weight[3, 2] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadData, match="contain NaN"):
        ChannelRecipe(name="x", when="post").fit(model, toy_task(), Budget(target=0.5, metric="macs"), seed=0)
    assert all(torch.equal(before[k].nan_to_num(), v.nan_to_num()) for k, v in model.state_dict().items())


def test_a_saved_network_of_several_inputs_comes_back(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.numbers, self.head = nn.Embedding(9, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, words, numbers):
            return self.head((self.words(words) * self.numbers(numbers)).relu())

    model, inputs = Two(), {"words": torch.randint(9, (3,)), "numbers": torch.randn(3, 4)}
    graph = ChannelGraph.of(model, inputs)
    keep = {group.id: torch.arange(group.size) % 2 == 0 for group in graph.groups}
    small = graph.cut(model, keep)
    slim = structured.Slim(small, keep, graph, recipe(model, small))
    again = state.load(slim.save(tmp_path / "m.safetensors"), model=Two())
    assert again.head.in_features == 3
    assert torch.equal(forward.outputs(again, inputs), forward.outputs(slim.model, inputs))


def test_running_statistics_are_averages_over_batches_written_out():
    norm = nn.BatchNorm1d(3, momentum=0.3)
    model = nn.Sequential(nn.Dropout(0.5), norm, nn.Linear(3, 1)).train()
    batches = [torch.randn(7, 3) * 2 + 1 for _ in range(4)]
    assert reestimate_(model, batches) == 1
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert norm.momentum == 0.3
    assert all(module.training for module in model.modules())
    assert reestimate_(nn.Linear(2, 2), []) == 0


def test_every_choice_of_a_small_network_equals_its_masked_one():
    model, x = net().double(), torch.randn(5, 8, dtype=torch.float64)
    graph = ChannelGraph.of(model, x)
    for channels in itertools.combinations(range(6), 2):
        keep = {1: list(channels), 0: [0, 3, 5]}
        torch.testing.assert_close(graph.cut(model, keep)(x), graph.mask(model, keep)(x), rtol=1e-12, atol=1e-12)
