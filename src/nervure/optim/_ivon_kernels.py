"""The two passes of IVON over flat memory: draw the shift of the weights, and move Hessian, momentum and mean.

Each is written twice: in torch's in-place operations on pieces that stay in a core's cache, and as one expression that
torch.compile turns into a single loop. Both draw the same words and agree to rounding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nervure.core import noise

PIECE = 1 << 16
"""Elements of an update that are worked on at a time where nothing is compiled."""

HALF = 1 << 10
"""Words of a stripe: twice as many elements, the first numbers of its words before the second ones."""


class Rule(NamedTuple):
    """The numbers of an update: `debias` is 1 - beta1^t, the gains are 1 - beta1 and 1 - beta2."""

    ess: float
    delta: float
    momentum_gain: float
    hess_gain: float
    debias: float
    lr: float
    clip: float


class Kernels(NamedTuple):
    """Both passes.

    Attributes:
        whole: Whether a call costs so much that it should serve all the memory there is.
        draw: Called with the shift to fill, the Hessian, the state of the noise, ess and delta.
        update: Called with the rule, Hessian, momentum, mean, two factors of shift times gradient, and the gradient; it
            leaves the change of the mean in the first factor.
    """

    whole: bool
    draw: Callable[[Tensor, Tensor, int, float, float], None]
    update: Callable[[Rule, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _draw(shift: Tensor, hess: Tensor, state: int, ess: float, delta: float) -> None:
    stripes, hessians = shift.view(-1, 2, HALF), hess.view(-1, 2, HALF)
    for start, stop, words in noise.chunks(state, len(shift) // 2, shift.device):
        square, angle = noise.polar(words.view(-1, HALF))
        square.div_(ess)
        rows = slice(start // HALF, stop // HALF)
        for part, wave in enumerate((torch.cos, torch.sin)):
            spread = torch.div(square, hessians[rows, part] + delta).sqrt_()
            torch.mul(wave(angle), spread, out=stripes[rows, part])


def _update(
    rule: Rule, hess: Tensor, momentum: Tensor, mean: Tensor, left: Tensor, right: Tensor, grad: Tensor
) -> None:
    rows = (hess, momentum, mean, left, right, grad)
    for pieces in zip(*(row.split(PIECE) for row in rows), strict=True):
        _update_piece(rule, *pieces)


def _update_piece(
    rule: Rule, hess: Tensor, momentum: Tensor, mean: Tensor, left: Tensor, right: Tensor, grad: Tensor
) -> None:
    left.mul_(right)
    precision = hess + rule.delta
    # f is h minus its estimate ess (h + delta) shift g.
    f = torch.addcmul(hess, left, precision, value=-rule.ess, out=left)
    hess.add_(f, alpha=-rule.hess_gain)
    hess.addcdiv_(f.mul_(f), precision, value=0.5 * rule.hess_gain**2)
    momentum.lerp_(grad, rule.momentum_gain)
    torch.add(hess, rule.delta, out=precision)
    push = torch.add(momentum, mean, alpha=rule.delta * rule.debias, out=left)
    push.div_(precision)
    if rule.clip < float("inf"):
        push.clamp_(-rule.clip * rule.debias, rule.clip * rule.debias)
    push.mul_(-rule.lr / rule.debias)


EAGER = Kernels(whole=False, draw=_draw, update=_update)


_GAMMA_INVERSE = pow(noise.GAMMA, -1, 1 << 64)


def _draw_whole(first: Tensor, second: Tensor, low: Tensor, high: Tensor, place: Tensor, numbers: Tensor) -> None:
    variance, delta = numbers.unbind()
    # The place is added first: index times gamma alone would be a C++ index expression, whose overflow is undefined.
    index = torch.arange(first.numel(), device=first.device).view(first.shape)
    square, angle = noise.polar(noise.mix_((index + place) * noise.GAMMA))
    square = square * variance
    first.copy_(angle.cos() * (square / (low + delta)).sqrt())
    second.copy_(angle.sin() * (square / (high + delta)).sqrt())


def _update_whole(
    numbers: Tensor, hess: Tensor, momentum: Tensor, mean: Tensor, left: Tensor, right: Tensor, grad: Tensor
) -> None:
    ess, delta, momentum_gain, hess_gain, debias, lr, clip = numbers.unbind()
    precision = hess + delta
    f = hess - ess * (left * right) * precision
    momentum.lerp_(grad, momentum_gain)
    hess.sub_(hess_gain * f).add_(0.5 * hess_gain**2 * (f * f / precision))
    push = (momentum * (1 / debias) + delta * mean) / (hess + delta)
    left.copy_(-lr * push.clamp(-clip, clip))


@functools.cache
def _compiled(function: Callable[..., None]) -> Any:
    # Sizes are dynamic and numbers come as tensors, so that no layer and no learning rate compiles it anew.
    return torch.compile(function, dynamic=True)


def _draw_fused(shift: Tensor, hess: Tensor, state: int, ess: float, delta: float) -> None:
    stripes, hessians = shift.view(-1, 2, HALF), hess.view(-1, 2, HALF)
    place = torch.tensor(noise.signed(state * _GAMMA_INVERSE + 1), device=shift.device)
    numbers = shift.new_tensor([1 / ess, delta])
    _compiled(_draw_whole)(stripes[:, 0], stripes[:, 1], hessians[:, 0], hessians[:, 1], place, numbers)


def _update_fused(
    rule: Rule, hess: Tensor, momentum: Tensor, mean: Tensor, left: Tensor, right: Tensor, grad: Tensor
) -> None:
    _compiled(_update_whole)(hess.new_tensor(rule), hess, momentum, mean, left, right, grad)


FUSED = Kernels(whole=True, draw=_draw_fused, update=_update_fused)


@functools.cache
def _obstacle(device: str, dtype: torch.dtype) -> str | None:
    """Compile both passes and compare them with the others on memory nobody needs; return what is wrong, or None."""
    given = Rule(ess=7.0, delta=0.5, momentum_gain=0.1, hess_gain=0.1, debias=0.5, lr=0.1, clip=1.0)
    made = []
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler warns of its own past when it is first loaded
            for one in (EAGER, FUSED):
                # Parts of rows of different lengths, as the real ones: a compiler would take equal lengths for a rule.
                rows = [torch.ones((5 + more) * HALF, device=device, dtype=dtype)[: 4 * HALF] for more in range(6)]
                one.draw(rows[3], rows[0], -1, given.ess, given.delta)
                one.update(given, *rows)
                made.append(torch.stack(rows))
    except (RuntimeError, OSError, ImportError) as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    equal = torch.allclose(made[0], made[1], rtol=1e-4, atol=1e-5)
    return None if equal else "what the compiler made gives other numbers"


def choose(device: torch.device, dtype: torch.dtype, *, fused: bool) -> Kernels:
    """Return the compiled passes if they are asked for and this machine can compile them, else the others.

    Args:
        device: Where the memory lies.
        dtype: Its type.
        fused: Whether compiled passes are wanted; a warning says where they cannot be had.

    Returns:
        The passes.
    """
    if not fused:
        return EAGER
    obstacle = _obstacle(device.type, dtype)
    if obstacle is not None:
        warnings.warn(f"IVON's fused passes could not be compiled and run unfused: {obstacle}", stacklevel=2)
        return EAGER
    return FUSED
