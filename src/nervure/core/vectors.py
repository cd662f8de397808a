"""Named parameters and one flat vector: selection, tied weights counted once, there and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nervure._kit import UsageError


def select(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Choose parameters by name; a tied weight appears once, under its first name.

    Args:
        model: The model.
        names: Parameter names, or prefixes that end at a dot (``"encoder"`` takes all of ``encoder.*``); None takes
            every parameter that requires a gradient.

    Returns:
        Name -> parameter, in the model's order.

    Raises:
        UsageError: If a name matches nothing, or nothing is left.

    Examples:
        >>> list(select(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), ["1"]))
        ['1.weight', '1.bias']
    """
    unique = dict(model.named_parameters())
    if names is None:
        chosen = {name: value for name, value in unique.items() if value.requires_grad}
    else:
        every = dict(model.named_parameters(remove_duplicate=False))
        wanted: set[int] = set()
        for name in names:
            hits = [id(value) for key, value in every.items() if key == name or key.startswith(f"{name}.")]
            if not hits:
                raise UsageError("no parameter has this name", expected=f"one of {', '.join(every)}", found=name)
            wanted.update(hits)
        chosen = {name: value for name, value in unique.items() if id(value) in wanted}
    if not chosen:
        raise UsageError("no parameter is left to differentiate", try_="set requires_grad or name the parameters")
    return chosen


@contextmanager
def only(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let only the chosen parameters require a gradient, and give every flag back, also after an exception.

    Args:
        model: The model.
        chosen: From `select`.

    Yields:
        Nothing.
    """
    wanted = {id(value) for value in chosen.values()}
    before = [(value, value.requires_grad) for value in model.parameters()]
    try:
        for value, _ in before:
            value.requires_grad_(id(value) in wanted)
        yield
    finally:
        for value, flag in before:
            value.requires_grad_(flag)


def flatten(tensors: Mapping[str, Tensor] | Iterable[Tensor]) -> Tensor:
    """Join tensors into one vector.

    Args:
        tensors: Tensors of one device and dtype, by name or in a row.

    Returns:
        The vector, a copy.
    """
    values = tensors.values() if isinstance(tensors, Mapping) else tensors
    return torch.cat([value.reshape(-1) for value in values])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a vector into tensors of the shapes of `like`; leading axes of the vector stay in front.

    Args:
        vector: Shape (..., P).
        like: Name -> tensor, P entries in total.

    Returns:
        Name -> view, shape (..., *shape).

    Raises:
        UsageError: If P does not fit.

    Examples:
        >>> like = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
        >>> unflatten(torch.arange(8.0), like)["b"]
        tensor([6., 7.])
    """
    sizes = [value.numel() for value in like.values()]
    if vector.shape[-1] != sum(sizes):
        raise UsageError("the vector does not fit the parameters", expected=sum(sizes), found=vector.shape[-1])
    parts = vector.split(sizes, dim=-1)
    return {
        name: part.reshape(*vector.shape[:-1], *value.shape)
        for part, (name, value) in zip(parts, like.items(), strict=True)
    }
