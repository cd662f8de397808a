"""Run a network without its costly arithmetic: labels need shapes, not values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Looked(Exception):
    """Stop a dry run: the forward looks at values."""


# Operations that hand values to Python, or whose result's shape depends on them.
LOOKS = frozenset((
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "unique",
    "_unique2", "unique_consecutive", "unique_dim", "bincount", "repeat_interleave", "allclose", "histc",
))  # fmt: skip
# Calls that hand a tensor's memory over.
READS = frozenset(("numpy", "tolist", "item", "__array__", "__dlpack__", "numpy_force", "data_ptr"))
Shape = Sequence[int] | None


def _image(x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
           groups: int = 1) -> Shape:  # fmt: skip
    """Return the shape of a convolution's output, or None where that is better left to the convolution."""
    count = weight.ndim - 2
    if x.ndim < count + 1 or x.shape[-count - 1] != weight.shape[1] * groups or isinstance(padding, str):
        return None

    def each(value: Any) -> list[int]:
        return [value] * count if isinstance(value, int) else list(value) * (count // len(value))

    sizes = zip(x.shape[-count:], weight.shape[2:], each(stride), each(padding), each(dilation), strict=True)
    space = [(size + 2 * around - (kernel - 1) * apart - 1) // step + 1 for size, kernel, step, around, apart in sizes]
    return [*x.shape[: -count - 1], len(weight), *space] if min(space) > 0 else None


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Shape:
    return [*x.shape[:-1], *weight.shape[:-1]] if x.shape[-1:] == weight.shape[-1:] else None


def _mixed(query: Tensor, key: Tensor, value: Tensor, *unused: Any, **ignored: Any) -> Shape:
    fits = query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    return [*query.shape[:-1], value.shape[-1]] if fits and query.ndim == key.ndim == value.ndim else None


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, *unused: Any) -> Shape:
    known = [one for one in (weight, bias, mean) if one is not None]
    return x.shape if all(len(one) == x.shape[1] for one in known) else None


# Costly operations whose result's shape is known without computing it.
SHAPES: dict[str, Callable[..., Shape]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _image),
    "linear": _rows,
    "scaled_dot_product_attention": _mixed,
    "batch_norm": _normed,
}


def looks(operation: str, args: Sequence[Any]) -> bool:
    """Say whether an operation's result, or its shape, depends on values in a way the forward can notice.

    Args:
        operation: Its name.
        args: Its arguments.

    Returns:
        Whether a dry run must stop.
    """
    if operation == "index":
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return operation in LOOKS
