"""Minimisation against the table of distinguishable pairs, extraction from networks made of known automata."""

from __future__ import annotations

import itertools

import pytest
import torch

from nervure._kit import BadData, UsageError
from nervure.inspect.automata import Automaton, extract


def random_automaton(seed, states=8, symbols=2, outputs=2):
    draw = torch.Generator().manual_seed(seed)
    return Automaton(
        torch.randint(states, (states, symbols), generator=draw), torch.randint(outputs, (states,), generator=draw)
    )


def reached(machine):
    seen, rows = {machine.start}, machine.transitions.tolist()
    while True:
        more = {rows[state][k] for state in seen for k in range(len(rows[0]))} - seen
        if not more:
            return sorted(seen)
        seen |= more


def distinguishable(machine):
    """The Myhill-Nerode table: mark pairs with other outputs, then pairs whose successors are marked."""
    rows, out = machine.transitions.tolist(), machine.outputs.tolist()
    states = range(len(rows))
    marked = {(p, q) for p in states for q in states if out[p] != out[q]}
    while True:
        more = {
            (p, q)
            for p in states
            for q in states
            if (p, q) not in marked and any((rows[p][k], rows[q][k]) in marked for k in range(len(rows[0])))
        }
        if not more:
            return marked
        marked |= more


@pytest.mark.parametrize("seed", range(40))
def test_minimal_automata_equal_the_myhill_nerode_table(seed):
    machine = random_automaton(seed, states=3 + seed % 9, symbols=1 + seed % 3, outputs=2 + seed % 2)
    marked, states = distinguishable(machine), reached(machine)
    classes = []
    for state in states:
        if all((state, known[0]) in marked for known in classes):
            classes.append([state])
        else:
            next(known for known in classes if (state, known[0]) not in marked).append(state)
    minimal = machine.minimal()
    assert len(minimal) == len(classes)
    assert sorted(machine.reachable().tolist()) == states
    words = torch.randint(machine.transitions.shape[1], (200, 12))
    assert torch.equal(minimal.run(words), machine.run(words))
    assert torch.equal(minimal.minimal().transitions, minimal.transitions)


@pytest.mark.parametrize("seed", range(10))
def test_languages_are_compared_whatever_the_numbering(seed):
    machine = random_automaton(seed)
    order = torch.randperm(len(machine), generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    other = Automaton(place[machine.transitions[order]], machine.outputs[order], int(place[machine.start]))
    assert machine.same_as(other)
    flipped = Automaton(other.transitions, 1 - other.outputs, other.start)
    assert not machine.same_as(flipped)


def test_unknown_transitions_stay_apart():
    # Two states with equal outputs: of one it is not known where the symbol leads.
    machine = Automaton(torch.tensor([[1], [0], [-1]]), torch.tensor([0, 0, 0]))
    assert len(machine.minimal()) == 1
    assert machine.complete
    chain = Automaton(torch.tensor([[1], [2], [-1]]), torch.tensor([0, 0, 0]))
    assert len(chain.minimal()) == 3
    assert not chain.complete
    assert chain.run(torch.tensor([[0, 0, 0, 0]])).tolist() == [[0, 0, -1, -1]]


def embedded(machine, noise, dimension=20):
    """A network whose state is a code of the automaton's state, with noise that depends on the way."""
    codes = torch.randn(len(machine), dimension, generator=torch.Generator().manual_seed(1))

    def state(h):
        return torch.cdist(h, codes).argmin(1)

    def step(h, s):
        wobble = torch.sin(37 * h + s[:, None])
        return codes[machine.transitions[state(h), s]] + noise * wobble

    return step, codes[machine.start], lambda h: machine.outputs[state(h)]


@pytest.mark.parametrize("seed", range(8))
def test_networks_made_of_automata_give_them_back(seed):
    machine = random_automaton(seed, states=5)
    words = torch.tensor(list(itertools.product((0, 1), repeat=8)))
    found = extract(*embedded(machine, 0.02), words, symbols=2)
    assert found.verdict == "ok"
    assert len(found.machine) == len(machine.reachable())
    assert found.minimal.same_as(machine)
    assert found.prefixes == 2**9 - 1
    step, h, read = embedded(machine, 0.02)
    long = torch.randint(2, (10_000, 30))
    said, h = found.minimal.run(long), h.expand(len(long), -1)
    for place in range(30):
        h = step(h, long[:, place])
        assert torch.equal(read(h), said[:, place])


def test_a_network_that_remembers_every_word_gives_a_tree():
    def step(h, s):
        return 2 * h + s[:, None] + 1

    words = torch.tensor(list(itertools.product((0, 1), repeat=5)))
    found = extract(step, torch.zeros(1), lambda h: h[:, 0].long() % 2, words, symbols=2, tolerance=1e-3)
    assert found.prefixes == len(found.machine) == 63
    assert found.verdict == "warn"
    assert not found.machine.complete


def test_states_that_are_close_and_behave_differently_are_not_trusted():
    machine = random_automaton(3, states=5)
    words = torch.tensor(list(itertools.product((0, 1), repeat=6)))
    found = extract(*embedded(machine, 0.02), words, symbols=2, tolerance=100.0)
    assert len(found.machine) == 1
    assert found.agreement < 1
    assert found.verdict == "cannot tell"


def test_words_of_different_lengths_and_few_of_them():
    machine = Automaton(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1]))
    words = torch.tensor([[1, -1, -1], [1, 0, 1], [1, 0, -1], [0, -1, -1]])
    found = extract(*embedded(machine, 0.0), words, symbols=2)
    assert found.prefixes == 5
    assert found.agreement == 1
    assert found.minimal.same_as(machine)


def test_wrong_use_is_told():
    with pytest.raises(BadData, match="no automaton"):
        Automaton(torch.tensor([[5]]), torch.tensor([0]))
    with pytest.raises(UsageError, match="nothing to extract"):
        extract(lambda h, s: h, torch.zeros(1), lambda h: h[:, 0].long(), torch.zeros(0, 3), symbols=2)
