"""A linear output layer trained exactly by SGD at a cost that does not depend on the number of classes."""

from __future__ import annotations

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
        done, self._pending = self._pending, []
        if not done:
            raise UsageError("there is no gradient to step with", try_="head(h, target).backward() first")
        parts = done[0] if len(done) == 1 else [torch.cat(part) for part in zip(*done, strict=True)]
        H, target, rows, HQ, hS, a_s, a_q, a_c = parts
        keep = 1 - lr * weight_decay
        # W <- W B - lr (1 g' + E): B = keep (I - H' diag(c) H), E the rows a_c h' at the targets.
        c = 2 * lr / keep * a_q
        middle = (H @ H.T).mul_(-c)
        middle.diagonal().add_(1)
        # By Woodbury B^-1 = (I + H' diag(c) middle^-1 H) / keep, so the new inverse needs only H times the old one.
        solved, info = torch.linalg.solve_ex(middle, H @ self.inverse)
        if int(info) or not math.isfinite(float(solved.sum())):
            raise Diverged(self.steps, float("inf"), try_="a lower learning rate")
        sums = H.T @ torch.stack([a_s, a_c, a_q * hS, c * (H @ self.shift)], 1)
        g, e, s, w = sums.unbind(1)
        self._update_moments(H, target, rows, HQ, (a_s, a_q, a_c), (g, e, s), lr, keep)
        X = H.T * c
        self.U.addmm_(self.U @ X, H, beta=keep, alpha=-keep)
        self.inverse.addmm_(X, solved, beta=1 / keep, alpha=1 / keep)
        self.shift = keep * (self.shift - w) - lr * g
        self.V.index_add_(0, target, ((-lr / keep * a_c)[:, None] * solved).to(self.V.dtype))
        self.steps += 1
        if self.steps % _CHECK_EVERY == 0:
            self._renew_if_needed()

    def _update_moments(
        self,
        H: Tensor,
        target: Tensor,
        rows: Tensor,
        HQ: Tensor,
        slopes: tuple[Tensor, Tensor, Tensor],
        sums: tuple[Tensor, Tensor, Tensor],
        lr: float,
        keep: float,
    ) -> None:
        """Change S and Q as the step changes W; Q by H'Y + Y'H, with everything of rank m in Y."""
        D = len(self.V)
        (a_s, a_q, a_c), (g, e, s) = slopes, sums
        S = keep * self.S - 2 * lr * s
        half = torch.addcmul(a_q[:, None] * HQ, a_c[:, None], rows)
        pairs = (half @ H.T).mul_(a_q)
        # Within a batch samples of one class share a row, so E'E has a term for each such pair.
        pairs += torch.outer(a_c, a_c / 4).mul_(target[:, None] == target)
        Y = torch.addcmul(half, a_q[:, None], HQ).addmm_(pairs, H, beta=-lr * keep, alpha=2 * lr**2)
        Y.addr_(a_s, lr**2 * (D / 2 * g + e) - lr * S)
        change = H.T @ Y
        self.Q.mul_(keep**2).add_(change).add_(change.T)
        self.S = S - lr * (D * g + e)

    def _renew_if_needed(self) -> None:
        """Multiply U into V where rounding has parted U from its inverse, or either has grown large."""
        drift = (self.U @ self.inverse).sub_(torch.eye(len(self.U), dtype=self.U.dtype, device=self.U.device))
        largest = max(float(self.U.abs().amax()), float(self.inverse.abs().amax()))
        allowed = 1e-4 if self.U.dtype is torch.float32 else 1e-10
        if float(drift.abs().amax()) > allowed or largest > _LARGEST or self.steps % _RENEW_EVERY == 0:
            self.set_weight(self.weight)


class _MeanLoss(torch.autograd.Function):
    """Give h its gradient, and keep what the step of W needs once it is known how the loss was scaled."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, target: Tensor, head: SphericalLinear) -> Tensor:
        Q, S = head.Q, head.S
        rows = torch.addmm(head.shift, head.V.index_select(0, target).to(h.dtype), head.U)
        HQ, hS = h @ Q, h @ S
        losses, *slopes = head.loss(hS, (HQ * h).sum(1), (rows * h).sum(1), len(head.V))
        ctx.head, ctx.S = head, S
        ctx.save_for_backward(h, target, rows, HQ, hS, _rows(slopes, losses))
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        h, target, rows, HQ, hS, slopes = ctx.saved_tensors
        a_s, a_q, a_c = slopes * (outer[0] / len(h))
        ctx.head._pending.append((h, target, rows, HQ, hS, a_s, a_q, a_c))
        grad = torch.addcmul((2 * a_q)[:, None] * HQ, a_c[:, None], rows).addr_(a_s, ctx.S)
        return grad, None, None


def _rows(slopes: list[Tensor | float], like: Tensor) -> Tensor:
    """Return the three slopes as rows, numbers spread over the samples."""
    whole = (slope if isinstance(slope, Tensor) else like.new_full(like.shape, slope) for slope in slopes)
    return torch.stack([slope.to(like.dtype) for slope in whole])
