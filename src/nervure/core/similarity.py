"""How alike two sets of features of the same samples are: centred kernel alignment, canonical correlations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nervure._kit import BadData

Estimator = Literal["biased", "unbiased"]


def cka(x: Tensor, y: Tensor, *, estimator: Estimator = "biased") -> float:
    """Return linear centred kernel alignment, HSIC(K, L) / (HSIC(K, K) HSIC(L, L))^0.5 with K = x x', L = y y'.

    Args:
        x: Features, shape (N, ...); flattened to a row a sample.
        y: Other features of the same samples, of any width.
        estimator: ``"biased"`` is the usual one, near 1 for few samples of many features whatever they are;
            ``"unbiased"`` is not, and may be below 0. It needs four samples.

    Returns:
        1 where the features agree up to rotation and scale; NaN where one does not vary.

    Raises:
        BadData: If there are not as many samples of each, or too few.

    Examples:
        >>> import torch
        >>> x = torch.eye(4)
        >>> round(cka(x, 3 * x), 6)
        1.0
    """
    a, b = _centred(x, y, least=4 if estimator == "unbiased" else 2)
    if estimator == "biased" and max(a.shape[1], b.shape[1]) <= len(a):
        return float((b.T @ a).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))
    return _aligned(a @ a.T, b @ b.T, estimator)


def rbf_cka(x: Tensor, y: Tensor, *, width: float = 0.5, estimator: Estimator = "biased") -> float:
    """Return centred kernel alignment of Gaussian kernels exp(-|x - x'|^2 / 2 s^2), s = width * median |x - x'|.

    Args:
        x: Features, shape (N, ...).
        y: Other features of the same samples.
        width: Share of the median distance, above 0; small ones look at near neighbours, large ones tend to `cka`.
        estimator: As in `cka`.

    Returns:
        As in `cka`.
    """
    kernels = []
    for one in _centred(x, y, least=4 if estimator == "unbiased" else 2):
        norms = one.square().sum(1)
        squares = (norms[:, None] + norms - 2 * one @ one.T).clamp_min(0)
        apart = squares[~torch.eye(len(one), dtype=torch.bool, device=one.device)].median()
        kernels.append(torch.exp(-squares / (2 * width**2 * apart)) if apart > 0 else torch.ones_like(squares))
    if estimator == "biased":
        kernels = [k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in kernels]
    return _aligned(kernels[0], kernels[1], estimator)


def _centred(x: Tensor, y: Tensor, *, least: int) -> tuple[Tensor, Tensor]:
    if len(x) != len(y) or len(x) < least:
        raise BadData("the features do not fit", expected=f"as many samples, {least} or more", found=(len(x), len(y)))
    a, b = (one.detach().double().flatten(1) for one in (x, y))
    return a - a.mean(0), b - b.mean(0)


def _aligned(k: Tensor, m: Tensor, estimator: Estimator) -> float:
    """Return the alignment of two kernels, centred already where the estimator is biased."""
    if estimator == "biased":
        return float((k * m).sum() / (k.norm() * m.norm()))
    both, one, other = _hsic(k, m), _hsic(k, k), _hsic(m, m)
    return both / (one * other) ** 0.5 if one > 0 and other > 0 else float("nan")


def _hsic(k: Tensor, m: Tensor) -> float:
    """Return the unbiased estimate of Song et al. (2012)."""
    n = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    trace, sums = (k * m).sum(), k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float((trace + sums - 2 / (n - 2) * k.sum(0) @ m.sum(0)) / (n * (n - 3)))


class MinibatchCKA:
    """Compare every layer of one network with every layer of another in one pass over batches, in float64.

    For each batch all Gram matrices K_i = X_i X_i' are formed once, and all pairs' inner products are one matrix
    product. Both estimates of HSIC are averaged over the batches (Nguyen et al., 2021): the unbiased one tends to the
    value of all samples whatever the size of a batch, the biased one stays that of batches of this size.

    Examples:
        >>> draw = torch.Generator().manual_seed(0)
        >>> seen = MinibatchCKA()
        >>> for _ in range(3):
        ...     x = torch.randn(50, 4, generator=draw)
        ...     seen.update([x, x.relu()], [3 * x])
        >>> seen.matrix("unbiased").shape
        torch.Size([2, 1])
        >>> round(float(seen.matrix("unbiased")[0, 0]), 6)
        1.0
    """

    def __init__(self) -> None:
        self.batches = 0
        self._sums: dict[Estimator, list[Tensor]] = {}

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor] | None = None) -> None:
        """Take in the features of one batch.

        Args:
            xs: Features of each layer of the first network, shape (N, ...).
            ys: Those of the second; those of the first when None.

        Raises:
            BadData: If there are fewer than four samples, or not as many everywhere.
        """
        every = [*xs, *(ys if ys is not None else ())]
        n = len(every[0])
        if n < 4 or any(len(one) != n for one in every):
            raise BadData(
                "the features do not fit", expected="as many samples, 4 or more", found=[len(x) for x in every]
            )
        grams = torch.stack([_gram(one) for one in every])
        diagonal, sums = grams.diagonal(dim1=1, dim2=2), grams.sum(2)
        rows, flat = sums - diagonal, grams.flatten(1)
        totals = rows.sum(1)
        cut, start = len(xs), len(xs) if ys is not None else 0

        def estimates(pairs: Tensor, i: slice, j: slice, unbiased: bool) -> Tensor:
            """Return HSIC from the inner products of Gram matrices, for all pairs or (diagonal) each with itself."""
            if not unbiased:
                return pairs / (n - 1) ** 2
            outer = (lambda a, b: a @ b.T) if pairs.ndim == 2 else (lambda a, b: (a * b).sum(1))
            trace = pairs - outer(diagonal[i], diagonal[j])
            mean = outer(totals[i, None], totals[j, None]) / ((n - 1) * (n - 2))
            return (trace + mean - 2 / (n - 2) * outer(rows[i], rows[j])) / (n * (n - 3))

        left, right = slice(0, cut), slice(start, None)
        both, each = flat[left] @ flat[right].T, flat.square().sum(1)
        for name in ("biased", "unbiased"):
            unbiased = name == "unbiased"
            alone = estimates(each, slice(None), slice(None), unbiased)
            parts = [estimates(both, left, right, unbiased), alone[left], alone[right]]
            known = self._sums.setdefault(name, [torch.zeros_like(part) for part in parts])
            self._sums[name] = [total + part for total, part in zip(known, parts, strict=True)]
        self.batches += 1

    def matrix(self, estimator: Estimator = "unbiased") -> Tensor:
        """Return the alignment of all pairs of layers.

        Args:
            estimator: As in `cka`.

        Returns:
            Shape (layers of the first, layers of the second), float64; NaN where a layer does not vary.

        Raises:
            BadData: If no batch was taken in.
        """
        if not self.batches:
            raise BadData("no batch was taken in", try_="update(...) first")
        both, one, other = self._sums[estimator]
        scale = one[:, None] * other
        return torch.where((one[:, None] > 0) & (other > 0), both / scale.clamp_min(0).sqrt(), float("nan"))


def _gram(x: Tensor) -> Tensor:
    rows = x.detach().flatten(1).double()
    rows = rows - rows.mean(0)
    return rows @ rows.T


def canonical_correlations(x: Tensor, y: Tensor) -> Tensor:
    """Return the canonical correlations of two sets of features, in falling order.

    Args:
        x: Features, shape (N, ...), N above the width.
        y: Other features of the same samples.

    Returns:
        As many as the smaller rank, in [0, 1].
    """
    a, b = _centred(x, y, least=2)
    return _cosines(_basis(a), _basis(b))[1]


def svcca(x: Tensor, y: Tensor, *, keep: float = 0.99) -> float:
    """Return the mean canonical correlation of the leading principal parts (Raghu et al., 2017).

    Args:
        x: Features, shape (N, ...).
        y: Other features of the same samples.
        keep: Share of the variance the principal parts keep, in (0, 1].

    Returns:
        In [0, 1]; NaN where one does not vary.
    """
    bases = [_basis(one, keep=keep) for one in _centred(x, y, least=2)]
    return float(_cosines(bases[0], bases[1])[1].mean())


def pwcca(x: Tensor, y: Tensor) -> float:
    """Return the mean canonical correlation, weighted by how much of the first features each takes part in.

    The weight of a canonical variate h is the sum over the features of |<h, x_j>| (Morcos et al., 2018). It is not
    symmetric.

    Args:
        x: Features, shape (N, ...).
        y: Other features of the same samples.

    Returns:
        In [0, 1]; NaN where one does not vary.
    """
    a, b = _centred(x, y, least=2)
    basis = _basis(a)
    turn, cosines = _cosines(basis, _basis(b))
    weights = ((basis @ turn).T @ a).abs().sum(1)
    return float((weights * cosines).sum() / weights.sum())


def _basis(x: Tensor, *, keep: float = 1.0) -> Tensor:
    """Return orthonormal columns that span the centred features, or the leading share of their variance."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    count = int((s > s.max() * max(x.shape) * torch.finfo(s.dtype).eps).sum())
    if keep < 1:
        share = s.square().cumsum(0) / s.square().sum()
        count = min(count, int((share < keep).sum()) + 1)
    return u[:, :count]


def _cosines(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the turn of the first basis to the canonical variates, and their correlations."""
    u, s, _ = torch.linalg.svd(a.T @ b, full_matrices=False)
    return u, s.clamp(0, 1)


class Moments:
    """Collect means, covariances and cross-covariances of two sets of units in one pass, in float64.

    Batches are merged by their means (Chan et al., 1983), so that large means cost no digits. Memory is the square of
    the width, whatever the number of samples.

    Examples:
        >>> seen = Moments()
        >>> x = torch.arange(6.0).view(3, 2)
        >>> seen.update(x, -x)
        >>> seen.correlations()
        tensor([[-1., -1.],
                [-1., -1.]], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0)
        self._scatter = torch.empty(0)
        self._split = 0

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in a batch.

        Args:
            x: Units of the first set, shape (N, P).
            y: Units of the second, shape (N, Q).

        Raises:
            BadData: If the shapes do not fit each other or earlier batches.
        """
        if len(x) != len(y) or (
            self.count and (self._split != x.shape[1] or len(self.mean) != x.shape[1] + y.shape[1])
        ):
            raise BadData("the units do not fit", expected="as many samples, the same units", found=(x.shape, y.shape))
        rows = torch.cat([x.detach().double(), y.detach().double()], 1)
        n, mean = len(rows), rows.mean(0)
        rows = rows - mean
        scatter = rows.T @ rows
        if not self.count:
            self.count, self.mean, self._scatter, self._split = n, mean, scatter, x.shape[1]
            return
        total, apart = self.count + n, mean - self.mean
        self._scatter += scatter + torch.outer(apart, apart) * (self.count * n / total)
        self.mean = self.mean + apart * (n / total)
        self.count = total

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the covariances of the first set, of the second, and between them.

        Raises:
            BadData: If there are fewer than two samples.
        """
        if self.count < 2:
            raise BadData("covariances need samples", expected="2 or more", found=self.count)
        whole, cut = self._scatter / (self.count - 1), self._split
        return whole[:cut, :cut], whole[cut:, cut:], whole[:cut, cut:]

    def correlations(self) -> Tensor:
        """Return the correlation of each unit of the first set with each of the second, NaN where one does not vary."""
        one, other, both = self.covariances()
        scale = (one.diagonal()[:, None] * other.diagonal()).sqrt()
        return torch.where(scale > 0, both / scale, float("nan")).clamp(-1, 1)
