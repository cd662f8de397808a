"""Finite groups by their tables: classes, characters, real irreducible representations, isotypic projectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from nervure._kit import BadData, CouldNotRun, UsageError

# Products of a few hundred float64 numbers of size 1 are right to about 1e-13.
EXACT = 1e-10
Kind = Literal["real", "complex", "quaternionic"]


@dataclass(frozen=True, eq=False)
class Irrep:
    """Describe one irreducible representation over the real numbers.

    Args:
        dimension: Its dimension.
        kind: ``"real"`` where it stays irreducible over the complex numbers, ``"complex"`` where it is a pair of
            conjugate ones, ``"quaternionic"`` where it is one of them twice.
        multiplicity: How often it stands in the regular representation; multiplicity times dimension is the rank
            of its isotypic projector.
        character: Trace of each element's matrix, shape (n,), float64.
    """

    dimension: int
    kind: Kind
    multiplicity: int
    character: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Hold a finite group by its Cayley table; element 0 need not be the identity.

    Args:
        table: table[a, b] is the number of a b; shape (n, n), whole numbers below n.
        name: A name.

    Raises:
        BadData: If the table is not that of a group.

    Examples:
        >>> [irrep.dimension for irrep in symmetric(4).irreps]
        [1, 1, 2, 3, 3]
        >>> group_of(lambda a, b: (a + b) % 6, 6).is_abelian
        True
    """

    table: Tensor
    name: str = "group"

    def __post_init__(self) -> None:
        trouble = why_no_group(self.table)
        if trouble:
            raise BadData(
                f"{self.name} is not a group: {trouble}",
                expected="an associative table with an identity and inverses",
                found=tuple(self.table.shape),
            )

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def identity(self) -> int:
        """The number of the element that changes nothing."""
        return int(_identity(self.table))

    @cached_property
    def inverse(self) -> Tensor:
        """The number of each element's inverse, shape (n,)."""
        return (self.table == self.identity).int().argmax(1)

    @cached_property
    def is_abelian(self) -> bool:
        """Whether a b = b a."""
        return bool((self.table == self.table.T).all())

    @cached_property
    def class_of(self) -> Tensor:
        """The number of each element's conjugacy class, shape (n,); classes are numbered by their smallest element."""
        orbits = self.table[self.table, self.inverse[:, None]]  # [g, x] = g x g^-1
        return orbits.amin(0).unique(return_inverse=True)[1]

    @cached_property
    def class_sizes(self) -> Tensor:
        """The number of elements of each class."""
        return self.class_of.bincount()

    @cached_property
    def characters(self) -> Tensor:
        """The complex irreducible characters, shape (k, k): one a row, by dimension, at each class.

        They are the joint eigenvectors of the class algebra: omega_i omega_j = sum_l c_ijl omega_l for
        omega_i = |C_i| chi(C_i) / chi(1), where c_ijl counts the ways to write an element of C_l as x y.
        """
        cls, sizes, k = self.class_of, self.class_sizes.double(), len(self.class_sizes)
        first = torch.stack([(cls == label).nonzero()[0, 0] for label in range(k)])
        partner = cls[self.table[self.inverse[:, None], first]]  # class of y in x y = the first of class l
        flat = (cls[:, None] * k + partner) * k + torch.arange(k)
        ways = flat.flatten().bincount(minlength=k**3).view(k, k, k).double()
        scaled = ways * (sizes.sqrt()[None, None, :] / sizes.sqrt()[None, :, None])
        # Normal matrices that commute; a random Hermitian combination has their joint eigenvectors.
        draw = torch.randn(2, k, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(len(self)))
        even, odd = (draw[0] * (scaled + scaled.mT)).sum(0), (draw[1] * (scaled - scaled.mT)).sum(0)
        vectors = torch.linalg.eigh(torch.complex(even, odd * 0) + 1j * odd)[1].T / sizes.sqrt()
        vectors = vectors / vectors[:, cls[self.identity], None]
        dimensions = (len(self) / (sizes * vectors.abs().square()).sum(1)).sqrt()
        found = vectors * dimensions.round()[:, None]
        gram = (found * sizes) @ found.mH / len(self)
        self._require("characters are orthonormal", gram, torch.eye(k, dtype=gram.dtype))
        rounded = (torch.view_as_real(found) * 1e6).round()
        keys = [(int(d.round()), (-row).flatten().tolist()) for d, row in zip(dimensions, rounded, strict=True)]
        return found[sorted(range(k), key=keys.__getitem__)]

    @cached_property
    def irreps(self) -> tuple[Irrep, ...]:
        """The irreducible representations over the real numbers, by dimension, the trivial one first."""
        square = self.class_of[self.table.diag()]
        found = []
        for row in self.characters:
            indicator = round(float(row[square].real.mean()))  # Frobenius and Schur: 1, 0 or -1
            degree = round(float(row[self.class_of[self.identity]].real))
            values = row[self.class_of]
            if indicator == 1:
                found.append(Irrep(degree, "real", degree, values.real.clone()))
            elif indicator == -1:
                found.append(Irrep(2 * degree, "quaternionic", degree // 2, 2 * values.real))
            elif _first_imaginary(values) > 0:
                found.append(Irrep(2 * degree, "complex", degree, 2 * values.real))
        keys = [(each.dimension, (-each.character * 1e6).round().tolist()) for each in found]
        return tuple(found[place] for place in sorted(range(len(found)), key=keys.__getitem__))

    @cached_property
    def projectors(self) -> Tensor:
        """The orthogonal projectors of functions on the group onto each real irrep's part, shape (I, n, n).

        P = (multiplicity / n) chi(a b^-1); for a cyclic group these are the frequencies of the Fourier transform.
        """
        over = self.table[:, self.inverse]
        found = torch.stack([each.multiplicity / len(self) * each.character[over] for each in self.irreps])
        self._require("projectors sum to one", found.sum(0), torch.eye(len(self), dtype=found.dtype))
        self._require("projectors are idempotent", found @ found, found)
        return found

    def matrices(self, index: int) -> Tensor:
        """Return orthogonal matrices of one real irrep.

        They act on an eigenspace of a random symmetric matrix that commutes with the regular representation.

        Args:
            index: Which of `irreps`.

        Returns:
            One matrix for each element, shape (n, d, d), float64.
        """
        n, irrep = len(self), self.irreps[index]
        draw = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n + index))
        draw = draw + draw[self.inverse]
        mixed = draw[self.table[self.inverse]]  # [x, y] = draw(x^-1 y) commutes with f -> f(g^-1 .)
        inside = torch.linalg.eigh(self.projectors[index])[1][:, n - irrep.multiplicity * irrep.dimension :]
        basis = inside @ torch.linalg.eigh(inside.T @ mixed @ inside)[1][:, : irrep.dimension]
        moved = basis[self.table[self.inverse]]  # [g, x] = row g^-1 x
        found = basis.T @ moved
        self._require("matrices multiply as elements", found[:, None] @ found[None], found[self.table])
        self._require("traces are the character", found.diagonal(dim1=1, dim2=2).sum(-1), irrep.character)
        return found

    def power(self, values: Tensor) -> Tensor:
        """Return how the energy of functions on the group is spread over the real irreps.

        Args:
            values: One function a column, shape (n, m) or (n,); rows are elements.

        Returns:
            Shares that sum to 1, shape (I, m) or (I,); 0 for a function that is zero.

        Raises:
            UsageError: If there is not a row for each element.
        """
        if values.shape[0] != len(self) or values.ndim > 2:
            raise UsageError("the functions do not fit", expected=f"({len(self)}, m)", found=tuple(values.shape))
        columns = values.detach().double().cpu().reshape(len(self), -1)
        energy = (columns * (self.projectors @ columns)).sum(1)
        shares = energy / columns.square().sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        return shares.reshape(len(self.irreps), *values.shape[1:])

    def word(self, letters: str) -> Tensor:
        """Return the table of a word in two letters, such as ``"abA"`` for a b a^-1.

        Args:
            letters: a and b, capital letters for their inverses; at least one letter.

        Returns:
            [a, b] = the number of the word's value, shape (n, n).

        Raises:
            UsageError: If the word is not of these letters.
        """
        if not letters or set(letters) - set("abAB"):
            raise UsageError("no such word", expected="letters a, b, A, B", found=letters)
        numbers = torch.arange(len(self))
        value = {"a": numbers[:, None], "b": numbers[None], "A": self.inverse[:, None], "B": self.inverse[None]}
        found = torch.full((1, 1), self.identity)
        for letter in letters:
            found = self.table[found, value[letter]]
        return found.expand(len(self), len(self)).clone()

    def _require(self, what: str, found: Tensor, expected: Tensor) -> None:
        gap = float((found - expected).abs().max())
        if not gap <= EXACT:
            raise CouldNotRun(f"{self.name}: not exact enough that {what}", expected=f"within {EXACT:g}", found=gap)


def why_no_group(table: Tensor) -> str | None:
    """Return why a table is not that of a group, or None where it is.

    Args:
        table: table[a, b], shape (n, n).

    Returns:
        The reason in a few words.
    """
    n = len(table)
    if table.ndim != 2 or table.shape[1] != n or not n or table.is_floating_point() or table.is_complex():
        return "it is no square table of whole numbers"
    if int(table.min()) < 0 or int(table.max()) >= n:
        return "a product is not one of the elements"
    identity = _identity(table)
    if identity < 0:
        return "it has no identity"
    if not bool(((table == identity) & (table == identity).T).any(1).all()):
        return "an element has no inverse"
    # Light's test: it is enough that (x g) y = x (g y) for g in a generating set.
    if any(not torch.equal(table[table[:, g]], table[:, table[g]]) for g in _generators(table)):
        return "it is not associative"
    return None


def _identity(table: Tensor) -> int:
    numbers = torch.arange(len(table))
    neutral = ((table == numbers[None]).all(1) & (table == numbers[:, None]).all(0)).nonzero()
    return int(neutral[0, 0]) if len(neutral) else -1


def _generators(table: Tensor) -> list[int]:
    chosen: list[int] = []
    reached = torch.zeros(len(table), dtype=torch.bool)
    while not bool(reached.all()):
        chosen.append(int((~reached).nonzero()[0, 0]))
        reached[chosen[-1]] = True
        before = -1
        while int(reached.sum()) != before:
            before = int(reached.sum())
            reached[table[reached][:, reached].flatten()] = True
    return chosen


def _first_imaginary(values: Tensor) -> float:
    return next((float(value) for value in values.imag if abs(float(value)) > EXACT), 0.0)


def operation_table(operation: Callable[[int, int], int], size: int) -> Tensor:
    """Return the table of any operation on 0, ..., size - 1; it need not be that of a group.

    Args:
        operation: From two numbers to one.
        size: The number of elements, at least 1.

    Returns:
        [a, b] = operation(a, b), shape (size, size).

    Raises:
        BadData: If a value is not one of the elements.
    """
    found = torch.tensor([[operation(a, b) for b in range(size)] for a in range(size)]).reshape(size, size)
    if found.is_floating_point() or int(found.min()) < 0 or int(found.max()) >= size:
        raise BadData("a value is not one of the elements", expected=f"whole numbers from 0 to {size - 1}")
    return found


def group_of(operation: Callable[[int, int], int], size: int, name: str = "group") -> Group:
    """Return the group of an operation on 0, ..., size - 1.

    Args:
        operation: From two numbers to one.
        size: The number of elements.
        name: A name.

    Returns:
        The group.
    """
    return Group(operation_table(operation, size), name)


def cyclic(n: int) -> Group:
    """Return addition modulo n.

    Args:
        n: The order, at least 1.

    Returns:
        The group.
    """
    numbers = torch.arange(n)
    return Group((numbers[:, None] + numbers) % n, f"C{n}")


def dihedral(n: int) -> Group:
    """Return the symmetries of a regular polygon: rotations 0 to n - 1, then reflections.

    Args:
        n: Corners, at least 1; the group has 2 n elements.

    Returns:
        The group.
    """
    k, flip = torch.arange(2 * n) % n, torch.arange(2 * n) // n
    turn = (k[:, None] + torch.where(flip[:, None] == 1, -k[None], k[None])) % n
    return Group(turn + n * (flip[:, None] ^ flip[None]), f"D{n}")


def permutations(generators: Iterable[Sequence[int]], name: str = "permutations") -> Group:
    """Return the group that some permutations generate; elements in lexicographic order.

    Args:
        generators: Permutations of 0, ..., k - 1 by their values; (p q)(i) = p(q(i)).
        name: A name.

    Returns:
        The group.

    Raises:
        BadData: If one of them is no permutation.
    """
    given = [tuple(each) for each in generators]
    if not given or any(sorted(each) != list(range(len(given[0]))) for each in given):
        raise BadData("no permutations of one set", expected="each value from 0 once", found=given)
    reached = {tuple(range(len(given[0])))}
    fresh = reached
    while fresh:
        fresh = {tuple(p[i] for i in q) for p in given for q in fresh} - reached
        reached = reached | fresh
    elements = torch.tensor(sorted(reached))
    products = elements[:, elements]  # [p, q, i] = p(q(i))
    weights = elements.shape[1] ** torch.arange(elements.shape[1] - 1, -1, -1)
    return Group(torch.searchsorted((elements * weights).sum(1), (products * weights).sum(2)), name)


def symmetric(n: int) -> Group:
    """Return all permutations of n things.

    Args:
        n: At least 1; the group has n! elements.

    Returns:
        The group.
    """
    return permutations(itertools.permutations(range(n)), f"S{n}") if n < 3 else _generated(n, even=False)


def alternating(n: int) -> Group:
    """Return the even permutations of n things.

    Args:
        n: At least 3; the group has n! / 2 elements.

    Returns:
        The group.
    """
    return _generated(n, even=True)


def _generated(n: int, *, even: bool) -> Group:
    rest = list(range(n))
    if even:
        turns = [[*rest[:i], i + 1, i + 2, i, *rest[i + 3 :]] for i in range(n - 2)]
        return permutations(turns, f"A{n}")
    return permutations([[1, 0, *rest[2:]], [*rest[1:], 0]], f"S{n}")
