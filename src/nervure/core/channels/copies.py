"""Copy modules around other tensors, and list tensors."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from nervure._kit import Unsupported

METHOD = "channel graph"
_PLAIN = frozenset((int, float, bool, str, type(None)))


def twin(model: nn.Module, replaced: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Copy a model's modules around the same parameters.

    Several times faster than `copy.deepcopy`, which is used only for what modules hold beside modules and tensors.

    Args:
        model: The model.
        replaced: id of a parameter or buffer -> the tensor that takes its place; others are shared.

    Returns:
        The copy.

    Raises:
        Unsupported: If something a module holds cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    memo.update(replaced or {})
    modules = list(model.modules())
    for module in modules:
        memo[id(module)] = object.__new__(type(module))
    try:
        for module in modules:
            held = memo[id(module)].__dict__
            for key, value in module.__dict__.items():
                held[key] = _copied(value, memo)
    except (RuntimeError, TypeError) as error:
        raise Unsupported(METHOD, module, why=f"it cannot be copied ({error})") from error
    copied: nn.Module = memo[id(model)]
    return copied


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _PLAIN or kind is ModuleType:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict or kind is OrderedDict:  # parameters, buffers, modules and hooks
        made: dict[Any, Any] = kind()
        memo[id(value)] = made
        made.update((key, _copied(inner, memo)) for key, inner in value.items())
        return made
    if isinstance(value, Tensor) and not value.is_leaf:  # made anew by the next forward, as torch's pruning does
        return value.detach().clone()
    return copy.deepcopy(value, memo)


def tensors(output: Any) -> Iterator[Tensor]:
    """Find every tensor in what a model returned.

    Args:
        output: A tensor, or a mapping, sequence or object of such.

    Yields:
        The tensors.
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors(value)
    elif hasattr(output, "__dict__"):
        yield from tensors(vars(output))


def every(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers.

    Args:
        model: The model.
        remove_duplicate: Whether a tied tensor comes once only.

    Yields:
        (name, tensor).
    """
    yield from model.named_parameters(remove_duplicate=remove_duplicate)
    yield from model.named_buffers(remove_duplicate=remove_duplicate)
