"""Rules of the operations on values: elementwise ones, reductions, pooling."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nervure.core.channels.labels import Array, kept
from nervure.core.channels.layers import broadcast
from nervure.core.channels.sizes import Size
from nervure.core.channels.sources import unknown
from nervure.core.channels.trace import Dims, Rule, Trace

# Functions that send zero to zero.
_THROUGH_ZERO = frozenset((
    "relu", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "elu", "selu", "celu", "mish", "abs", "neg", "sqrt",
    "square", "sin", "sinh", "asin", "asinh", "atan", "erf", "expm1", "log1p", "sign", "sgn", "tan", "softshrink",
    "hardshrink", "tanhshrink", "softsign", "_prelu_kernel", "prelu", "rrelu", "clone", "contiguous", "to",
    "_to_copy", "detach", "alias", "dropout", "feature_dropout", "alpha_dropout", "type_as", "lift_fresh",
    "positive", "floor", "ceil", "round", "trunc", "nan_to_num", "relu6", "bernoulli",
))  # fmt: skip
_SUMS = frozenset(("add", "sub", "rsub", "maximum", "minimum", "hypot", "copy", "where", "lerp"))
_PRODUCTS = frozenset(("mul", "multiply", "logical_and", "bitwise_and"))
_QUOTIENTS = frozenset(("div", "divide", "true_divide", "pow", "remainder", "fmod", "atan2", "floor_divide"))


def pointwise(t: Trace, out: Any, func: Any, *args: Any, **kwargs: Any) -> None:
    """Elementwise operations: aligned dimensions are one; whether zero stays zero depends on the operation."""
    if not isinstance(out, Tensor):
        return unknown(t, out, func, *args, **kwargs)
    for number in t.given:
        if isinstance(number, Size):
            t.read(number)
    name = func._schema.name.split("::", 1)[1]
    written = name.endswith("_") and not name.startswith("_")
    name = name.rstrip("_") if written else name
    operands = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    parts = [t.dims(one) for one in operands]
    if name == "copy":
        parts, operands = parts[::-1], operands[::-1]
    whole = broadcast(t, parts, out.ndim, every=name in _SUMS)
    zero = _keeps_zero(name, args, parts, whole)
    if written:
        target = t.dims(args[0])
        if any(was and not now for was, now in zip(target.zero, zero, strict=True)):
            t.overwritten.add(out.untyped_storage()._cdata)
        t.same(target.labels, whole.labels)
    t.put(out, whole.labels, zero)
    return None


def alike(t: Trace, out: Tensor, _: Any, x: Tensor, *unused: Any, **ignored: Any) -> None:
    """The same values, perhaps of another type or elsewhere."""
    a = t.dims(x)
    if out is not x:
        t.put(out, a.labels, a.zero, leaf=a.leaf)


def _keeps_zero(name: str, args: Sequence[Any], parts: Sequence[Dims], whole: Dims) -> list[bool]:
    never = [False] * len(whole.labels)
    if name in _SUMS:
        scalars = [value for value in args[:2] if isinstance(value, int | float) and not isinstance(value, bool)]
        if name == "where":
            return broadcast_zero(parts[1:], len(never)) if len(parts) == 3 else never
        if name == "copy":
            return broadcast_zero(parts[:1], len(never))
        return never if any(scalars) else whole.zero
    if name in _PRODUCTS:
        return whole.zero
    if name in _QUOTIENTS:
        fine = not (name == "pow" and (len(parts) > 1 or not _positive(args[-1])))
        return broadcast_zero(parts[:1], len(never)) if isinstance(args[0], Tensor) and fine else never
    if name in ("fill", "zero"):
        return parts[0].zero if name == "zero" or args[1] == 0 else never
    if name == "masked_fill":
        return broadcast_zero(parts[:1], len(never)) if args[-1] == 0 else never
    if name == "hardtanh":
        low, high = args[1:3] if len(args) > 2 else (-1.0, 1.0)
        return broadcast_zero(parts[:1], len(never)) if low <= 0 <= high else never
    if name == "clamp" or name == "clamp_min" or name == "clamp_max":
        bounds = args[1:]
        fine = all(not isinstance(one, Tensor) for one in bounds) and _within(name, bounds)
        return broadcast_zero(parts[:1], len(never)) if fine else never
    return broadcast_zero(parts[:1], len(never)) if name in _THROUGH_ZERO else never


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _within(name: str, bounds: Sequence[Any]) -> bool:
    low = bounds[0] if name != "clamp_max" and bounds else None
    high = bounds[-1] if name == "clamp_max" or len(bounds) > 1 else None
    return (low is None or low <= 0) and (high is None or high >= 0)


def broadcast_zero(parts: Sequence[Dims], ndim: int) -> list[bool]:
    """Return, for each dimension of a result, whether all parts are zero there; a shorter part is not."""
    return [
        all(len(part.zero) >= -axis and part.zero[axis] and len(part.labels[axis]) > 1 for part in parts)
        for axis in range(-ndim, 0)
    ]


def _axes(dim: Any, ndim: int) -> list[int]:
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(ndim))
    return [one % ndim for one in ([dim] if isinstance(dim, int) else dim)] if ndim else []


def _reduce(t: Trace, out: Any, x: Tensor, dim: Any, keepdim: bool, *, sums: bool, why: str) -> None:
    a = t.dims(x)
    axes = _axes(dim, x.ndim)
    for axis in axes:
        if not (sums and a.zero[axis]):
            t.mark_uneven(a.labels[axis], why)
    labels: list[Array] = []
    zero: list[bool] = []
    for axis in range(x.ndim):
        if axis not in axes:
            labels.append(a.labels[axis])
            zero.append(a.zero[axis])
        elif keepdim:
            labels.append(kept(1))
            zero.append(False)
    for one in out if isinstance(out, tuple | list) else (out,):
        t.put(one, labels, zero)


def total(t: Trace, out: Any, _: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **unused: Any) -> None:
    """Sum: zeros leave no trace."""
    _reduce(t, out, x, dim, keepdim, sums=True, why="a sum over it has terms other than zero")


def average(t: Trace, out: Any, func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **unused: Any) -> None:
    """Average, or compare: zeros do leave a trace."""
    if isinstance(dim, Tensor):  # the larger of two
        return pointwise(t, out, func, x, dim)
    return _reduce(t, out, x, dim, keepdim, sums=False, why="it is averaged over or compared along")


def variance(t: Trace, out: Any, _: Any, x: Tensor, dim: Any = None, *rest: Any, keepdim: bool = False,
             **unused: Any) -> None:  # fmt: skip
    """Take a variance."""
    _reduce(t, out, x, None if isinstance(dim, bool) else dim, keepdim or rest[-1:] == (True,), sums=False,
            why="its variance is taken")  # fmt: skip


def norm(t: Trace, out: Any, func: Any, x: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False,
         **unused: Any) -> None:  # fmt: skip
    """Take a norm: zeros leave no trace."""
    positive = order is None or (isinstance(order, int | float) and order > 0)
    _reduce(t, out, x, dim, keepdim, sums=positive, why="a norm over it has terms other than zero")


def softmax(t: Trace, out: Any, _: Any, x: Tensor, dim: Any, *unused: Any, **ignored: Any) -> None:
    """Normalise exponentials: even zeros take their share."""
    a = t.dims(x)
    t.mark_uneven(a.labels[dim], "a softmax runs over it")
    t.put(out, a.labels, [False] * x.ndim)


def cumulative(t: Trace, out: Any, _: Any, x: Tensor, dim: int, *unused: Any, **ignored: Any) -> None:
    """Sum up to each index."""
    a = t.dims(x)
    if not a.zero[dim]:
        t.mark_uneven(a.labels[dim], "a running sum has terms other than zero")
    t.put(out, a.labels, [zero and axis != dim % x.ndim for axis, zero in enumerate(a.zero)])


def spatial(t: Trace, out: Any, func: Any, x: Tensor, size: Any = None, *unused: Any, **ignored: Any) -> None:
    """Pooling and resizing of the last dimensions, however many the operation's name says."""
    a = t.dims(x)
    found = re.search(r"(\d)d", func._schema.name)
    count = int(found[1]) if found else 2
    t.pin(a.labels[x.ndim - count :], "it is pooled or resized")
    for one in out if isinstance(out, tuple | list) else (out,):
        t.put(one, [*a.labels[:-count], *(kept(length) for length in one.shape[-count:])],
              [*a.zero[:-count], *([False] * count)])  # fmt: skip


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("clone", "contiguous", "to", "_to_copy", "detach", "alias", "dropout", "dropout_", "feature_dropout",
         "alpha_dropout", "feature_alpha_dropout", "type_as", "lift_fresh"), alike,
    ),
    **dict.fromkeys(  # not all of them are marked as elementwise
        ("copy_", "masked_fill", "masked_fill_", "where", "relu6", "hardtanh", "silu", "mish", "gelu", "celu", "selu",
         "clamp", "hardswish", "hardsigmoid", "leaky_relu", "elu", "_prelu_kernel", "fill", "fill_",
         "zero_"), pointwise,
    ),
    "sum": total,
    **dict.fromkeys(("mean", "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "prod", "all", "any",
                     "median"), average),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), variance),
    **dict.fromkeys(("norm", "linalg_vector_norm"), norm),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), softmax),
    **dict.fromkeys(("cumsum",), cumulative),
    **dict.fromkeys(
        ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
         "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
         "adaptive_max_pool3d", "max_pool2d_with_indices", "upsample_nearest1d", "upsample_nearest2d",
         "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d",
         "upsample_trilinear3d", "_upsample_nearest_exact2d", "_adaptive_avg_pool2d"), spatial,
    ),
}  # fmt: skip
