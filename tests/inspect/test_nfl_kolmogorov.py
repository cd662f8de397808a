"""Online codes, phrases and expressions against closed forms and definitions written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadData, Unsupported, UsageError
from nervure.core import rng
from nervure.inspect import CodeLength, code_bits, emitted, expression_sizes, online_code, phrases


class Counting:
    """The predictor of Krichevsky and Trofimov: (n_c + 1/2) / (n + k/2)."""

    def __init__(self, classes):
        self.counts = torch.full((classes,), 0.5, dtype=torch.float64)

    def probabilities(self, inputs):
        return (self.counts / self.counts.sum()).expand(len(inputs), -1)

    def learn(self, inputs, targets):
        self.counts = 0.5 + torch.bincount(targets, minlength=len(self.counts)).double()


@pytest.mark.parametrize("classes", [2, 3])
def test_counting_has_the_closed_form_of_krichevsky_and_trofimov(classes):
    targets = torch.randint(classes, (200,), generator=torch.Generator().manual_seed(classes))
    found = code_bits(Counting(classes), (torch.zeros(200, 1), targets), ends=range(1, 201))
    counts = torch.bincount(targets, minlength=classes).tolist()
    # KT: Gamma(k/2) prod Gamma(n_c + 1/2) / (Gamma(1/2)^k Gamma(n + k/2)).
    log = math.lgamma(classes / 2) - classes * math.lgamma(0.5) - math.lgamma(200 + classes / 2)
    log += sum(math.lgamma(count + 0.5) for count in counts)
    assert float(found.sum()) == pytest.approx(-log / math.log(2), abs=1e-9)


def _definition(sequence):
    """Count phrases by looking for each copy at every earlier place."""
    count = place = 0
    while place < len(sequence):
        longest = 0
        for begin in range(place):
            size = 0
            while place + size < len(sequence) and sequence[begin + size] == sequence[place + size]:
                size += 1
            longest = max(longest, size)
        place, count = place + longest + 1, count + 1
    return count


def test_phrases():
    # Lempel and Ziv's own: 0 . 001 . 10 . 100 . 1000 . 101
    assert phrases([int(one) for one in "0001101001000101"]) == 6
    assert [phrases([]), phrases([1]), phrases([0] * 50), phrases([0, 1] * 25)] == [0, 1, 2, 3]
    for size in range(1, 11):
        for word in itertools.product((0, 1), repeat=size):
            assert phrases(word) == _definition(word)
    draw = torch.Generator().manual_seed(0)
    for letters in (2, 3, 20):
        word = torch.randint(letters, (150,), generator=draw).tolist()
        assert phrases(word) == _definition(word)


def _trees(size):
    if size == 1:
        yield from ("i", "1", "2")
    for left in range(1, size - 1):
        for one, two in itertools.product(_trees(left), _trees(size - 1 - left)):
            yield from (f"({one} + {two})", f"({one} * {two})", f"({one} % {two})")


def test_expressions_are_the_smallest_of_all_trees():
    expected = {}
    for size in (1, 3, 5):
        for tree in _trees(size):
            try:
                values = tuple(eval(tree, {}, {"i": i}) for i in range(5))
            except ZeroDivisionError:
                continue
            expected.setdefault(values, size)
    assert expression_sizes(length=5, constants=(1, 2)) == expected
    assert expected[0, 1, 0, 1, 0] == 3


def _mlp(width, classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, classes))


def test_real_structure_is_compressed_and_chance_is_not():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=draw)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    model = _mlp(4, 4)
    real = online_code(model, (x, y))
    chance = online_code(model, (x, y[torch.randperm(300, generator=draw)]))
    assert real.verdict == "ok" != chance.verdict
    assert real.ratio < 0.6 < 0.98 < chance.ratio
    assert CodeLength(torch.full((50,), 1.5), 1.0, (50,)).verdict == "warn"
    assert online_code(model, (x[:10], y[:10])).verdict == "cannot tell"
    # What stands in a block does not help to code it: the first is that of the untrained network.
    bits = real.bits[: real.ends[0]]
    assert float(bits.mean()) > 0.8 * real.uniform


def test_the_code_can_be_undone():
    """The receiver, who knows only the labels before a block, predicts what the sender did: later labels do nothing."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=draw), torch.randint(3, (60,), generator=draw)
    first = online_code(_mlp(4, 3), (x, y), epochs=3)
    cut = first.ends[3]
    last = torch.zeros(60, dtype=torch.bool)
    last[torch.randperm(60, generator=rng.generator("online code", 0))[cut:]] = True
    second = online_code(_mlp(4, 3), (x, torch.where(last, 0, y)), epochs=3)
    assert torch.equal(first.bits[:cut], second.bits[:cut])
    assert not torch.equal(first.bits[cut:], second.bits[cut:])


def test_blocks_cover_all_and_numbers_are_checked():
    model, x, y = _mlp(4, 3), torch.randn(20, 4), torch.zeros(20, dtype=torch.long)
    found = online_code(model, (x, y), epochs=1, start=3, growth=1.01)
    assert (found.ends, len(found.bits)) == (tuple(range(3, 21)), 20)
    for options in ({"growth": 1.0}, {"start": 1}, {"floor": 0.0}, {"epochs": 0}):
        with pytest.raises(UsageError, match="out of range"):
            online_code(model, (x, y), **options)
    for targets in (y.float(), y + 3, y[:, None]):
        with pytest.raises(BadData, match="no classes"):
            online_code(model, (x, targets))
    with pytest.raises(UsageError, match="do not cover"):
        code_bits(Counting(3), (x, y), ends=[5, 10])


def test_strings_follow_the_model():
    class Alternating(nn.Module):
        def forward(self, tokens):
            return 50.0 * nn.functional.one_hot(1 - tokens, 2).float()

    found = emitted(Alternating(), length=12, strings=40)
    assert torch.equal(found[:, 1:], 1 - found[:, :-1])
    assert 0.2 < float(found[:, 0].double().mean()) < 0.8

    class Biased(nn.Module):
        def forward(self, tokens):
            return torch.tensor([0.3, 0.7]).log().expand(*tokens.shape, 2)

    assert float(emitted(Biased(), length=50, strings=200)[:, 1:].double().mean()) == pytest.approx(0.7, abs=0.02)
    model = zoo.case("tied-lm").model(vocabulary=2, length=20)
    assert torch.equal(emitted(model, length=20, seed=1), emitted(model, length=20, seed=1))
    with pytest.raises(Unsupported, match="no scores of a next token"):
        emitted(nn.Sequential(nn.Embedding(2, 3), nn.Flatten()), length=4)
