"""The words against SplitMix64's published ones and Python's integers, the numbers against their distribution."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from nervure._kit import UsageError
from nervure.core import noise
from nervure.core.noise import Stream


def _by_hand(seed, count):
    """SplitMix64 with Python's integers."""
    words = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = seed
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        words.append(z ^ (z >> 31))
    return words


def _drawn(seed, count):
    pieces = [words for _, _, words in noise.chunks(seed, count, torch.device("cpu"))]
    return [int(word) % 2**64 for word in torch.cat(pieces)]


def test_known_answers():
    # The reference output of the C program of S. Vigna for the seed 1234567, as given by Rosetta Code.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert _by_hand(1234567, 5) == known
    assert _drawn(1234567, 5) == known


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63), 2**64 - 1])
def test_words_equal_integers_across_chunks(seed, monkeypatch):
    monkeypatch.setattr(noise, "CHUNK", 7)
    assert _drawn(noise.signed(seed), 40) == _by_hand(seed % 2**64, 40)


def test_normals_equal_the_formula_in_double_precision():
    words = torch.tensor([noise.signed(word) for word in _by_hand(5, 5000)])
    low = np.array([int(word) % 2**32 for word in words], dtype=np.uint32).view(np.int32).astype(float)
    radius = np.sqrt(-2 * np.log((np.abs(low) + 0.5) / 2**31).clip(max=0))
    angle = words.double().numpy() * math.pi / 2**63
    one, two = (part.double().numpy() for part in noise.normal_pairs(words))
    # A small radius sqrt(2 (1 - u)) has the error 2^-25 of u in single precision divided by itself.
    bound = 2e-6 + 2**-24 / radius.clip(min=1e-9)
    assert bool((abs(one - radius * np.cos(angle)) < bound).all())
    assert bool((abs(two - radius * np.sin(angle)) < bound).all())


def test_extreme_words_are_finite():
    words = torch.tensor([0, -1, 1, -(2**63), 2**63 - 1, -(2**31), 2**31 - 1, 2**31])
    one, two = noise.normal_pairs(words)
    assert bool(torch.isfinite(one).all())
    assert bool(torch.isfinite(two).all())
    assert float((one**2 + two**2).sqrt().max()) < 6.7


def test_distribution():
    n = 1 << 20
    x = Stream(11).normal_(torch.empty(n)).double().numpy()
    first, second = x[: n // 2], x[n // 2 :]
    for part in (x, first, second):
        assert stats.kstest(part, "norm").pvalue > 1e-3
    # The moments of n numbers lie within four of their own standard errors.
    for power, exact, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - exact) < 4 * math.sqrt(spread / n)
    tail = float((np.abs(x) > 4).mean())
    assert tail == pytest.approx(2 * stats.norm.sf(4), rel=0.5)


def test_no_correlation_between_pairs_neighbours_and_streams():
    n = 1 << 18
    x = Stream(1).normal_(torch.empty(2 * n)).double()
    other = Stream(2).normal_(torch.empty(2 * n)).double()
    first, second = x[:n], x[n:]
    pairs = [(first, second), (first**2, second**2), (x, other)]
    pairs += [(first[lag:], first[:-lag]) for lag in (1, 2, 16, 1 << 15)]
    for one, two in pairs:
        assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 4.5 / math.sqrt(len(one))


def test_high_and_low_bits_are_even():
    bits = torch.cat([words for _, _, words in noise.chunks(3, 1 << 16, torch.device("cpu"))])
    for place in range(64):
        share = float(((bits >> place) & 1).double().mean())
        assert abs(share - 0.5) < 4.5 * 0.5 / 2**8


def test_a_stream_goes_on_from_its_state():
    stream = Stream(4)
    stream.normal_(torch.empty(5))
    saved = stream.state_dict()
    assert saved == {"seed": 4, "position": 3}
    rest = stream.normal_(torch.empty(3, 3, dtype=torch.float64))
    again = Stream(0)
    again.load_state_dict(saved)
    assert torch.equal(again.normal_(torch.empty(3, 3, dtype=torch.float64)), rest)
    assert stream.normal_(torch.empty(0)).numel() == 0


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    Stream(1).normal_(torch.empty(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_refusals():
    with pytest.raises(UsageError, match="contiguous"):
        Stream(1).normal_(torch.empty(4, 4).T[1:])
    with pytest.raises(UsageError, match="real"):
        Stream(1).normal_(torch.empty(4, dtype=torch.int64))
