"""Logits over groups: exact networks of irreps, least squares on characters, ablations, networks of every kind."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure import zoo
from nervure._kit import BadData, UsageError
from nervure.core import forward
from nervure.core.group_tables import alternating, cyclic, dihedral, symmetric
from nervure.inspect._delayed import pairs
from nervure.inspect.group_composition_reps import character_part, composition, logit_table

GROUPS = [cyclic(6), dihedral(4), symmetric(3), alternating(4), symmetric(4)]
EVERY = pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)


def exact_logits(group, keys):
    """The sum over irreps of tr(rho(a) rho(b) rho(c)^-1), by matrices and not by characters."""
    total = torch.zeros(len(group), len(group), len(group), dtype=torch.float64)
    for key in keys:
        rho = group.matrices(key)
        total += torch.einsum("aij,bjk,cik->abc", rho, rho, rho)  # rho(c)^-1 is the transpose
    return total


@EVERY
def test_a_network_of_exact_matrices_is_all_characters(group):
    keys = (len(group.irreps) - 1,)
    found = composition(exact_logits(group, keys), group)
    assert found.share == pytest.approx(1, abs=1e-10)
    assert found.keys == keys
    assert float(found.shares[keys[0]]) == pytest.approx(1, abs=1e-10)
    # Where the representation is faithful its character peaks at the identity alone.
    chi = group.irreps[keys[0]].character
    faithful = int((chi > chi[group.identity] - 1e-9).sum()) == 1
    assert (found.accuracy == found.restricted == 1) == faithful
    assert found.excluded == 0


@EVERY
def test_parts_equal_least_squares_on_the_characters_written_out(group):
    n = len(group)
    logits = torch.randn(n, n, n, dtype=torch.float64)
    t, inverse = group.table.tolist(), group.inverse.tolist()
    columns = torch.empty(n**3, len(group.irreps), dtype=torch.float64)
    for place, (a, b, c) in enumerate(itertools.product(range(n), repeat=3)):
        element = t[t[a][b]][inverse[c]]
        columns[place] = torch.stack([irrep.character[element] for irrep in group.irreps])
    weights = torch.linalg.lstsq(columns, logits.flatten()[:, None]).solution[:, 0]
    expected = (columns * weights).T.reshape(-1, n, n, n)
    torch.testing.assert_close(character_part(logits, group), expected, rtol=1e-9, atol=1e-10)
    found = composition(logits, group)
    centred = logits - logits.mean(2, keepdim=True)
    fitted = (columns @ torch.linalg.lstsq(columns, centred.flatten()[:, None]).solution)[:, 0]
    residual = (centred.flatten() - fitted).square().sum() / centred.square().sum()
    assert found.share == pytest.approx(1 - float(residual), abs=1e-10)
    assert found.share < 0.2


def test_the_true_table_is_spread_over_all_irreps_by_squared_dimension():
    group = symmetric(4)
    found = composition(F.one_hot(group.table).double(), group)
    expected = torch.tensor([0.0, 1, 4, 9, 9], dtype=torch.float64) / 23
    torch.testing.assert_close(found.shares, expected)
    assert found.accuracy == 1


def test_taking_out_the_keys_destroys_what_random_directions_do_not():
    group = symmetric(4)
    logits = exact_logits(group, (3, 4)) + 0.3 * torch.randn(24, 24, 24, dtype=torch.float64)
    found = composition(logits, group)
    assert set(found.keys) == {3, 4}
    assert found.accuracy == found.restricted == 1
    assert found.excluded < 2 / 24
    assert found.excluded_at_random > 0.9
    assert found.verdict == "ok"
    noise = composition(torch.randn(24, 24, 24), group)
    assert noise.verdict == "cannot tell"
    forced = composition(logits, group, keys=(1,))
    assert forced.keys == (1,)
    assert forced.excluded == 1


def test_accuracies_are_over_the_cells_asked_for():
    group = cyclic(5)
    logits = F.one_hot(group.table).double()
    logits[0] = 0
    logits[0, :, 4] = 1
    cells = torch.zeros(5, 5, dtype=torch.bool)
    cells[0] = True
    assert composition(logits, group, cells=cells).accuracy == pytest.approx(0.2)
    assert composition(logits, group, cells=~cells).accuracy == 1


def test_logit_tables_of_one_hot_and_token_networks():
    net = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4))
    table = logit_table(net, 4)
    eye = torch.eye(4)
    for a, b in itertools.product(range(4), repeat=2):
        torch.testing.assert_close(table[a, b].float(), net(torch.cat([eye[a], eye[b]])[None])[0].detach())
    assert torch.equal(pairs(4)[6], torch.cat([eye[1], eye[2]]))

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.read = nn.Embedding(4, 6), nn.Linear(6, 4)

        def forward(self, left, right):
            return {"logits": self.read(self.embed(left) * self.embed(right))}

    model = Tokens().train()
    table = logit_table(model, 4, encode=lambda a, b: (a, b))
    torch.testing.assert_close(table, table.transpose(0, 1))
    assert model.training


@pytest.mark.parametrize("name", [name for name in zoo.names() if name != "tied-lm"])
def test_any_network_can_be_read_where_pairs_can_be_encoded(name):
    # The samples of a zoo batch stand for the pairs of a group of as many elements as the network has classes, or 3.
    case, group = zoo.case(name), cyclic(3)
    model, x = case.model(), case.batch(9)[0]
    table = logit_table(model, 3, encode=lambda a, b: forward.take(x, 3 * a + b))
    torch.testing.assert_close(table.flatten(0, 1).float(), forward.predict(model, x), rtol=1e-4, atol=1e-5)
    found = composition(table[..., :3], group)
    assert 0 <= found.share <= 1
    assert model.training


def test_wrong_use_is_told():
    with pytest.raises(UsageError, match="not over the group"):
        character_part(torch.zeros(3, 3, 4), cyclic(3))
    with pytest.raises(BadData, match="no row of logits"):
        logit_table(nn.Embedding(5, 3), 2, encode=lambda a, b: torch.stack([a, b], 1))
