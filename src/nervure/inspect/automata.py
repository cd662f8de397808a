"""Finite automata with outputs: run, minimise, compare, and extract them from the hidden states of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nervure._kit import BadData, UsageError

Step = Callable[[Tensor, Tensor], Tensor]
"""From states (N, d) and symbols (N,) to the next states (N, d)."""
UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Automaton:
    """Hold a deterministic automaton that gives an output in every state (a Moore machine).

    Args:
        transitions: [state, symbol] = the next state, shape (S, K); -1 where it is not known.
        outputs: The output of each state, shape (S,); 0 or more.
        start: The first state.

    Raises:
        BadData: If a transition leads nowhere.

    Examples:
        >>> parity = Automaton(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1]))
        >>> parity.run(torch.tensor([[1, 1, 0, 1]])).tolist()
        [[1, 0, 0, 1]]
    """

    transitions: Tensor
    outputs: Tensor
    start: int = 0

    def __post_init__(self) -> None:
        count = len(self.transitions)
        inside = bool(((self.transitions >= UNKNOWN) & (self.transitions < count)).all())
        if self.transitions.ndim != 2 or len(self.outputs) != count or not inside or not 0 <= self.start < count:
            raise BadData("this is no automaton", expected="a state or -1 for each state and symbol")

    def __len__(self) -> int:
        return len(self.transitions)

    @property
    def complete(self) -> bool:
        """Whether every state reached from the start knows where each symbol leads."""
        return bool((self.transitions[self.reachable()] != UNKNOWN).all())

    def reachable(self) -> Tensor:
        """Return the states that some word leads to, in the order of their shortest, first word."""
        order, seen, table = [self.start], {self.start}, self.transitions.tolist()
        for state in order:
            for after in table[state]:
                if after != UNKNOWN and after not in seen:
                    seen.add(after)
                    order.append(after)
        return torch.tensor(order)

    def run(self, words: Tensor) -> Tensor:
        """Return the outputs after every symbol.

        Args:
            words: Symbols, shape (N, L).

        Returns:
            Outputs, shape (N, L); -1 from where a transition is not known.
        """
        sink = len(self)
        table = torch.cat([self.transitions, torch.full((1, self.transitions.shape[1]), UNKNOWN)])
        table = torch.where(table == UNKNOWN, sink, table)
        said = torch.cat([self.outputs, torch.tensor([UNKNOWN])])
        state = torch.full((len(words),), self.start)
        found = torch.empty_like(words)
        for place in range(words.shape[1]):
            state = table[state, words[:, place]]
            found[:, place] = said[state]
        return found

    def minimal(self) -> Automaton:
        """Return the smallest automaton with the same outputs, by Hopcroft's partition refinement.

        States are numbered in the order of `reachable`, so that equal languages give equal tables. An unknown
        transition is kept apart from every known one.

        Returns:
            The automaton.
        """
        order = self.reachable()
        place = torch.full((len(self) + 1,), UNKNOWN)
        place[order] = torch.arange(len(order))
        table = place[self.transitions[order]]  # index -1 is the last entry: unknown stays unknown
        sink = len(order)
        full = torch.cat([torch.where(table == UNKNOWN, sink, table), torch.full((1, table.shape[1]), sink)])
        labels = torch.cat([self.outputs[order], torch.tensor([UNKNOWN])])
        block = torch.tensor(_hopcroft(full.tolist(), labels.tolist()))
        # States come in the order of their shortest words, so numbering by first appearance keeps that order.
        names = torch.full((int(block.max()) + 1,), UNKNOWN)
        kept: list[int] = []
        for state, label in enumerate(block[:sink].tolist()):
            if names[label] == UNKNOWN:
                names[label] = len(kept)
                kept.append(state)
        after = torch.where(table[kept] == UNKNOWN, UNKNOWN, names[block[table[kept]]])
        return Automaton(after, labels[kept])

    def same_as(self, other: Automaton) -> bool:
        """Return whether two automata give the same output to every word.

        Args:
            other: The other one.

        Returns:
            Whether their minimal automata are equal.
        """
        one, two = self.minimal(), other.minimal()
        return torch.equal(one.transitions, two.transitions) and torch.equal(one.outputs, two.outputs)


def _hopcroft(table: list[list[int]], labels: list[int]) -> list[int]:
    """Return the class of each state of a complete automaton: equal classes, equal outputs to every word."""
    symbols = range(len(table[0]))
    before: list[dict[int, list[int]]] = [{} for _ in symbols]
    for state, row in enumerate(table):
        for k in symbols:
            before[k].setdefault(row[k], []).append(state)
    blocks: list[set[int]] = [
        {state for state, label in enumerate(labels) if label == value} for value in sorted(set(labels))
    ]
    block_of = [0] * len(table)
    for number, block in enumerate(blocks):
        for state in block:
            block_of[state] = number
    waiting = {(number, k) for number in range(len(blocks)) for k in symbols}
    while waiting:
        number, k = waiting.pop()
        arriving = {state for target in blocks[number] for state in before[k].get(target, ())}
        for touched in {block_of[state] for state in arriving}:
            inside = blocks[touched] & arriving
            outside = blocks[touched] - arriving
            if not outside:
                continue
            fresh = len(blocks)
            blocks[touched] = outside
            blocks.append(inside)
            for state in inside:
                block_of[state] = fresh
            for symbol in symbols:
                if (touched, symbol) in waiting:
                    waiting.add((fresh, symbol))
                else:
                    waiting.add((fresh if len(inside) <= len(outside) else touched, symbol))
    return block_of


@dataclass(frozen=True)
class Extraction:
    """Hold the automaton that the hidden states of some words make.

    Args:
        machine: The automaton before it was minimised: one state for each cluster of hidden states.
        minimal: The smallest one with the same outputs.
        prefixes: Number of different prefixes of the words, the most states there can be.
        agreement: Share of the prefixes to which the machine, run from its start, gives the network's output.
    """

    machine: Automaton
    minimal: Automaton
    prefixes: int
    agreement: float

    @property
    def verdict(self) -> str:
        """Return "ok" for an automaton that answers as the network does, "warn" if it does not know every transition.

        It is "cannot tell" where the two disagree on a prefix: then vectors that lie close do not behave alike.
        """
        if self.agreement < 1:
            return "cannot tell"
        return "ok" if self.machine.complete else "warn"


@torch.no_grad()
def extract(
    step: Step,
    initial: Tensor,
    read: Callable[[Tensor], Tensor],
    words: Tensor,
    *,
    symbols: int,
    tolerance: float = 0.1,
) -> Extraction:
    """Extract an automaton: the hidden vectors after all prefixes are the states, those that lie close are merged.

    Args:
        step: The network's transition.
        initial: The hidden vector before the first symbol, shape (d,).
        read: From hidden vectors (N, d) to outputs, whole numbers from 0, shape (N,).
        words: Words whose prefixes are looked at, symbols from 0, shape (N, L); -1 after the end of a word.
        symbols: Size of the alphabet.
        tolerance: Distance below which two vectors are one state, in units of the root mean square distance of all
            vectors from their mean; above 0.

    Returns:
        The automaton, with what speaks against it.

    Raises:
        UsageError: If there are no words or the tolerance is not positive.
    """
    if words.ndim != 2 or not words.numel() or not tolerance > 0:
        raise UsageError(
            "nothing to extract", expected="words (N, L), tolerance > 0", found=(tuple(words.shape), tolerance)
        )
    levels, children, offset = [initial[None]], [], 0
    inverse = torch.zeros(len(words), dtype=torch.long)
    for place in range(words.shape[1]):
        longer = words[:, place] != UNKNOWN
        words, inverse = words[longer], inverse[longer]
        if not len(words):
            break
        edges, after = torch.stack([inverse, words[:, place]], 1).unique(dim=0, return_inverse=True)
        count = len(levels[-1])
        table = torch.full((count, symbols), UNKNOWN)
        table[edges[:, 0], edges[:, 1]] = torch.arange(len(edges)) + offset + count
        children.append(table)
        levels.append(step(levels[-1][edges[:, 0]], edges[:, 1]))
        offset, inverse = offset + count, after
    children.append(torch.full((len(levels[-1]), symbols), UNKNOWN))
    vectors, after = torch.cat(levels).double(), torch.cat(children)
    outputs = read(torch.cat(levels))
    return _merged(_clusters(vectors, tolerance), after, outputs)


def _clusters(vectors: Tensor, tolerance: float) -> Tensor:
    """Give each vector to the first earlier one within reach that is not given away itself."""
    spread = (vectors - vectors.mean(0)).square().sum(1).mean().sqrt()
    cluster = torch.full((len(vectors),), UNKNOWN)
    count = 0
    for place in range(len(vectors)):
        if cluster[place] == UNKNOWN:
            near = (vectors - vectors[place]).square().sum(1).sqrt() <= tolerance * spread
            cluster[near & (cluster == UNKNOWN)] = count
            count += 1
    return cluster


def _merged(cluster: Tensor, children: Tensor, outputs: Tensor) -> Extraction:
    count, symbols = int(cluster.max()) + 1, children.shape[1]
    targets = torch.where(children == UNKNOWN, UNKNOWN, cluster[children])
    # Prefixes come in the order of their length, so the first one that knows stands for the cluster.
    transitions = torch.full((count, symbols), UNKNOWN)
    said = torch.full((count,), UNKNOWN)
    backwards = torch.arange(len(cluster) - 1, -1, -1).tolist()
    for node in backwards:
        known = targets[node] != UNKNOWN
        transitions[cluster[node], known] = targets[node, known]
        said[cluster[node]] = outputs[node]
    machine = Automaton(transitions, said, int(cluster[0]))
    minimal = machine.minimal()
    states, after = [UNKNOWN] * len(cluster), minimal.transitions.tolist()
    states[0] = minimal.start
    for node, row in enumerate(children.tolist()):
        for symbol, child in enumerate(row):
            if child != UNKNOWN:
                states[child] = after[states[node]][symbol]
    agreement = float((minimal.outputs[torch.tensor(states)] == outputs).double().mean())
    return Extraction(machine, minimal, len(cluster), agreement)
