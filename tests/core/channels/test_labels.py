"""The solver against brute force: every fact holds for every choice of atoms, and no choice is lost needlessly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nervure.core.channels.labels import Labels, kept


def _atoms(labels: Labels, *arrays: np.ndarray) -> list[list[set[int]]]:
    solution = labels.solve()
    return [[set(column[column > 0].tolist()) for column in solution.atoms(one).T] for one in arrays]


def test_equal_labels_are_one_atom():
    labels = Labels()
    a, b, c = (labels.fresh(3) for _ in range(3))
    labels.unite(a, b)
    labels.unite(b[::-1], c)
    (x, y, z) = _atoms(labels, a, b, c)
    assert x == y == z[::-1]
    assert len(set.union(*x)) == 3


def test_what_is_pinned_pins_its_equals():
    labels = Labels()
    a, b = labels.fresh(3), labels.fresh(3)
    labels.unite(a, b)
    labels.pin(b[:1], "an output")
    (x,) = _atoms(labels, a)
    assert [len(one) for one in x] == [0, 1, 1]


def test_a_reshape_cuts_rows_or_columns():
    labels = Labels()
    whole = labels.fresh(6)
    rows, columns = labels.split(whole, 2, 3)
    whole_atoms, row_atoms, column_atoms = _atoms(labels, whole, rows, columns)
    assert whole_atoms == [row | column for row in row_atoms for column in column_atoms]
    assert len(set.union(*whole_atoms)) == 5
    assert labels.split(whole, 2, 3)[0] is rows  # once more gives the same
    back = labels.merge(rows, columns)
    assert _atoms(labels, back)[0] == _atoms(labels, whole)[0]


def test_a_pinned_part_leaves_the_other():
    labels = Labels()
    whole = labels.fresh(6)
    rows, columns = labels.split(whole, 2, 3)
    labels.pin(rows, "hard-coded")
    whole_atoms, column_atoms = _atoms(labels, whole, columns)
    assert whole_atoms == column_atoms * 2
    labels.pin(whole[:1], "an output")
    assert _atoms(labels, columns)[0][0] == set()
    assert all(len(one) == 1 for one in _atoms(labels, columns)[0][1:])


def test_repeated_and_constant_dimensions_need_no_composition():
    labels = Labels()
    channel = labels.fresh(4)
    flat = labels.merge(channel, kept(9))
    assert (flat == np.repeat(channel, 9)).all()
    outer, inner = labels.split(flat, 4, 9)
    assert (outer == channel).all()
    assert not inner.any()
    assert (labels.split(np.tile(channel, 2), 2, 4)[1] == channel).all()


def test_a_dimension_composed_of_itself_does_not_loop():
    labels = Labels()
    whole = labels.fresh(4)
    rows, columns = labels.split(whole, 2, 2)
    labels.unite(whole, np.concatenate([rows, columns]))
    for one in _atoms(labels, whole, rows, columns):
        assert len(one) in (2, 4)


SIZES = ((12, 2, 6), (12, 3, 4), (12, 4, 3), (12, 6, 2))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("unite"), st.integers(0, 2), st.integers(0, 2)),
            st.tuples(st.just("split"), st.integers(0, 2), st.sampled_from(SIZES)),
            st.tuples(st.just("swap"), st.integers(0, 2), st.sampled_from(SIZES)),
            st.tuples(st.just("pin"), st.integers(0, 2), st.integers(0, 11)),
        ),
        max_size=7,
    )
)
def test_every_fact_holds_whatever_is_cut(steps):
    labels = Labels()
    dims = [labels.fresh(12) for _ in range(3)]
    facts = []
    for kind, place, what in steps:
        one = dims[place]
        if kind == "unite":
            labels.unite(one, dims[what])
            facts.append((one, dims[what], None))
        elif kind == "pin":
            labels.pin(one[what : what + 1], "told so")
            facts.append((one[what : what + 1], None, None))
        else:
            rows, columns = labels.split(one, *what[1:])
            facts.append((one, rows, columns))
            if kind == "swap":
                dims[place] = labels.merge(columns, rows)
                facts.append((dims[place], columns, rows))
    solution = labels.solve()
    count = int(solution.root.max()) + 2
    draw = np.random.default_rng(0)
    used = np.unique(np.concatenate([solution.atoms(one).ravel() for one in dims]))
    for cut in itertools.chain([np.isin(np.arange(count), used)], (draw.random(count) < 0.3 for _ in range(5))):
        cut[0] = False

        def gone(one: np.ndarray, cut: np.ndarray = cut) -> np.ndarray:
            return cut[solution.atoms(one)].any(0)

        for whole, rows, columns in facts:
            if rows is None:
                assert not gone(whole).any()
            elif columns is None:
                assert (gone(whole) == gone(rows)).all()
            else:
                assert (gone(whole).reshape(len(rows), -1) == (gone(rows)[:, None] | gone(columns)[None])).all()


def test_lengths_of_one_are_never_cut():
    labels = Labels()
    assert not labels.fresh(1).any()
    assert labels.split(labels.fresh(5), 1, 5)[0].tolist() == [0]


@pytest.mark.parametrize("first", [2, 4])
def test_two_reshapes_of_one_dimension_leave_their_common_factors(first):
    labels = Labels()
    whole = labels.fresh(8)
    labels.split(whole, first, 8 // first)
    labels.split(whole, 8 // first, first)
    (atoms,) = _atoms(labels, whole)
    assert len(set.union(*atoms)) == 4  # 8 = 2 x 2 x 2, of which the middle factor joins either side
