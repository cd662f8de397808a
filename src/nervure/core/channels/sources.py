"""Rules of new tensors, and of operations nobody wrote a rule for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nervure.core.channels.labels import kept
from nervure.core.channels.trace import Rule, Trace


def constant(t: Trace, out: Tensor, func: Any, first: Any, *unused: Any, **ignored: Any) -> None:
    """A new tensor of one value: its lengths follow what they were asked for."""
    if isinstance(first, Tensor) and "like" in func._schema.name:
        a = t.dims(first)
        return t.put(out, a.labels, ["zeros" in func._schema.name] * out.ndim)
    sizes = unused[0] if isinstance(first, Tensor) else first
    labels = [t.labels.fresh(length) for length in out.shape]
    t.sized(labels, sizes)
    return t.put(out, labels, ["zeros" in func._schema.name] * out.ndim)


def counted(t: Trace, out: Tensor, _: Any, *args: Any, **unused: Any) -> None:
    """A new tensor whose values depend on where they stand (arange, eye, noise): never cut."""
    labels = [kept(length) for length in out.shape]
    t.sized(labels, list(out.shape))
    t.put(out, labels, [False] * out.ndim)


def unknown(t: Trace, out: Any, func: Any, *args: Any, **kwargs: Any) -> None:
    """An operation without a rule: everything it touches stays whole."""
    name = func._schema.name if func is not None else "an operation"
    for value in _flat((*args, *kwargs.values())):
        t.pin(t.dims(value).labels, f"{name} has no rule")
    touched = {id(value) for value in _flat(args)}
    for value in _flat((out,)):
        if id(value) not in touched:
            t.put(value, [kept(length) for length in value.shape], [False] * value.ndim)


def _flat(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _flat(value)
    return found


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros",
         "new_ones", "new_full", "new_empty"), constant,
    ),
    **dict.fromkeys(
        ("arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "tril_indices", "triu_indices"), counted,
    ),
}  # fmt: skip
