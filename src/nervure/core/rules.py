"""Closed forms: the gradient of each sample from a module's input and the gradient at its output.

For a linear layer the gradient of sample n is g_n a_n'; for a convolution the same over unfolded patches; for a norm
layer it is g times the normalised input. Each rule is split in two, so that what depends on the input alone is
computed once for many output gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Gradients = Callable[[Tensor], dict[str, Tensor]]
"""From an output gradient, shape (N, ...), to local parameter name -> gradients, shape (N, *shape)."""


def _linear(module: nn.Linear, a: Tensor) -> Gradients:
    def of(g: Tensor) -> dict[str, Tensor]:
        if a.ndim == 2:
            return {"weight": g.unsqueeze(2) * a.unsqueeze(1), "bias": g}
        flat = g.flatten(1, -2)
        return {"weight": flat.mT @ a.flatten(1, -2), "bias": flat.sum(1)}

    return of


def patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor) -> Tensor:
    """Unfold the input of a convolution into the patch each output position sees.

    Args:
        module: The convolution: any stride, dilation, groups, padding and padding mode.
        a: Its input, shape (N, C, *spatial).

    Returns:
        Shape (N, groups, C / groups * kernel size, positions).
    """
    rank = a.ndim - 2
    # The module keeps the padding of both sides in the order F.pad wants, also for "same" and "valid".
    width = module._reversed_padding_repeated_twice
    if any(width):
        a = F.pad(a, width) if module.padding_mode == "zeros" else F.pad(a, width, mode=module.padding_mode)
    for axis in range(rank):
        span = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        a = a.unfold(2 + axis, span, module.stride[axis])[..., :: module.dilation[axis]]
    # Positions last: whole rows of the image are copied instead of single kernel rows, four times faster.
    a = a.unflatten(1, (module.groups, -1))
    a = a.permute(0, 1, 2, *range(3 + rank, 3 + 2 * rank), *range(3, 3 + rank))
    return a.flatten(3 + rank).flatten(2, 2 + rank)


def _conv(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor) -> Gradients:
    unfolded = patches(module, a)

    def of(g: Tensor) -> dict[str, Tensor]:
        flat = g.flatten(2)
        weight = flat.unflatten(1, (module.groups, -1)) @ unfolded.mT
        return {"weight": weight.reshape(len(g), *module.weight.shape), "bias": flat.sum(2)}

    return of


def _embedding(module: nn.Embedding, index: Tensor) -> Gradients:
    rows = index.flatten(1) if index.ndim > 1 else index.unsqueeze(1)
    keep = None if module.padding_idx is None else (rows != module.padding_idx).unsqueeze(2)

    def of(g: Tensor) -> dict[str, Tensor]:
        values = g.reshape(*rows.shape, -1)
        values = values if keep is None else values * keep
        weight = values.new_zeros(len(rows), *module.weight.shape)
        return {"weight": weight.scatter_add_(1, rows.unsqueeze(2).expand_as(values), values)}

    return of


def _scaled(normalised: Tensor, kept: int) -> Gradients:
    """Return the rule of ``weight * normalised + bias`` where the last `kept` axes belong to the weight."""

    def of(g: Tensor) -> dict[str, Tensor]:
        middle = tuple(range(1, g.ndim - kept))
        both = {"weight": g * normalised, "bias": g}
        return {name: value.sum(middle) if middle else value for name, value in both.items()}

    return of


def _layer_norm(module: nn.LayerNorm, a: Tensor) -> Gradients:
    return _scaled(F.layer_norm(a, module.normalized_shape, eps=module.eps), len(module.normalized_shape))


def _rms_norm(module: nn.RMSNorm, a: Tensor) -> Gradients:
    return _scaled(F.rms_norm(a, module.normalized_shape, eps=module.eps), len(module.normalized_shape))


def _channels(normalised: Tensor) -> Gradients:
    """Return the rule of a norm layer whose weight belongs to axis 1."""
    scaled = _scaled(normalised.movedim(1, -1), 1)
    return lambda g: scaled(g.movedim(1, -1))


def _group_norm(module: nn.GroupNorm, a: Tensor) -> Gradients:
    return _channels(F.group_norm(a, module.num_groups, eps=module.eps))


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, a: Tensor) -> Gradients:
    return _channels(F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps))


_RULES: dict[type[nn.Module], Callable[..., Gradients]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
}
_AXES = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5, nn.Embedding: 1}


def has_rule(module: nn.Module) -> bool:
    """Say whether a module's gradients have a closed form here.

    Subclasses do not inherit one: their forward may do anything. Nor does an embedding that rewrites its own weight
    or scales its gradient by counts over the batch.

    Args:
        module: The module.

    Returns:
        Whether `rule` accepts it.
    """
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return False
    return type(module) in _RULES


def rule(module: nn.Module, a: Tensor) -> Gradients:
    """Return the function from output gradients to the gradients of each sample.

    Args:
        module: A module `has_rule` accepts.
        a: Its input, shape (N, ...).

    Returns:
        The function.
    """
    return _RULES[type(module)](module, a)


def least_axes(module: nn.Module) -> int:
    """Return the least number of axes an input with a batch axis has.

    Args:
        module: A module `has_rule` accepts.

    Returns:
        The number of axes: below it the module was called on one unbatched sample.
    """
    return _AXES.get(type(module), 2)


def outer_form(module: nn.Module, a: Tensor) -> bool:
    """Say whether the gradient of each sample is one outer product: a linear layer on (N, features).

    Args:
        module: The module.
        a: Its input.

    Returns:
        Whether Gram matrices can be had as (A A') * (G G').
    """
    return type(module) is nn.Linear and a.ndim == 2
