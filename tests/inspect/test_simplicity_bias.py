"""Reliance on models whose features are known, on shuffles written out, and on every kind of input."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from nervure import zoo
from nervure._kit import BadData, UsageError
from nervure.core import forward
from nervure.core.feature_groups import Estimate, cycle
from nervure.data.shortcuts import slabs
from nervure.inspect import reliance
from nervure.inspect._simplicity_trial import Mean
from nervure.inspect.simplicity_bias import Part, Reliance, Scored


class Uses(nn.Module):
    """Tell the class of LMS points by chosen coordinates: the linear one by its sign, slabs by their ring."""

    def __init__(self, *columns):
        super().__init__()
        self.columns = columns
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        odds = 0.0
        for column in self.columns:
            ring = torch.bucketize(x[:, column].abs(), torch.tensor([0.22, 0.66])) % 2
            odds = odds + (torch.sign(x[:, column]) if column == 0 else 2.0 * ring - 1)
        return odds * self.scale


DATA = slabs(10, test=1500, coordinates=(1, 5, 5), seed=1)


def test_the_groups_a_known_model_uses():
    batch = (DATA.test_x, DATA.test_y)
    first = reliance(Uses(0), batch)
    assert first.intact.auc.value == 1
    assert first.hangs_on == ("column 0",)
    assert first.verdict == "warn"
    part = first.groups["column 0"]
    assert part.without.auc.value == pytest.approx(0.5, abs=0.04)
    assert part.alone.auc.value == part.alone.accuracy.value == 1
    assert part.without.change.value == pytest.approx(1, abs=0.06)
    assert part.alone.change.value == 0
    slab = reliance(Uses(2), batch)
    assert slab.hangs_on == ("column 2",)
    assert slab.groups["column 1"].without.auc.value == 1
    all_three = reliance(Uses(0, 1, 2), batch)
    assert all_three.hangs_on == ()
    assert all_three.verdict == "ok"
    # Two of three right votes decide, the third vote is by chance: an AUC of 1 without it, and of 3/4 by it alone.
    for part in all_three.groups.values():
        assert part.without.auc.value == 1
        assert part.alone.auc.value == pytest.approx(0.75 + 0.25 * 0.5 * 0.5, abs=0.1)


def test_copies_hide_a_reliance_one_column_at_a_time_and_not_as_a_group():
    x = torch.cat([DATA.test_x, DATA.test_x[:, :1] * 2], 1)
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 0, 0.5]]))
        model.bias.zero_()
    alone = reliance(model, (x, DATA.test_y), groups={"column 0": [0], "column 3": [3]})
    assert alone.hangs_on == ()
    grouped = reliance(model, (x, DATA.test_y))
    assert grouped.hangs_on == ("columns 0, 3",)


def test_against_a_loop_over_samples():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 1, 6, 6, generator=draw), torch.randint(3, (80,), generator=draw)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))
    found = reliance(model, (x, y), groups={"corner": (0, slice(0, 2), slice(0, 3))}, seed=5).groups["corner"]
    order = cycle(80, seed=5)
    for part, inside in ((found.without, True), (found.alone, False)):
        changed = x.clone()
        for n in range(80):
            for row in range(6):
                for column in range(6):
                    if (row < 2 and column < 3) == inside:
                        changed[n, 0, row, column] = x[order[n], 0, row, column]
        scores = forward.predict(model, changed)
        assert part.accuracy.value == pytest.approx(float((scores.argmax(1) == y).double().mean()))
        truth = roc_auc_score(y, scores.double().softmax(1), multi_class="ovr")
        assert part.auc.value == pytest.approx(truth, abs=1e-9)


def test_a_rotated_problem_is_read_through_the_rotation():
    one = torch.tensor([[1.0, 1], [1, -1]])
    turn = torch.kron(one, one) / 2  # every turned column holds a quarter of the linear one's square
    turned = slabs(10, test=1500, coordinates=(1, 5, 5, 5), seed=1, rotation=turn)
    back = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        back.weight.copy_(turn)
    whole = nn.Sequential(back, Uses(0))
    assert reliance(whole, (turned.test_x, turned.test_y)).hangs_on == ()
    assert reliance(Uses(0), (turned.test_x @ turn.T, turned.test_y)).hangs_on == ("column 0",)


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_model_has_default_groups(name):
    case = zoo.case(name)
    model, (inputs, targets) = case.model(seed=0), case.batch(8, seed=0)
    found = reliance(model, (inputs, targets), resamples=5)
    assert len(found.groups) >= 2
    everything = {"all": {str(key): ... for key in inputs} if isinstance(inputs, dict) else
                  dict.fromkeys(range(len(inputs)), ...) if isinstance(inputs, tuple | list) else ...}  # fmt: skip
    whole = reliance(model, (inputs, targets), groups=everything, resamples=5).groups["all"]
    assert whole.everything
    assert whole.alone.change.value == 0
    assert whole.alone.accuracy == found.intact.accuracy
    assert whole.without.change.value > 0


def _report(intact, *parts):
    def scored(low, value, high):
        zero = Estimate(0.0, 0.0, 0.0)
        return Scored(zero, Estimate(value, low, high), zero)

    groups = {str(n): Part(scored(*one), scored(*two)) for n, (one, two) in enumerate(parts)}
    return Reliance(scored(*intact), groups)


def test_verdicts():
    sure = (0.98, 0.99, 1.0)
    assert _report(sure, ((0.45, 0.5, 0.55), (0.95, 0.97, 0.99))).verdict == "warn"
    assert _report(sure, ((0.9, 0.95, 0.97), (0.95, 0.97, 0.99))).verdict == "ok"
    assert _report(sure, ((0.45, 0.5, 0.55), (0.5, 0.6, 0.7))).verdict == "ok"
    assert _report(sure, ((0.45, 0.6, 0.75), (0.8, 0.9, 0.99))).verdict == "cannot tell"
    assert _report((0.4, 0.7, 0.9), ((0.45, 0.5, 0.55), (0.95, 0.97, 0.99))).verdict == "cannot tell"


def test_what_cannot_be_read():
    with pytest.raises(BadData, match="cannot be scored"):
        reliance(nn.Linear(3, 2), (torch.randn(6, 3), torch.zeros(6, dtype=torch.long)))
    with pytest.raises(UsageError, match="empty"):
        reliance(nn.Linear(3, 2), (torch.randn(6, 3), torch.arange(6) % 2), groups={"none": []})


def test_the_mean_of_networks():
    nets = [nn.Linear(3, 2) for _ in range(2)]
    x = torch.randn(4, 3)
    assert torch.allclose(Mean(nets)(x), (nets[0](x) + nets[1](x)) / 2)
