"""Nested states in a safetensors file: tensors beside the JSON that says where they belong. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nervure._kit import BadData, Unsupported

_KEY, _TENSOR, _PAIRS = "nervure_state", "tensor", "pairs"


def write_state(state: Any, path: Path) -> None:
    """Write a state of dicts, lists, numbers, text, None and tensors.

    Args:
        state: The state; tuples come back as lists.
        path: The file; whole or not at all.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_flat(state, tensors))
    partial = path.with_name(f".{path.name}.part")
    save_file(tensors, partial, {_KEY: text})
    partial.replace(path)


def read_state(path: Path) -> Any:
    """Return what `write_state` wrote.

    Args:
        path: The file.

    Returns:
        The state.

    Raises:
        BadData: If it is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return _nested(json.loads((file.metadata() or {})[_KEY]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise BadData(f"{path} holds no state of hooks", found=f"{type(error).__name__}: {error}") from error


def _flat(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        # Keys may be numbers, which JSON has not.
        return {_PAIRS: [[_flat(key, tensors), _flat(one, tensors)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        return [_flat(one, tensors) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise Unsupported(
        "a checkpoint", value, why="states hold dicts, lists, numbers, text and tensors", try_="such a state_dict()"
    )


def _nested(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_nested(one, tensors) for one in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {_nested(key, tensors): _nested(one, tensors) for key, one in value[_PAIRS]}
    return value
