"""What a cut changed, as JSON: enough to build the smaller network's shape again in another process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nervure._kit import BadModel
from nervure.core.channels.copies import every, twin


def recipe(model: nn.Module, smaller: nn.Module) -> dict[str, Any]:
    """Describe how a cut model differs in shape from the model it was cut from.

    Args:
        model: The model as its factory builds it.
        smaller: What one or more cuts made of it.

    Returns:
        JSON: new shapes of parameters and buffers by name, new attributes by module and name.

    Examples:
        >>> recipe(nn.Linear(3, 4), nn.Linear(3, 2))["shapes"]
        {'weight': [2, 3], 'bias': [2]}
    """
    new = dict(every(smaller))
    shapes = {name: list(new[name].shape) for name, old in every(model) if new[name].shape != old.shape}
    modules = dict(smaller.named_modules())
    attributes = {}
    for name, module in model.named_modules():
        before, after = dict(_numbers(module)), dict(_numbers(modules[name]))
        changed = {path: after[path] for path in before if before[path] != after[path]}
        if changed:
            attributes[name] = changed
    return {"shapes": shapes, "attributes": attributes}


def rebuild(model: nn.Module, recipe: Mapping[str, Any]) -> nn.Module:
    """Give a model the shape a recipe describes; its weights are then to be loaded.

    Args:
        model: The model as its factory builds it.
        recipe: From `recipe`, perhaps by way of JSON.

    Returns:
        A copy whose changed tensors are zeros.

    Raises:
        BadModel: If the model has no such parameter, module or number.
    """
    held, replaced = dict(every(model)), {}
    unknown = [name for name in recipe["shapes"] if name not in held]
    modules = dict(model.named_modules())
    for name, values in recipe["attributes"].items():
        # Only numbers the model has itself are set: a file cannot put anything else into it.
        known = dict(_numbers(modules[name])) if name in modules else {}
        unknown += [f"{name}.{path}" for path, value in values.items() if path not in known or not _whole(value)]
    if unknown:
        raise BadModel("the recipe is of another model", found=f"{unknown[0]}, which this one lacks")
    for name, tensor in held.items():
        shape = recipe["shapes"].get(name)
        value = tensor.detach().clone() if shape is None else tensor.detach().new_zeros(shape)
        made = nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        replaced[id(tensor)] = made
    copied = twin(model, replaced)
    modules = dict(copied.named_modules())
    for name, values in recipe["attributes"].items():
        for path, value in values.items():
            *parents, attribute = path.split(".")
            holder: Any = modules[name]
            for parent in parents:
                holder = getattr(holder, parent)
            holder.__dict__[attribute] = tuple(value) if isinstance(value, list) else value
    return copied


def _whole(value: Any) -> bool:
    """Return whether a value is a whole number or a list of such."""
    return type(value) is int or (isinstance(value, list) and all(type(one) is int for one in value))


def _numbers(holder: Any, *, deep: bool = True) -> Iterator[tuple[str, int | list[int]]]:
    """Yield the whole numbers an object holds, those of a plain object it holds too."""
    for key, value in vars(holder).items():
        if key.startswith("_") or isinstance(value, nn.Module | Tensor | type) or callable(value):
            continue
        if type(value) is int:
            yield key, value
        elif type(value) is tuple and all(type(one) is int for one in value):
            yield key, list(value)
        elif deep and hasattr(value, "__dict__"):
            for inner, number in _numbers(value, deep=False):
                yield f"{key}.{inner}", number
