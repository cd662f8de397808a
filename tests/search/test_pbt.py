"""PBT's decisions against a hand-written replay, its lineage, its drivers and its resume."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from nervure._kit import UsageError
from nervure.core.population import SGD, Population, order
from nervure.search._pbt_trial import _follow, conv
from nervure.search.drive import run_population, run_trainables
from nervure.search.pbt import PBT, _FromWorst, _WeightsAlone, toy
from nervure.search.space import Choice, Range, Shift
from nervure.spec import Searcher

SPACE = {"lr": Range(1e-3, 1.0, log=True), "width": Choice((8, 16, 32)), "noise": Shift(0.0, 1.0, limits=(0.0, 1.0))}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rounds(search, scores):
    """Tell a matrix of scores, (intervals, members); return the configurations asked for."""
    asked = []
    for row in scores:
        configs = [search.ask() for _ in row]
        for config, score in zip(configs, row, strict=True):
            search.tell(config, score)
        asked.append(configs)
    return asked


def replay(scores, *, members, share, resample, factors, seed):
    """The published rules for truncation, written out: sort, take the quantiles, copy, then resample or perturb."""
    draw = np.random.default_rng(seed)

    def fresh(name):
        if name == "lr":
            return math.exp(draw.uniform(math.log(1e-3), math.log(1.0)))
        if name == "width":
            return (8, 16, 32)[int(draw.integers(3))]
        return float(draw.uniform(0.0, 1.0))

    def change(name, value):
        if draw.random() < resample:
            return fresh(name)
        if name == "lr":
            return value * factors[int(draw.integers(2))]
        if name == "width":
            at = [8, 16, 32].index(value) + (1 if int(draw.integers(2)) == 1 else -1)
            return [8, 16, 32][max(0, min(2, at))]
        return min(1.0, max(0.0, value + 0.1 * draw.standard_normal()))

    configs = [{name: fresh(name) for name in SPACE} for _ in range(members)]
    parents, found = list(range(members)), []
    for row in scores:
        found.append([{**config, "member": i, "parent": parents[i]} for i, config in enumerate(configs)])
        ranked = sorted(range(members), key=lambda i: row[i])
        count = math.ceil(members * share)
        if count > members / 2:
            count = members // 2
        bottom, top = ranked[:count], ranked[-count:]
        old, parents = [dict(config) for config in configs], list(range(members))
        for i in range(members):
            if i in bottom:
                parents[i] = top[int(draw.integers(count))]
                configs[i] = {name: change(name, old[parents[i]][name]) for name in SPACE}
    return found


@pytest.mark.parametrize(
    ("members", "share", "resample"), [(10, 0.2, 0.25), (16, 0.2, 0.0), (5, 0.5, 0.5), (2, 0.2, 1.0)]
)
def test_truncation_equals_a_replay_by_hand(members, share, resample):
    scores = np.random.default_rng(3).normal(size=(30, members))
    search = PBT(SPACE, members=members, share=share, resample=resample, seed=11)
    expected = replay(scores, members=members, share=share, resample=resample, factors=(0.8, 1.2), seed=11)
    assert rounds(search, scores) == expected
    moved = sum(config["parent"] != config["member"] for row in expected for config in row)
    assert moved == 29 * min(math.ceil(members * share), members // 2)


def test_explore_multiplies_by_the_factors_alone():
    search = PBT({"lr": Range(0.1, 0.2)}, members=10, seed=0)
    asked = rounds(search, np.random.default_rng(0).normal(size=(12, 10)))
    ratios = []
    for then, now in itertools.pairwise(asked):
        for config in now:
            ratio = config["lr"] / then[int(config["parent"])]["lr"]
            assert (ratio == 1) == (config["parent"] == config["member"])
            ratios.append(round(ratio, 9))
    assert set(ratios) == {0.8, 1.0, 1.2}
    assert ratios.count(1.0) == 11 * 8


def test_binary_tournament_copies_the_winner_only():
    scores = np.random.default_rng(0).normal(size=(20, 6))
    asked = rounds(PBT(SPACE, members=6, exploit="binary", seed=1), scores)
    copied = 0
    for row, configs in zip(scores, asked[1:], strict=False):
        assert configs[int(np.argmax(row))]["parent"] == int(np.argmax(row))
        for config in configs:
            assert row[config["parent"]] >= row[config["member"]]
            copied += config["parent"] != config["member"]
    assert 0.3 < copied / (19 * 6) < 0.7  # a random opponent is better half of the time


def test_t_test_asks_for_significance():
    draw = np.random.default_rng(2)
    alike = rounds(PBT(SPACE, members=4, exploit="t-test", seed=1), draw.normal(size=(6, 4)))
    assert all(config["parent"] == config["member"] for row in alike[:3] for config in row)
    scores = draw.normal(size=(5, 2)) * 0.1 + [0.0, 3.0]
    asked = rounds(PBT(SPACE, members=2, exploit="t-test", seed=1), scores)
    for interval in range(1, 5):
        seen = scores[:interval]
        if interval > 1 and all(asked[k][0]["parent"] == 0 for k in range(interval)):
            significant = stats.ttest_ind(seen[:, 1], seen[:, 0], equal_var=False).pvalue < 0.05
            assert (asked[interval][0]["parent"] == 1) == significant
    assert any(row[0]["parent"] == 1 for row in asked)
    assert all(row[1]["parent"] == 1 for row in asked)


def test_t_test_of_scores_that_never_change():
    asked = rounds(PBT(SPACE, members=2, exploit="t-test", seed=1), [[0.0, 1.0]] * 3)
    assert [row[0]["parent"] for row in asked] == [0, 0, 1]
    asked = rounds(PBT(SPACE, members=2, exploit="t-test", seed=1), [[1.0, 1.0]] * 4)
    assert all(config["parent"] == config["member"] for row in asked for config in row)


def test_asynchronous_compares_with_the_scores_recorded_last():
    search = PBT({"lr": Range(0.1, 1.0)}, members=4, share=0.25, asynchronous=True, seed=0)
    first = [search.ask() for _ in range(4)]
    with pytest.raises(UsageError, match="idle"):
        search.ask()
    search.tell(first[2], 1.0)
    again = search.ask()  # member 2 goes on while the others still work
    assert (again["member"], again["parent"]) == (2, 2)
    search.tell(first[0], 0.0)
    assert search.ask()["parent"] == 2
    search.tell(again, -5.0)  # now the worst of the recorded ones
    assert search.ask() == {**search.configs[2], "member": 2, "parent": 0}


class Counter:
    """A trainable whose weights are the list of all it went through."""

    def __init__(self, name):
        self.path, self.name = [], name

    def step(self, config):
        self.path = [*self.path, dict(config)]

    def eval(self):
        return sum(config["lr"] for config in self.path)

    def state_dict(self):
        return self.path

    def load_state_dict(self, state):
        self.path = state


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("exploit", ["truncation", "binary", "none"])
def test_schedule_is_the_ancestry_of_the_weights(asynchronous, exploit):
    search = PBT(SPACE, members=5, exploit=exploit, asynchronous=asynchronous, share=0.4, seed=4)
    members = [Counter(index) for index in range(5)]
    run_trainables(search, members, intervals=12)
    for index, member in enumerate(members):
        assert search.schedule(index) == member.path
        assert search.scores[index] == pytest.approx(member.eval())
    assert search.schedule() == members[int(np.argmax(search.scores))].path
    if exploit != "none":
        assert any(
            node["from"] is not None and search.trained[node["from"]]["member"] != node["member"]
            for node in search.trained
        )


@pytest.mark.parametrize("exploit", ["truncation", "binary", "t-test"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_state_dict_resumes_exactly_through_json(exploit, asynchronous):
    scores = np.random.default_rng(8).normal(size=(10, 6)).tolist()
    make = lambda seed: PBT(SPACE, members=6, exploit=exploit, asynchronous=asynchronous, resample=0.3, seed=seed)  # noqa: E731
    whole, first, second = make(1), make(1), make(2)

    def drive(search, rows):
        asked = []
        for row in rows:
            for score in row:
                asked.append(search.ask() if asynchronous else None)
                if asynchronous:
                    search.tell(asked[-1], score)
            if not asynchronous:
                asked += rounds(search, [row])
        return asked

    expected = drive(whole, scores)
    start = drive(first, scores[:4])
    first.ask()  # an interval at work when the state is saved is asked for again
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [*start, *drive(second, scores[4:])] == expected
    assert second.schedule() == whole.schedule()
    with pytest.raises(UsageError, match="another search"):
        PBT(SPACE, members=3).load_state_dict(first.state_dict())


def network():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3)).double()


class Alone:
    """The same member trained by torch's own optimizer, for `run_trainables`."""

    def __init__(self, seed, data, validation):
        torch.manual_seed(seed)
        self.net, self.seed, self.data, self.validation, self.done = network(), seed, data, validation, 0
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.stream = torch.Generator().manual_seed(seed).get_state()

    def step(self, config):
        self.optimizer.param_groups[0].update(lr=config["lr"], momentum=config["momentum"])
        self.net[2].p = config["dropout"]
        x, y = self.data
        self.net.train()
        torch.set_rng_state(self.stream)
        for _ in range(5):
            epoch, at = divmod(self.done, len(x) // 8)
            index = order(self.seed, epoch, len(x))[at * 8 : at * 8 + 8]
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(x[index]), y[index]).backward()
            self.optimizer.step()
            self.done += 1
        self.stream = torch.get_rng_state()

    def eval(self):
        with torch.no_grad():
            return -F.cross_entropy(self.net.eval()(self.validation[0]), self.validation[1]).item()

    def state_dict(self):
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


@pytest.mark.parametrize("backend", ["batched", "sequential"])
def test_the_population_equals_separate_trainings(backend):
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(40, 6, generator=draw).double(), torch.randint(3, (40,), generator=draw)
    validation = torch.randn(30, 6, generator=draw).double(), torch.randint(3, (30,), generator=draw)
    space = {
        "lr": Range(0.01, 0.5, log=True),
        "momentum": Range(0.1, 0.9, limits=(0.0, 0.95)),
        "dropout": Range(0.05, 0.5, limits=(0.0, 0.9)),
    }
    seeds = [5, 6, 7, 8]
    with torch.random.fork_rng():
        members = [Alone(seed, data, validation) for seed in seeds]
        one, two = (PBT(space, members=4, share=0.5, seed=9) for _ in range(2))
        run_trainables(one, members, intervals=6)
    crowd = Population.build(network, seeds=seeds, optimizer=SGD(0.1), backend=backend)
    run_population(two, crowd, data, validation, intervals=6, ready=5, batch_size=8)
    assert [node["member"] for node in one.trained] == [node["member"] for node in two.trained]
    for mine, other in zip(two.trained, one.trained, strict=True):
        assert mine["config"] == other["config"]
        assert mine["from"] == other["from"]
        assert mine["score"] == pytest.approx(other["score"], abs=1e-9)


def test_a_score_that_is_not_a_number_is_the_worst():
    search = PBT({"lr": Range(0.1, 1.0)}, members=3, share=0.3, seed=0)
    asked = rounds(search, [[0.5, math.nan, 0.1], [0.0, 0.0, 0.0]])
    assert asked[1][1]["parent"] == 0
    assert search.trained[1]["score"] == min(node["score"] for node in search.trained)
    assert json.dumps(search.state_dict(), allow_nan=False)
    assert isinstance(search, Searcher)


def test_sabotage_copies_the_worst():
    search = _FromWorst({"lr": Range(0.1, 1.0)}, members=4, share=0.5, seed=0)
    asked = rounds(search, [[3.0, 1.0, 2.0, 0.0]] * 2)
    assert [config["parent"] for config in asked[1]] == [0, 3, 2, 3]


def test_toy_is_the_closed_form_where_nothing_is_drawn():
    values = {}
    ctx = SimpleNamespace(
        seed_for=lambda *tags: 3, measure=lambda arm, **metrics: values.__setitem__(arm, metrics["Q"])
    )
    toy.measure(ctx)
    assert values["grid"] == pytest.approx(1.2 - 0.81 - (0.9 * 0.98**200) ** 2, abs=1e-12)
    # Both copy the first winner's h too, and only one coordinate ever shrinks.
    assert values["exploit-only"] == pytest.approx(values["grid"], abs=1e-12)
    # With the weights alone the two take turns: each coordinate shrinks in half of the 200 steps.
    assert values["exploit-only, weights alone"] == pytest.approx(1.2 - 2 * (0.9 * 0.98**100) ** 2, abs=1e-12)
    assert max(values.values()) <= 1.2


def test_weights_alone_keeps_the_hyper_parameters():
    search = _WeightsAlone({"lr": Range(0.1, 1.0)}, members=4, share=0.5, explore=False, seed=0)
    asked = rounds(search, [[3.0, 1.0, 2.0, 0.0]] * 3)
    assert [config["parent"] for config in asked[1]] != [0, 1, 2, 3]
    for row in asked[1:]:
        assert [config["lr"] for config in row] == [config["lr"] for config in asked[0]]


def test_a_schedule_is_followed_interval_by_interval():
    crowd = Population([conv(), conv()], optimizer=SGD(momentum=0.9))
    x, y = torch.randn(8, 1, 14, 14), torch.randint(10, (8,))
    apply = _follow([{"lr": 0.5, "dropout": 0.2}, {"lr": 0.25, "dropout": 0.4}], ready=3)
    for expected in (0.5, 0.25):
        for member in (0, 1):
            apply(crowd, member, {"lr": 9.0})
        assert [crowd.optimizer.values(member)["lr"] for member in (0, 1)] == pytest.approx([expected] * 2)
        crowd.fit(x, y, steps=3, batch_size=4)


def test_priors():
    draw = np.random.default_rng(0)
    drawn = [Range(1e-4, 1.0, log=True).sample(draw) for _ in range(2000)]
    assert stats.kstest(np.log10(drawn), "uniform", args=(-4, 4)).pvalue > 1e-3
    assert Range(0.0, 0.9, limits=(0.0, 0.95)).perturb(0.9, draw, (1.2,)) == 0.95
    assert {Choice((1, 2, 3)).perturb(1, draw, ()) for _ in range(30)} == {1, 2}
    assert all(0 <= Shift(0.0, 1.0, limits=(0.0, 1.0), scale=3.0).perturb(0.5, draw, ()) <= 1 for _ in range(50))
    with pytest.raises(UsageError, match="empty"):
        Range(1.0, 1.0)
    with pytest.raises(UsageError, match="empty"):
        Range(0.0, 1.0, log=True)
    with pytest.raises(UsageError, match="values"):
        Choice(())


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="two members"):
        PBT(SPACE, members=1)
    with pytest.raises(UsageError, match="names member"):
        PBT({"parent": Range(0, 1)}, members=2)
    with pytest.raises(UsageError, match="outside its range"):
        PBT(SPACE, members=2, share=0.6)
    with pytest.raises(UsageError, match="full set"):
        PBT(SPACE, members=2, start=[{"lr": 1.0}] * 2)
    search = PBT(SPACE, members=2)
    with pytest.raises(UsageError, match="before the first score"):
        _ = search.best
    with pytest.raises(UsageError, match="not asked"):
        search.tell({"member": 0}, 1.0)
    with pytest.raises(UsageError, match="one trainable"):
        run_trainables(search, [Counter(0)], intervals=1)
    crowd = Population([nn.Linear(2, 2)], optimizer=SGD())
    with pytest.raises(UsageError, match="own size"):
        run_population(search, crowd, (0, torch.zeros(1)), (0, torch.zeros(1)), intervals=1, ready=1)
