"""The two passes of IVON over flat memory: draw the shift of the weights, and move Hessian, momentum and mean.

Each is written twice: in torch's in-place operations on pieces that stay in a core's cache, and as one expression that
torch's compiler turns into a single loop. Both draw the same words and agree to rounding.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
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
    """Both passes, and their union.

    Attributes:
        whole: Whether a call costs so much that it should serve all the memory there is.
        draw: Called with the shift to fill, the Hessian, the state of the noise, ess and delta.
        update: Called with the rule, Hessian, momentum, mean, two factors of shift times gradient, and the gradient; it
            leaves the change of the mean in the first factor.
        advance: Called with the rule, whether the mean still has the shift added to it, Hessian, momentum, mean, shift,
            gradient and the state of the noise; it updates, leaves the change of the mean in the gradient, and draws
            the next shift by the way, while the processor waits for memory. None where that gains nothing.
    """

    whole: bool
    draw: Callable[[Tensor, Tensor, int, float, float], None]
    update: Callable[[Rule, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    advance: Callable[[Rule, bool, Tensor, Tensor, Tensor, Tensor, Tensor, int], None] | None


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


EAGER = Kernels(whole=False, draw=_draw, update=_update, advance=None)


# Coefficients of sin t / t and cos t in t^2, for |t| <= pi / 4: truncation below single precision's rounding.
_SIN = (1.0, -1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4)
_COS = (1.0, -0.5, 4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5)


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    *lower, last = coefficients
    return functools.reduce(lambda value, lesser: value * x + lesser, reversed(lower), torch.full_like(x, last))


def _waves(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles that `noise.polar` gives: inlined, where a library's would be called."""
    quarter = words.to(torch.float32) * (math.pi / 2**65)
    square = quarter * quarter
    sine, cosine = quarter * _horner(_SIN, square), _horner(_COS, square)
    for _ in range(2):  # the angle doubles
        sine, cosine = 2 * sine * cosine, 1 - 2 * sine * sine
    return cosine, sine


def _shifts(steps: Tensor, starts: Tensor, variance: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    words = noise.mix_(steps + starts)
    square = noise.polar(words)[0] * variance
    cosine, sine = _waves(words)
    return cosine * (square * low).sqrt(), sine * (square * high).sqrt()


def _moved(
    numbers: Tensor, hess: Tensor, momentum: Tensor, mean: Tensor, product: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Hessian, momentum, the change of the mean and the new 1 / (h + delta)."""
    ess, delta, momentum_gain, hess_gain, curving, bias, lr, clip, *_ = numbers.unbind()
    precision = hess + delta
    f = hess - ess * product * precision
    momentum = momentum + momentum_gain * (grad - momentum)
    hess = hess - hess_gain * f + curving * (f * f / precision)
    inverse = 1 / (hess + delta)
    push = (momentum * bias + delta * mean) * inverse
    return hess, momentum, -lr * push.clamp(-clip, clip), inverse


def _draw_whole(
    numbers: Tensor, steps: Tensor, starts: Tensor, low: Tensor, high: Tensor, first: Tensor, second: Tensor
) -> None:
    variance, delta = numbers.unbind()
    one, two = _shifts(steps, starts, variance, 1 / (low + delta), 1 / (high + delta))
    first.copy_(one)
    second.copy_(two)


def _update_whole(
    numbers: Tensor, hess: Tensor, momentum: Tensor, mean: Tensor, left: Tensor, right: Tensor, grad: Tensor
) -> None:
    new_hess, new_momentum, change, _ = _moved(numbers, hess, momentum, mean, left * right, grad)
    hess.copy_(new_hess)
    momentum.copy_(new_momentum)
    left.copy_(change)


def _advance_whole(numbers: Tensor, steps: Tensor, starts: Tensor, *halves: Tensor) -> None:
    both = halves[::2], halves[1::2]
    variance, shifted = numbers[-2:].unbind()
    moved = [_moved(numbers, h, v, mean - shifted * shift, shift * grad, grad) for h, v, mean, shift, grad in both]
    shifts = _shifts(steps, starts, variance, *(inverse for *_, inverse in moved))
    for (hess, momentum, _, shift, grad), (*new, _), new_shift in zip(both, moved, shifts, strict=True):
        for row, value in zip((hess, momentum, grad, shift), (*new, new_shift), strict=True):
            row.copy_(value)


def _call(function: Callable[..., None], *tensors: Tensor) -> None:
    rows = tensors[-1]
    _compiled(function, rows.device, rows.dtype, torch.get_num_threads())(*tensors)


@functools.cache
def _compiled(function: Callable[..., None], device: torch.device, dtype: torch.dtype, threads: int) -> Any:
    """Compile without torch.compile's guards, which cost more than a small model's whole pass.

    They would watch what is fixed here: the arguments' number, types and device. Sizes are symbols.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    count = 3
    rows = [torch.ones(2 * HALF * count, device=device, dtype=dtype) for _ in range(6)]
    stream = _stream(0, rows[0])
    examples: dict[Any, tuple[Tensor, ...]] = {
        _draw_whole: (rows[0].new_ones(2), *stream, *_halves(*rows[:2])),
        _update_whole: (rows[0].new_ones(10), *rows),
        _advance_whole: (rows[0].new_ones(10), *stream, *_halves(*rows[:5])),
    }
    graph = make_fx(function, tracing_mode="symbolic")(*examples[function])
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with tracing(TracingContext(inputs[0].fake_mode)):
        return compile_fx(graph, inputs)


def _halves(*rows: Tensor) -> list[Tensor]:
    return [half for row in rows for half in row.view(-1, 2, HALF).unbind(1)]


@functools.cache
def _stripes(count: int, device: torch.device) -> Tensor:
    """Return what a state grows by until each stripe."""
    with torch.inference_mode(False):
        return torch.arange(count, device=device).mul_(noise.signed(HALF * noise.GAMMA)).unsqueeze(1)


def _stream(state: int, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two terms whose sums are the states of all words."""
    return noise.steps(shift.device)[:HALF], _stripes(len(shift) // (2 * HALF), shift.device) + noise.signed(state)


def _numbers(rule: Rule, like: Tensor, *, shifted: bool = False) -> Tensor:
    ess, delta, momentum_gain, hess_gain, debias, lr, clip = rule
    derived = (0.5 * hess_gain**2, 1 / debias)
    return like.new_tensor((ess, delta, momentum_gain, hess_gain, *derived, lr, clip, 1 / ess, float(shifted)))


def _draw_fused(shift: Tensor, hess: Tensor, state: int, ess: float, delta: float) -> None:
    _call(_draw_whole, shift.new_tensor((1 / ess, delta)), *_stream(state, shift), *_halves(hess, shift))


def _update_fused(
    rule: Rule, hess: Tensor, momentum: Tensor, mean: Tensor, left: Tensor, right: Tensor, grad: Tensor
) -> None:
    _call(_update_whole, _numbers(rule, hess), hess, momentum, mean, left, right, grad)


def _advance_fused(
    rule: Rule, shifted: bool, hess: Tensor, momentum: Tensor, mean: Tensor, shift: Tensor, grad: Tensor, state: int
) -> None:
    rows = _halves(hess, momentum, mean, shift, grad)
    _call(_advance_whole, _numbers(rule, hess, shifted=shifted), *_stream(state, shift), *rows)


FUSED = Kernels(whole=True, draw=_draw_fused, update=_update_fused, advance=_advance_fused)


def _tried(kernels: Kernels, device: str, dtype: torch.dtype) -> Tensor:
    """Return what both passes and their union make of memory nobody needs."""
    rule = Rule(ess=7.0, delta=0.5, momentum_gain=0.1, hess_gain=0.1, debias=0.5, lr=0.1, clip=1.0)
    rows = [torch.ones(4 * HALF, device=device, dtype=dtype) for _ in range(6)]
    hess, momentum, mean, shift, factor, grad = rows
    kernels.draw(shift, hess, -1, rule.ess, rule.delta)
    kernels.update(rule, *rows)
    factor.copy_(shift)  # the change
    if kernels.advance is not None:
        mean += shift
        kernels.advance(rule, True, hess, momentum, mean, shift, grad, 5)
        mean.fill_(1)
    else:
        kernels.update(rule, hess, momentum, mean, shift, grad, grad)
        grad.copy_(shift)
        kernels.draw(shift, hess, 5, rule.ess, rule.delta)
    return torch.stack(rows)


@functools.cache
def _obstacle(device: str, dtype: torch.dtype) -> str | None:
    """Compile the passes and compare them with the others; return what is wrong, or None."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler warns of its own past when it is first loaded
            made = [_tried(kernels, device, dtype) for kernels in (EAGER, FUSED)]
    except (RuntimeError, OSError, ImportError, AttributeError, TypeError) as error:  # the last two: another torch
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
