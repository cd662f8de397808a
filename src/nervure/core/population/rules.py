"""How layers run for n members at once: one rule a layer, which returns a function of stacked tensors (n, B, ...)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure.core.population.stack import Stack

Run = Callable[..., Any]


class _Affine(torch.autograd.Function):
    """y = x Wᵀ + b for every member; the backward returns dW contiguous, as the optimizer wants it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        turned = weight.transpose(1, 2)
        return torch.bmm(x, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, turned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        return (
            torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None,
            torch.bmm(grad.transpose(1, 2), x) if ctx.needs_input_grad[1] else None,
            grad.sum(1) if ctx.needs_input_grad[2] else None,
        )


def to_channels(x: Tensor) -> Tensor:
    """Return (B, n C, ...) for (n, B, C, ...); a view for what `from_channels` returned."""
    return x.transpose(0, 1).flatten(1, 2)


def from_channels(x: Tensor, count: int) -> Tensor:
    """Return (n, B, C, ...) for (B, n C, ...) as a view."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """Return a stacked (n, C) vector in the shape that broadcasts along axis 2 of (n, B, C, ...)."""
    return value.view(len(value), 1, -1, *[1] * (x.ndim - 3))


def _affine(stack: Stack, path: str, layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return a normalisation layer's stacked weight and bias, where it has them."""
    present = [key for key in ("weight", "bias") if layer._parameters.get(key) is not None]
    found = {key: stack.leaves[stack.name(path, key)] for key in present}
    return found.get("weight"), found.get("bias")


def linear(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Run a linear layer as one batched matrix product."""
    weight = stack.leaves[stack.name(path, "weight")]
    bias = None if layer.bias is None else stack.leaves[stack.name(path, "bias")]

    def run(x: Tensor) -> Tensor:
        rows = x.reshape(len(weight), -1, x.shape[-1])
        result: Tensor = _Affine.apply(rows, weight, bias)
        return result if x.ndim == 3 else result.view(*x.shape[:-1], -1)

    return run


def convolution(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Run a convolution as one with n times as many groups."""
    assert isinstance(layer, nn.modules.conv._ConvNd)
    if layer.padding_mode != "zeros" or layer.transposed:
        return None
    weight = stack.leaves[stack.name(path, "weight")]
    bias = None if layer.bias is None else stack.leaves[stack.name(path, "bias")]
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    count, rank = len(weight), 3 + len(layer.kernel_size)

    def run(x: Tensor) -> Tensor:
        if x.ndim != rank:
            raise ValueError("a convolution of samples without a batch axis")
        shift = None if bias is None else bias.flatten()
        out = function(
            to_channels(x),
            weight.flatten(0, 1),
            shift,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups * count,
        )
        return from_channels(out, count)

    return run


def batch_norm(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Normalise every member's channels side by side, each with its own running statistics."""
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    if layer.momentum is None:  # the cumulative average needs the count of batches as a number
        return None
    weight, bias = _affine(stack, path, layer)
    mean = None if layer.running_mean is None else stack.buffers[stack.name(path, "running_mean")]
    var = None if layer.running_var is None else stack.buffers[stack.name(path, "running_var")]
    tracked = None if layer.num_batches_tracked is None else stack.buffers[stack.name(path, "num_batches_tracked")]
    training, momentum, eps, count = layer.training, layer.momentum, layer.eps, len(stack)

    def run(x: Tensor) -> Tensor:
        if training and tracked is not None:
            tracked.add_(1)
        out = F.batch_norm(
            to_channels(x),
            None if mean is None else mean.view(-1),
            None if var is None else var.view(-1),
            None if weight is None else weight.flatten(),
            None if bias is None else bias.flatten(),
            training or mean is None,
            momentum,
            eps,
        )
        return from_channels(out, count)

    return run


def layer_norm(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Normalise without an affine map, then apply each member's own."""
    assert isinstance(layer, nn.LayerNorm)
    weight, bias = _affine(stack, path, layer)
    shape, eps = layer.normalized_shape, layer.eps

    def spread(value: Tensor, x: Tensor) -> Tensor:
        return value.view(len(value), *[1] * (x.ndim - 1 - len(shape)), *shape)

    def run(x: Tensor) -> Tensor:
        out = F.layer_norm(x, shape, None, None, eps)
        if weight is None:
            return out
        return out * spread(weight, x) if bias is None else torch.addcmul(spread(bias, x), out, spread(weight, x))

    return run


def group_norm(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Normalise without an affine map, then apply each member's own."""
    assert isinstance(layer, nn.GroupNorm)
    weight, bias = _affine(stack, path, layer)
    groups, eps, count = layer.num_groups, layer.eps, len(stack)

    def run(x: Tensor) -> Tensor:
        out = F.group_norm(x.flatten(0, 1), groups, None, None, eps).unflatten(0, (count, -1))
        if weight is None or bias is None:
            return out
        return torch.addcmul(_per_channel(bias, x), out, _per_channel(weight, x))

    return run


def embedding(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Look all members' tables up as one long table."""
    assert isinstance(layer, nn.Embedding)
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        return None
    weight = stack.leaves[stack.name(path, "weight")]
    if layer.padding_idx is not None:
        return None
    count, size = weight.shape[:2]
    start = torch.arange(count, device=weight.device) * size

    def run(index: Tensor) -> Tensor:
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise IndexError("index out of range in an embedding")
        return F.embedding(index + start.view(-1, *[1] * (index.ndim - 1)), weight.flatten(0, 1))

    return run


def channels(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Run a layer that treats every channel for itself, such as pooling, on all members' channels side by side."""
    count = len(stack)
    rank = 4 + isinstance(layer, _PLANES)

    def run(x: Tensor) -> Tensor:
        if x.ndim != rank:
            raise ValueError("a layer over channels of samples without a batch axis")
        return from_channels(layer(to_channels(x)), count)

    return run


def same(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Run a layer that treats every number for itself as it is."""
    return layer


def flatten(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Flatten the axes behind the members'."""
    assert isinstance(layer, nn.Flatten)
    start, end = layer.start_dim, layer.end_dim
    return lambda x: x.flatten(start + (start >= 0), end + (end >= 0))


def softmax(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Shift the axis by the members'."""
    assert isinstance(layer, nn.Softmax | nn.LogSoftmax)
    if layer.dim is None:
        return None
    dim, function = layer.dim + (layer.dim >= 0), F.softmax if isinstance(layer, nn.Softmax) else F.log_softmax
    return lambda x: function(x, dim)


def dropout(stack: Stack, path: str, layer: nn.Module) -> Run | None:
    """Drop with each member's own rate and random stream: the mask its training alone would draw."""
    assert isinstance(layer, nn.modules.dropout._DropoutNd)
    if not layer.training:
        return lambda x: x
    layers, whole = stack.dropouts[path], isinstance(layer, nn.Dropout)

    def run(x: Tensor) -> Tensor:
        if not whole and x.ndim != {nn.Dropout1d: 4, nn.Dropout2d: 5, nn.Dropout3d: 6}[type(layer)]:
            raise ValueError("feature dropout of samples without a batch axis")
        return drop(stack, x, [one.p for one in layers], whole=whole)

    return run


def drop(stack: Stack, x: Tensor, rates: list[float], *, whole: bool = True) -> Tensor:
    """Apply every member's dropout mask, drawn from its own stream as `torch.nn.functional.dropout` draws it.

    Args:
        stack: The members.
        x: Activations, (n, B, ...).
        rates: One dropout rate for each member.
        whole: Drop single numbers; otherwise whole channels.

    Returns:
        The activations, scaled by 1 / (1 - rate) where they are kept.
    """
    if not any(rates) or not x.numel():
        return x
    mask = x.new_empty(x.shape if whole else (*x.shape[:3], *[1] * (x.ndim - 3)))
    for row, rate, generator in zip(mask, rates, stack.generators, strict=True):
        if 0 < rate < 1:
            row.bernoulli_(1 - rate, generator=generator)
        else:
            row.fill_(1 - rate)
    keep = [1 - rate if rate < 1 else 1.0 for rate in rates]
    return x * mask.div_(x.new_tensor(keep).view(-1, *[1] * (x.ndim - 1)))


_POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Identity,
)  # fmt: skip
_PLANES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_LINES = (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)

LAYERS: dict[type[nn.Module], Callable[[Stack, str, nn.Module], Run | None]] = {
    nn.Linear: linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), batch_norm),
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
    nn.Embedding: embedding,
    nn.Flatten: flatten,
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), softmax),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), dropout),
    **dict.fromkeys((*_PLANES, *_LINES), channels),
    **dict.fromkeys(_POINTWISE, same),
}

# Functions and tensor methods that treat every number for itself and take one tensor.
POINTWISE: frozenset[object] = frozenset(
    {
        F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.tanh, F.sigmoid, F.softplus, F.hardtanh,
        torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.log, torch.sqrt, torch.abs, torch.neg, torch.square,
        "relu", "relu_", "tanh", "sigmoid", "exp", "abs", "neg", "square", "float", "double", "contiguous", "detach",
    }
)  # fmt: skip
# Of two tensors; ranks are aligned behind the members' axis.
ARITHMETIC: frozenset[object] = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.imul, operator.isub,
        torch.add, torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div",
    }
)  # fmt: skip
# Questions about a tensor whose answer is not a tensor: asked of member 0.
QUESTIONS: frozenset[str] = frozenset({"size", "dim", "numel", "shape", "dtype", "device", "ndim", "is_contiguous"})


def align(values: list[Any]) -> list[Any]:
    """Give stacked tensors one rank by new axes behind the members', so that they broadcast as each member's would.

    Args:
        values: Stacked tensors and plain numbers.

    Returns:
        The same values with equal ranks.
    """
    rank = max(value.ndim for value in values if isinstance(value, Tensor))
    return [
        value.view(len(value), *[1] * (rank - value.ndim), *value.shape[1:])
        if isinstance(value, Tensor) and 0 < value.ndim < rank
        else value
        for value in values
    ]
