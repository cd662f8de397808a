"""Words as tensors: true supports by projectors summed over the group, ranks that are known, networks by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from nervure._kit import BadData, UsageError
from nervure.core.group_tables import alternating, cyclic, dihedral, symmetric
from nervure.inspect._delayed import Product
from nervure.inspect.group_composition_reps import logit_table
from nervure.inspect.group_words import cp_error, fusion_cover, outside_share, random_share, triplet_energy

GROUPS = [cyclic(4), cyclic(5), symmetric(3), dihedral(4), dihedral(5), alternating(4)]
EVERY = pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)


def energy_by_hand(tensor, group):
    """Apply P = (m / n) sum_g chi(g^-1) L_g, with L_g moved by hand, to each leg."""
    n = len(group)
    parts = []
    for irrep in group.irreps:
        P = torch.zeros(n, n, dtype=torch.float64)
        for g in range(n):
            weight = irrep.multiplicity / n * irrep.character[int(group.inverse[g])]
            P[group.table[g], torch.arange(n)] += weight
        parts.append(P)
    found = torch.zeros(len(parts), len(parts), len(parts), dtype=torch.float64)
    for p, q, r in itertools.product(range(len(parts)), repeat=3):
        found[p, q, r] = torch.einsum("abc,ia,jb,kc->ijk", tensor, parts[p], parts[q], parts[r]).square().sum()
    return found


@EVERY
def test_energy_by_projectors_summed_over_the_group(group):
    n = len(group)
    tensor = torch.randn(n, n, n, dtype=torch.float64)
    found = triplet_energy(tensor, group)
    torch.testing.assert_close(found, energy_by_hand(tensor, group), rtol=1e-9, atol=1e-9)
    assert float(found.sum()) == pytest.approx(float(tensor.square().sum()))


@EVERY
def test_the_true_support_of_every_word_lies_inside_the_cover(group):
    words = {"".join(word) for size in (1, 2, 3, 4) for word in itertools.product("abAB", repeat=size)}
    # Words with the same table have the same tensor: the cover must hold for each spelling.
    for word in sorted(words)[:: 1 if len(group) < 8 else 5]:
        tensor = F.one_hot(group.word(word), len(group)).double()
        energy, cover = triplet_energy(tensor, group), fusion_cover(group, word)
        assert float(energy[~cover].sum()) < 1e-9 * float(energy.sum())
        assert outside_share(tensor, group, word) < 1e-9


@EVERY
def test_products_need_equal_triplets_and_all_of_them(group):
    count = len(group.irreps)
    cover = fusion_cover(group, "ab")
    places = torch.arange(count)
    assert int(cover.sum()) == count
    assert bool(cover[places, places, places].all())
    energy = triplet_energy(F.one_hot(group.table).double(), group)
    sizes = torch.tensor([irrep.multiplicity * irrep.dimension for irrep in group.irreps]).double()
    # tr rho(a) rho(b) rho(c)^-1 has the same energy for each of the d m dimensions of its irrep.
    torch.testing.assert_close(energy[places, places, places], sizes * len(group))


def test_random_logits_have_the_random_share():
    group = dihedral(5)
    draws = [outside_share(torch.randn(10, 10, 10), group, "abA") for _ in range(30)]
    assert sum(draws) / 30 == pytest.approx(random_share(group, "abA"), abs=0.01)
    mixed = group.table.flatten()[torch.randperm(100)].view(10, 10)
    assert outside_share(F.one_hot(mixed), group, "ab") > 0.6


def matrix_products(d):
    tensor = torch.zeros(d * d, d * d, d * d)
    for i, j, k in itertools.product(range(d), repeat=3):
        tensor[d * i + j, d * j + k, d * i + k] = 1
    return tensor


def test_two_by_two_matrices_take_seven_products_and_not_six():
    assert cp_error(matrix_products(2), 7, starts=20, sweeps=200).error < 1e-6
    assert cp_error(matrix_products(2), 6, starts=20, sweeps=200).error > 0.1


def test_the_rank_of_s3_is_that_of_its_matrices():
    tensor = F.one_hot(symmetric(3).table)
    assert cp_error(tensor, 9, sweeps=200).error < 1e-6
    assert cp_error(tensor, 8, sweeps=200).error > 0.1


def test_planted_ranks_are_found():
    u, v, w = (torch.randn(size, 3).double() for size in (5, 4, 6))
    tensor = torch.einsum("ar,br,cr->abc", u, v, w)
    assert cp_error(tensor, 3, sweeps=100).error < 1e-6
    assert cp_error(tensor, 2, sweeps=100).error > 1e-3


def test_a_network_of_products_holds_the_tensor_it_is_given():
    group = cyclic(5)
    fit = cp_error(F.one_hot(group.table), 9, sweeps=200)
    assert fit.error < 1e-6
    assert fit.error == pytest.approx(float(fit.errors.min()))
    model = Product(5, 3)
    with torch.no_grad():
        expected = torch.einsum("ja,jb,cj->abc", model.left.weight, model.right.weight, model.read.weight)
    torch.testing.assert_close(logit_table(model, 5).float(), expected)


def test_wrong_use_is_told():
    with pytest.raises(UsageError, match="no such word"):
        fusion_cover(cyclic(3), "xy")
    with pytest.raises(BadData, match="not over the group"):
        triplet_energy(torch.zeros(3, 3, 2), cyclic(3))
