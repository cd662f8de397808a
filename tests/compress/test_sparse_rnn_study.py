"""Pruning of recurrent matrices against torch.nn.utils.prune and by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from nervure import zoo
from nervure._kit import Unsupported, UsageError
from nervure.compress import prune_recurrent_, recurrent_matrices
from nervure.core import forward, masks


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("matrix", ["input", "hidden", "both"])
def test_masks_are_torchs_on_every_level_and_direction_also_twice(kind, matrix):
    model = kind(6, 8, num_layers=2, bidirectional=True)
    peer = copy.deepcopy(model)
    prefixes = {"input": ("ih",), "hidden": ("hh",), "both": ("ih", "hh")}[matrix]
    names = [f"weight_{p}_l{level}{end}" for level in (0, 1) for p in prefixes for end in ("", "_reverse")]
    for amount in (0.3, 0.5):
        found = prune_recurrent_(model, amount, matrix=matrix)
        assert set(found) == set(names)
        for name in names:
            prune.l1_unstructured(peer, name, amount)
    for name, mask in masks.read(model).items():
        assert torch.equal(mask, getattr(peer, f"{name}_mask").bool())
        assert torch.equal(model.get_parameter(name).detach(), getattr(peer, name).detach())


@pytest.mark.parametrize(("kind", "letters"), [(nn.GRU, "rzn"), (nn.LSTM, "ifgo")])
def test_single_gates(kind, letters):
    for gate in letters:
        model = kind(5, 4)
        start = model.weight_hh_l0.detach().clone()
        prune_recurrent_(model, 0.25, matrix="hidden", gates=gate)
        blocks, first = model.weight_hh_l0.detach().split(4), start.split(4)
        for place, letter in enumerate(letters):
            if letter != gate:
                assert torch.equal(blocks[place], first[place])
            else:
                smallest = first[place].abs().flatten().argsort()[:4]
                expected = first[place].flatten().clone()
                expected[smallest] = 0
                assert torch.equal(blocks[place].flatten(), expected)


def test_a_pruned_forget_gate_acts_only_through_its_rows():
    """With all of a gate's hidden weights gone the cell equals one computed by hand without them."""
    cell = nn.LSTMCell(3, 4)
    x, state = torch.randn(5, 3), (torch.randn(5, 4), torch.randn(5, 4))
    parts = x @ cell.weight_ih.T + cell.bias_ih + state[0] @ cell.weight_hh.T + cell.bias_hh
    i, f, g, o = parts.split(4, 1)
    f = (x @ cell.weight_ih.T + cell.bias_ih + cell.bias_hh).split(4, 1)[1]
    memory = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    expected = o.sigmoid() * memory.tanh()
    prune_recurrent_(cell, 1.0, matrix="hidden", gates="f")
    torch.testing.assert_close(cell(x, state)[0], expected)


def test_chance_depends_on_the_seed_and_the_matrix_and_not_on_the_weights():
    one, two = nn.GRU(6, 8, num_layers=2), nn.GRU(6, 8, num_layers=2)
    first, again = (prune_recurrent_(model, 0.5, by="chance", seed=3) for model in (one, two))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["weight_hh_l0"], first["weight_hh_l1"])
    other = prune_recurrent_(nn.GRU(6, 8, num_layers=2), 0.5, by="chance", seed=4)
    assert not torch.equal(first["weight_hh_l0"], other["weight_hh_l0"])
    assert all(int(mask.sum()) == mask.numel() // 2 for mask in first.values())


@pytest.mark.parametrize("case", zoo.cases(), ids=lambda case: case.name)
def test_the_zoo_is_pruned_and_stays_pruned_or_refused(case):
    model, batch = case.model(seed=0), case.batch(4, seed=0)
    if "recurrent" not in case.tags:
        with pytest.raises(Unsupported, match="no recurrent layer"):
            prune_recurrent_(model, 0.5)
        return
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n not in recurrent_matrices(model)}
    found = prune_recurrent_(model, 0.7)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in others.items())
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        case.loss(model, batch).backward()
        optimizer.step()
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in found.items())
    assert torch.isfinite(forward.outputs(model, batch[0])).all()


def test_bad_arguments():
    with pytest.raises(UsageError, match="no such share"):
        prune_recurrent_(nn.RNN(2, 2), 1.5)
    with pytest.raises(UsageError, match="none of the gates"):
        prune_recurrent_(nn.RNN(2, 2), 0.5, gates="f")
