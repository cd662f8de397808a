"""A linear output layer trained exactly by SGD at a cost that does not depend on the number of classes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import Diverged, UsageError

Sloped = tuple[Tensor, Tensor | float, Tensor | float, Tensor | float]
SphericalLoss = Callable[[Tensor, Tensor, Tensor, int], Sloped]
"""From (sum o, sum o^2, o_c, number of classes), each of shape (N,), to the losses and their three slopes."""

# U is checked against its inverse every so many steps; S and Q are computed anew every so many.
_CHECK_EVERY, _RENEW_EVERY = 10, 10_000
_LARGEST = 1e3


@functools.lru_cache(maxsize=256)
def number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a tensor, made once: torch would make it anew in every operation with a number.

    Args:
        value: The number.
        dtype: Its type.
        device: Where it lies.

    Returns:
        A scalar; do not change it.
    """
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


def squared_error(total: Tensor, squares: Tensor, target: Tensor, classes: int) -> Sloped:
    """Return half the squared distance of the outputs to the one-hot target, (sum o^2 - 2 o_c + 1) / 2.

    Args:
        total: Sum of the outputs, shape (N,).
        squares: Sum of their squares, shape (N,).
        target: Output of the target class, shape (N,).
        classes: Number of classes.

    Returns:
        The losses, shape (N,), and their slopes in sum, squares and target.
    """
    return (squares - 2 * target + 1) / 2, 0.0, 0.5, -1.0


def taylor_softmax(total: Tensor, squares: Tensor, target: Tensor, classes: int) -> Sloped:
    """Return the negative log-likelihood of the Taylor softmax, probabilities in proportion to 1 + o + o^2 / 2.

    Args:
        total: Sum of the outputs, shape (N,).
        squares: Sum of their squares, shape (N,).
        target: Output of the target class, shape (N,).
        classes: Number of classes.

    Returns:
        The losses, shape (N,), and their slopes in sum, squares and target.
    """
    whole, own = classes + total + squares / 2, 1 + target + target**2 / 2
    return (whole / own).log(), 1 / whole, 0.5 / whole, -(1 + target) / own


class SphericalLinear(nn.Module):
    """Hold a D x d output matrix W = V U + 1 w' whose exact SGD step costs O(m d^2), whatever D is.

    A spherical loss sees the outputs o = W h only through their sum, the sum of their squares and the target's, so
    S = W'1 and Q = W'W give loss and gradient without the other outputs, and the SGD step changes U, w, S and Q by
    terms of rank m (the batch size) and the target rows of V. U's inverse follows by the Woodbury identity.

    The matrix is no `nn.Parameter`: after ``head(h, target).backward()`` call `step`. Gradients of several backward
    passes add up, and the factor of a scaled loss is taken into account. Only plain SGD with weight decay has this
    form; momentum has not.

    Differs from the paper: when U has parted from its inverse or grown large, and every 10,000 steps, U is multiplied
    into V and all factors are computed anew (O(D d^2)), so that rounding cannot build up.

    Args:
        in_features: Number d of inputs.
        out_features: Number D of classes.
        loss: The spherical loss; `ZLoss` has one, `squared_error` and `taylor_softmax` are others.
        dtype: Type of V; the d x d factors have at least single precision.
        generator: Source of the initial weights, uniform within 1 / sqrt(d) of zero.

    Examples:
        >>> from nervure.losses.z_loss import ZLoss
        >>> head = SphericalLinear(8, 1000, loss=ZLoss().spherical)
        >>> h = torch.randn(4, 8, requires_grad=True)
        >>> head(h, torch.tensor([1, 5, 5, 999])).backward()
        >>> head.step(lr=0.1)
        >>> head.logits(h).shape
        torch.Size([4, 1000])
    """

    V: Tensor
    U: Tensor
    inverse: Tensor
    shift: Tensor
    S: Tensor
    Q: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        loss: SphericalLoss,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.steps = loss, 0
        self._pending: list[tuple[Tensor, ...]] = []
        bound = 1 / math.sqrt(in_features)
        weight = torch.empty(out_features, in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
        for name in ("V", "U", "inverse", "shift", "S", "Q"):
            self.register_buffer(name, torch.empty(0))
        self.set_weight(weight)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Set the matrix, with fresh factors; it is copied.

        Args:
            weight: The matrix, shape (D, d).
        """
        kind = torch.float64 if weight.dtype is torch.float64 else torch.float32
        self.V = weight.detach().clone()
        self.U = torch.eye(weight.shape[1], dtype=kind, device=weight.device)
        self.inverse, self.shift = self.U.clone(), torch.zeros_like(self.U[0])
        S, Q = torch.zeros_like(self.shift, dtype=torch.float64), torch.zeros_like(self.U, dtype=torch.float64)
        for rows in weight.split(65536):
            S += rows.sum(0, dtype=torch.float64)
            wide = rows.to(torch.float64)
            Q.addmm_(wide.T, wide)
        self.S, self.Q = S.to(kind), Q.to(kind)

    @property
    def weight(self) -> Tensor:
        """Return the dense matrix, shape (D, d)."""
        dense = torch.empty_like(self.V)
        for rows, out in zip(self.V.split(65536), dense.split(65536), strict=True):
            out.copy_(rows.to(self.U.dtype) @ self.U + self.shift)
        return dense

    def logits(self, h: Tensor) -> Tensor:
        """Return the outputs of all classes: O(D d) a sample, for prediction.

        Args:
            h: Inputs, shape (N, d).

        Returns:
            The outputs, shape (N, D).
        """
        wide = h.to(self.U.dtype)
        return (wide @ self.U.T).to(self.V.dtype) @ self.V.T + (wide @ self.shift)[:, None].to(self.V.dtype)

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of a batch, its gradient with respect to h exact.

        Args:
            h: Inputs, shape (m, d).
            target: Class numbers, shape (m,).

        Returns:
            A scalar.

        Raises:
            UsageError: If the shapes do not fit.
        """
        if h.ndim != 2 or target.shape != h.shape[:1] or not len(h):
            raise UsageError(
                "inputs and targets do not fit", expected="(m, d) and (m,)", found=f"{h.shape} and {target.shape}"
            )
        wide = h.to(self.U.dtype)
        if torch.is_grad_enabled() and not wide.requires_grad:
            wide = wide.detach().requires_grad_()
        loss: Tensor = _MeanLoss.apply(wide, target, self)
        return loss.to(h.dtype)

    @torch.no_grad()
    def step(self, lr: float, *, weight_decay: float = 0.0) -> None:
        """Take W <- W - lr (gradient + weight_decay W) with the gradients since the last step.

        Args:
            lr: Learning rate, at least 0.
            weight_decay: L2 coefficient, at least 0.

        Raises:
            UsageError: If no backward pass was made.
            Diverged: If the step would make the matrix lose rank or overflow; it is left as it was.
        """
        done = self._pending.copy()
        self._pending.clear()
        if not done:
            raise UsageError("there is no gradient to step with", try_="head(h, target).backward() first")
        H, target, half, whole, hS, slopes = done[0] if len(done) == 1 else _joined(done)
        U, inverse, shift, S, Q, keep = self.U, self.inverse, self.shift, self.S, self.Q, 1 - lr * weight_decay
        a_s, a_q, a_c = slopes.unbind()
        # W <- W B - lr (1 g' + E): B = keep (I - H' diag(c) H), E the rows a_c h' at the targets.
        c = a_q * number(2 * lr / keep, a_q.dtype, a_q.device)
        middle = torch.addcmul(_identity(len(H), H.dtype, H.device), H @ H.T, c, value=-1)
        # By Woodbury B^-1 = (I + H' diag(c) middle^-1 H) / keep, so the new inverse needs only H times the old one.
        solved, info = torch.linalg.solve_ex(middle, H @ inverse)
        if int(info) or not math.isfinite(float(solved.sum())):
            raise Diverged(self.steps, float("inf"), try_="a lower learning rate")
        sums = torch.stack((a_s, a_c, a_q * hS, c * (H @ shift))) @ H
        to_S, to_Y, to_shift = (_mixture(lr, keep, len(self.V), sums.dtype, sums.device) @ sums).unbind()
        # Q changes by H'Y + Y'H. Within a batch samples of one class share a row, so E'E has a term for each such pair.
        same = torch.where(target.unsqueeze(1) == target, a_c, number(0.0, a_c.dtype, a_c.device))
        pairs = (half @ H.T).mul_(a_q).addcmul_(same, a_c.unsqueeze(1), value=0.25)
        Y = torch.addmm(whole, pairs, H, beta=-lr * keep, alpha=2 * lr**2)
        Y.addr_(a_s, to_Y.sub_(S, alpha=lr * keep))
        change = H.T @ Y
        torch.add(change + change.T, Q, alpha=keep**2, out=Q)
        torch.add(to_S, S, alpha=keep, out=S)
        X = H.T * c
        U.addmm_(U @ X, H, beta=keep, alpha=-keep)
        inverse.addmm_(X, solved, beta=1 / keep, alpha=1 / keep)
        torch.add(to_shift, shift, alpha=keep, out=shift)
        self.V.index_add_(0, target, (a_c.unsqueeze(1) * solved).to(self.V.dtype), alpha=-lr / keep)
        self.steps += 1
        if self.steps % _CHECK_EVERY == 0:
            self._renew_if_needed()

    def _renew_if_needed(self) -> None:
        """Multiply U into V where rounding has parted U from its inverse, or either has grown large."""
        drift = (self.U @ self.inverse).sub_(_identity(len(self.U), self.U.dtype, self.U.device))
        largest = max(float(self.U.abs().amax()), float(self.inverse.abs().amax()))
        allowed = 1e-4 if self.U.dtype is torch.float32 else 1e-10
        if float(drift.abs().amax()) > allowed or largest > _LARGEST or self.steps % _RENEW_EVERY == 0:
            self.set_weight(self.weight)


class _MeanLoss(torch.autograd.Function):
    """Give h its gradient, and keep what the step of W needs once it is known how the loss was scaled."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, target: Tensor, head: SphericalLinear) -> Tensor:
        Q, S, V = head.Q, head.S, head.V
        seen = h.new_empty(2, *h.shape)  # HQ, and the rows of the targets
        HQ, rows = seen.unbind()
        torch.mm(h, Q, out=HQ)
        torch.addmm(head.shift, V.index_select(0, target).to(h.dtype), head.U, out=rows)
        hS = h @ S
        squares, own = (seen * h).sum(2).unbind()
        losses, *slopes = head.loss(hS, squares, own, len(V))
        ctx.head, ctx.S, ctx.version = head, S, S._version
        ctx.save_for_backward(h, target, HQ, rows, hS, _rows(slopes, losses))
        return losses.sum() * number(1 / len(h), h.dtype, h.device)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        h, target, HQ, rows, hS, slopes = ctx.saved_tensors
        if ctx.S is not ctx.head.S or ctx.version != ctx.S._version:
            raise UsageError("the output layer has changed since the loss was computed", try_="backward before step")
        slopes = slopes * (outer[0] * number(1 / len(h), h.dtype, h.device))
        _, a_q, a_c = slopes.unsqueeze(2).unbind()
        by_square = HQ * a_q
        half = torch.addcmul(by_square, rows, a_c)
        whole = half + by_square
        ctx.head._pending.append((h, target, half, whole, hS, slopes))
        return torch.addr(whole, slopes[0], ctx.S), None, None


def _joined(done: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return the parts of several backward passes as those of one; the slopes have the samples last."""
    *parts, slopes = zip(*done, strict=True)
    return [*(torch.cat(part) for part in parts), torch.cat(slopes, 1)]


@functools.lru_cache(maxsize=8)
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.eye(size, dtype=dtype, device=device)


@functools.lru_cache(maxsize=8)
def _mixture(lr: float, keep: float, classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return how the sums g, e, s and w over a batch enter the changes of S, of Y's rows and of the shift."""
    with torch.inference_mode(False):
        rows = [[-lr * classes, -lr, -2 * lr, 0], [lr**2 * classes / 2, lr**2, 2 * lr**2, 0], [-lr, 0, 0, -keep]]
        return torch.tensor(rows, dtype=dtype, device=device)


def _rows(slopes: list[Tensor | float], like: Tensor) -> Tensor:
    """Return the three slopes as rows, numbers spread over the samples."""
    whole = (slope if isinstance(slope, Tensor) else like.new_full(like.shape, slope) for slope in slopes)
    return torch.stack([slope if slope.dtype is like.dtype else slope.to(like.dtype) for slope in whole])
