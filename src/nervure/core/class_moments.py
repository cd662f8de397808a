"""Means and covariances of features class by class, in one pass over batches, and errors by leaving groups out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy import special
from torch import Tensor

from nervure._kit import BadData, UsageError


@dataclass(frozen=True)
class Estimate:
    """Hold a number and its standard error.

    Args:
        value: The number.
        error: Its standard error; None where too few samples leave it unknown.
        freedom: Degrees of freedom of the error.
    """

    value: float
    error: float | None
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval by Student's t; the whole line where the error is not known."""
        if self.error is None:
            return -float("inf"), float("inf")
        width = float(special.stdtrit(self.freedom, 0.975)) * self.error
        return self.value - width, self.value + width


class ClassMoments:
    """Collect counts, means and scatters of the classes in one pass, in float64.

    Batches are merged by their means (Chan et al., 1983), so that large means cost no digits. Memory is classes times
    width, and with ``covariance=True`` the square of the width, whatever the number of samples.

    Args:
        covariance: Whether the pooled covariance within the classes is kept.

    Examples:
        >>> seen = ClassMoments()
        >>> seen.update(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 3]))
        >>> seen.labels.tolist(), seen.means.flatten().tolist(), seen.variances.tolist()
        ([0, 3], [1.0, 5.0], [1.0, 0.0])
    """

    def __init__(self, *, covariance: bool = False) -> None:
        self.covariance = covariance
        self.labels = torch.empty(0, dtype=torch.long)
        self.counts = self._scatters = torch.empty(0, dtype=torch.float64)
        self.means = self._pooled = torch.empty(0, 0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            features: Shape (N, F).
            labels: Whole numbers from 0, shape (N,); samples of other labels than these are passed over.

        Raises:
            BadData: If the shapes do not fit each other or earlier batches, or the labels are no whole numbers.
        """
        if features.ndim != 2 or labels.shape != features.shape[:1] or labels.is_floating_point():
            raise BadData(
                "features and labels do not fit", expected="(N, F) and N whole numbers", found=(features.shape, labels)
            )
        labels = labels.to(features.device)
        kept = labels >= 0
        if not bool(kept.any()):
            return
        rows = features.detach()[kept].double()
        known, place, counts = torch.unique(labels[kept].long(), return_inverse=True, return_counts=True)
        means = rows.new_zeros(len(known), rows.shape[1]).index_add_(0, place, rows) / counts[:, None]
        rows = rows - means[place]
        part = ClassMoments(covariance=self.covariance)
        part.labels, part.counts, part.means = known, counts.double(), means
        part._scatters = rows.new_zeros(len(known)).index_add_(0, place, rows.square().sum(1))
        part._pooled = rows.T @ rows if self.covariance else part._pooled
        self.merge(part)

    @torch.no_grad()
    def merge(self, other: ClassMoments) -> None:
        """Take in the samples of another collection.

        Args:
            other: Moments of features as wide.

        Raises:
            BadData: If the features differ in width.
        """
        if not len(other.labels):
            return
        if not len(self.labels):
            self.labels, self.counts, self.means = other.labels, other.counts, other.means
            self._scatters, self._pooled = other._scatters, other._pooled
            return
        if self.means.shape[1] != other.means.shape[1]:
            raise BadData("the features differ in width", expected=self.means.shape[1], found=other.means.shape[1])
        known, place = torch.unique(torch.cat([self.labels, other.labels]), return_inverse=True)
        (n, scatters, means), (m, added, beside) = (
            tuple(value.new_zeros(len(known), *value.shape[1:]).index_copy_(0, at, value) for value in values)
            for at, values in (
                (place[: len(self.labels)], (self.counts, self._scatters, self.means)),
                (place[len(self.labels) :], (other.counts, other._scatters, other.means)),
            )
        )
        apart, weight = beside - means, n * m / (n + m)
        if self.covariance:
            self._pooled = self._pooled + other._pooled + (apart * weight[:, None]).T @ apart
        self.labels, self.counts = known, n + m
        self._scatters = scatters + added + weight * apart.square().sum(1)
        self.means = means + apart * (m / (n + m))[:, None]

    @property
    def variances(self) -> Tensor:
        """The mean squared distance to the class mean, shape (C,)."""
        return self._scatters / self.counts

    def centred(self) -> Tensor:
        """Return the class means less their mean, every class counting alike, shape (C, F)."""
        return self.means - self.means.mean(0)

    def within(self) -> Tensor:
        """Return the mean over all samples of (f - mu_c)(f - mu_c)', shape (F, F).

        Raises:
            UsageError: If covariances are not kept.
        """
        if not self.covariance or not len(self.labels):
            raise UsageError("no covariance was kept", try_="ClassMoments(covariance=True) and a batch")
        return self._pooled / self.counts.sum()

    def between(self) -> Tensor:
        """Return the mean over the classes of the outer products of the centred means, shape (F, F)."""
        centred = self.centred()
        return centred.T @ centred / len(centred)


class DealtMoments:
    """Deal the samples of every class to groups in turn and keep each group's moments.

    What is computed from all samples gets a standard error by leaving out one group at a time.

    Args:
        groups: How many groups, at least 2.
        covariance: As in `ClassMoments`; memory is that of as many.

    Raises:
        UsageError: If there are too few groups.
    """

    def __init__(self, *, groups: int = 10, covariance: bool = False) -> None:
        if groups < 2:
            raise UsageError("too few groups to leave one out", expected="2 or more", found=groups)
        self.parts = [ClassMoments(covariance=covariance) for _ in range(groups)]
        self._dealt: dict[int, int] = {}

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            features: Shape (N, F).
            labels: As in `ClassMoments.update`.
        """
        known, place, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        order = place.argsort(stable=True)
        rank = torch.empty_like(place)
        rank[order] = torch.arange(len(place), device=place.device) - (counts.cumsum(0) - counts).repeat_interleave(
            counts
        )
        # Classes begin at different groups, so that a few samples of each do not crowd the first.
        starts = [self._dealt.get(label, label) for label in known.tolist()]
        group = (rank + torch.tensor(starts, device=place.device)[place]) % len(self.parts)
        for number, part in enumerate(self.parts):
            chosen = group == number
            part.update(features[chosen], labels[chosen])
        for label, start, count in zip(known.tolist(), starts, counts.tolist(), strict=True):
            self._dealt[label] = start + count

    def merged(self, *, without: int | None = None) -> ClassMoments:
        """Return the moments of all samples, or of those outside one group.

        Args:
            without: The group left out.

        Returns:
            The moments.
        """
        whole = ClassMoments(covariance=self.parts[0].covariance)
        for number, part in enumerate(self.parts):
            if number != without:
                whole.merge(part)
        return whole

    def estimates(self, statistic: Callable[[ClassMoments], Sequence[float]]) -> list[Estimate]:
        """Return numbers computed from all samples with their jackknife errors.

        Args:
            statistic: From moments to numbers, always as many.

        Returns:
            One estimate a number.
        """
        values = statistic(self.merged())
        filled = [number for number, part in enumerate(self.parts) if len(part.labels)]
        left = [statistic(self.merged(without=number)) for number in filled] if len(filled) > 1 else []
        found = []
        for place, value in enumerate(values):
            around = torch.tensor([one[place] for one in left], dtype=torch.float64)
            known = len(around) > 1 and bool(around.isfinite().all())
            error = float(((len(around) - 1) * around.var(correction=0)).sqrt()) if known else None
            found.append(Estimate(float(value), error, max(1, len(around) - 1)))
        return found
