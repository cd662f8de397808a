"""Groups against orthogonality, brute force, published character tables, numpy.fft and itertools."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nervure._kit import BadData, UsageError
from nervure.core.group_tables import (
    Group,
    alternating,
    cyclic,
    dihedral,
    group_of,
    operation_table,
    permutations,
    symmetric,
    why_no_group,
)

UNITS = [(sign, unit) for unit in "1ijk" for sign in (1, -1)]
SIGNS = {"ij": "k", "jk": "i", "ki": "j"}


def quaternion_product(x, y):
    (s, u), (t, v) = UNITS[x], UNITS[y]
    if "1" in (u, v):
        sign, unit = 1, u if v == "1" else v
    elif u == v:
        sign, unit = -1, "1"
    else:
        sign, unit = (1, SIGNS[u + v]) if u + v in SIGNS else (-1, SIGNS[v + u])
    return UNITS.index((s * t * sign, unit))


GROUPS = {
    "C1": cyclic(1),
    "C6": cyclic(6),
    "C7": cyclic(7),
    "D1": dihedral(1),
    "D4": dihedral(4),
    "D5": dihedral(5),
    "S2": symmetric(2),
    "S3": symmetric(3),
    "S4": symmetric(4),
    "A4": alternating(4),
    "A5": alternating(5),
    "Q8": group_of(quaternion_product, 8, "Q8"),
    "F20": permutations([[1, 2, 3, 4, 0], [0, 2, 4, 1, 3]], "F20"),
}
EVERY = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)


def classes_by_hand(group):
    table, inverse = group.table.tolist(), group.inverse.tolist()
    return {frozenset(table[table[g][x]][inverse[g]] for g in range(len(group))) for x in range(len(group))}


@EVERY
def test_classes_are_orbits_of_conjugation(group):
    found = {frozenset((group.class_of == label).nonzero()[:, 0].tolist()) for label in range(len(group.class_sizes))}
    assert found == classes_by_hand(group)


@EVERY
def test_characters_are_orthogonal_in_rows_and_columns(group):
    chi, sizes, n = group.characters, group.class_sizes.double(), len(group)
    eye = torch.eye(len(sizes), dtype=chi.dtype)
    assert float(((chi * sizes) @ chi.mH / n - eye).abs().max()) < 1e-10
    assert float((chi.mH @ chi * sizes / n - eye).abs().max()) < 1e-10
    degrees = chi[:, group.class_of[group.identity]].real
    assert float(degrees.square().sum()) == pytest.approx(n)
    assert all(n % round(float(degree)) == 0 for degree in degrees)


@EVERY
def test_real_irreps_are_homomorphisms_and_orthogonal_to_each_other(group):
    n, rows = len(group), []
    for index, irrep in enumerate(group.irreps):
        rho = group.matrices(index)
        assert rho.shape == (n, irrep.dimension, irrep.dimension)
        assert float((rho[:, None] @ rho[None] - rho[group.table]).abs().max()) < 1e-10
        assert float((rho.mT @ rho - torch.eye(irrep.dimension, dtype=rho.dtype)).abs().max()) < 1e-10
        rows.append(rho.flatten(1))
        commutant = {"real": 1, "complex": 2, "quaternionic": 4}[irrep.kind]
        # Schur: the mean of chi^2 is the dimension of the commuting algebra, so it is irreducible over the reals.
        assert float(irrep.character.square().mean()) == pytest.approx(commutant)
        assert commutant * irrep.multiplicity == irrep.dimension
    assert sum(irrep.multiplicity * irrep.dimension for irrep in group.irreps) == n
    for one, other in itertools.combinations(rows, 2):
        assert float((one.T @ other).abs().max()) < 1e-9


@EVERY
def test_projectors_are_orthogonal_and_commute_with_the_group(group):
    P = group.projectors
    for i, j in itertools.product(range(len(P)), repeat=2):
        assert float((P[i] @ P[j] - (P[i] if i == j else 0 * P[i])).abs().max()) < 1e-10
    for index, irrep in enumerate(group.irreps):
        assert float(P[index].trace()) == pytest.approx(irrep.multiplicity * irrep.dimension)
        for g in range(len(group)):
            moved = P[index][group.table[g]][:, group.table[g]]
            assert float((moved - P[index]).abs().max()) < 1e-10


def test_published_tables():
    s4 = symmetric(4)
    # Cycle types of one fixed order: e, (12), (12)(34), (123), (1234).
    elements = [(0, 1, 2, 3), (1, 0, 2, 3), (1, 0, 3, 2), (1, 2, 0, 3), (1, 2, 3, 0)]
    places = [sorted(itertools.permutations(range(4))).index(each) for each in elements]
    rows = {tuple(round(float(irrep.character[place])) for place in places) for irrep in s4.irreps}
    assert rows == {(1, 1, 1, 1, 1), (1, -1, 1, 1, -1), (2, 0, 2, -1, 0), (3, 1, -1, 0, -1), (3, -1, -1, 0, 1)}
    golden = (1 + math.sqrt(5)) / 2
    a5 = alternating(5).characters
    assert sorted({round(float(x), 9) for x in a5[1].real} | {round(float(x), 9) for x in a5[2].real}) == sorted(
        round(x, 9) for x in (3, -1, 0, golden, 1 - golden)
    )
    assert [(i.dimension, i.kind) for i in GROUPS["Q8"].irreps] == [(1, "real")] * 4 + [(4, "quaternionic")]
    assert [(i.dimension, i.kind) for i in GROUPS["A4"].irreps] == [(1, "real"), (2, "complex"), (3, "real")]


@pytest.mark.parametrize("n", [5, 8])
def test_cyclic_power_is_the_fourier_spectrum(n):
    values = torch.randn(n, 3, dtype=torch.float64)
    energy = np.abs(np.fft.rfft(values.numpy(), axis=0)) ** 2
    energy[1 : (n + 1) // 2] *= 2
    shares = energy / energy.sum(0)
    # One-dimensional irreps come first: frequency 0, then n / 2 for even n.
    order = [0, n // 2, *range(1, n // 2)] if n % 2 == 0 else range(n // 2 + 1)
    np.testing.assert_allclose(cyclic(n).power(values).numpy(), shares[list(order)], atol=1e-12)


def test_permutations_multiply_as_functions():
    elements = sorted(itertools.permutations(range(4)))
    table = symmetric(4).table
    for p, q in itertools.product(range(0, 24, 5), range(24)):
        product = tuple(elements[p][elements[q][i]] for i in range(4))
        assert elements[int(table[p, q])] == product
    assert len(alternating(5)) == 60
    assert len(symmetric(5)) == 120
    assert len(GROUPS["F20"]) == 20


def test_dihedral_multiplies_as_matrices():
    n = 5

    def matrix(g):
        angle, flip = 2 * math.pi * (g % n) / n, np.diag([1, -1 if g >= n else 1])
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ flip

    table = dihedral(n).table
    for a, b in itertools.product(range(2 * n), repeat=2):
        np.testing.assert_allclose(matrix(a) @ matrix(b), matrix(int(table[a, b])), atol=1e-12)


@given(st.text("abAB", min_size=1, max_size=6), st.sampled_from(["S3", "D4", "Q8", "C6"]))
@settings(max_examples=30, deadline=None)
def test_words_by_hand(letters, name):
    group = GROUPS[name]
    found = group.word(letters)
    for a, b in itertools.product(range(len(group)), repeat=2):
        value = group.identity
        for letter in letters:
            element = a if letter in "aA" else b
            value = int(group.table[value, int(group.inverse[element]) if letter.isupper() else element])
        assert int(found[a, b]) == value


def associative(table):
    n, t = len(table), table.tolist()
    return all(t[t[a][b]][c] == t[a][t[b][c]] for a, b, c in itertools.product(range(n), repeat=3))


@given(st.lists(st.integers(0, 3), min_size=16, max_size=16))
@settings(max_examples=50, deadline=None)
def test_the_test_for_groups_agrees_with_the_axioms(entries):
    table = torch.tensor(entries).view(4, 4)
    t = entries
    identities = [e for e in range(4) if all(t[4 * e + x] == x == t[4 * x + e] for x in range(4))]
    is_group = (
        bool(identities)
        and associative(table)
        and all(any(t[4 * x + y] == identities[0] == t[4 * y + x] for y in range(4)) for x in range(4))
    )
    assert (why_no_group(table) is None) == is_group


def test_tables_that_are_no_groups_are_refused_with_the_reason():
    # A loop of five elements: identity, a two-sided inverse for each, every row and column a permutation.
    loop = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1], [4, 3, 1, 2, 0]])
    assert not associative(loop)
    with pytest.raises(BadData, match="not associative"):
        Group(loop)
    with pytest.raises(BadData, match="no identity"):
        group_of(lambda a, b: (a - b) % 5, 5)
    with pytest.raises(BadData, match="no inverse"):
        group_of(lambda a, b: a * b % 4, 4)
    with pytest.raises(BadData, match="no square table"):
        Group(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(BadData, match="not one of the elements"):
        Group(torch.tensor([[0, 5], [1, 0]]))
    with pytest.raises(BadData, match="not one of the elements"):
        operation_table(lambda a, b: a + b, 3)
    with pytest.raises(BadData, match="no permutations"):
        permutations([[0, 0, 1]])
    with pytest.raises(UsageError, match="no such word"):
        symmetric(3).word("abc")
    with pytest.raises(UsageError, match="do not fit"):
        symmetric(3).power(torch.zeros(5, 2))
