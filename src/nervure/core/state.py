"""Save a changed network as safetensors with the JSON recipe that rebuilds it. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nervure._kit import BadData, BadModel, UsageError
from nervure.core import masks
from nervure.core.channels import rebuild
from nervure.core.factory import build_model

FORMAT = 1


def save(
    model: nn.Module, path: str | Path, *, factory: str | None = None, cut: Mapping[str, Any] | None = None
) -> Path:
    """Write weights, buffers, masks and ties, and how to build the model they fit.

    The file is written beside its place and moved there when complete.

    Args:
        model: The model.
        path: Where to; a name ending in ``.safetensors``.
        factory: ``path.py:factory`` that builds the unchanged model, so that `load` needs no model.
        cut: How this model's shape differs from the unchanged one's; see `nervure.core.channels.recipe`.

    Returns:
        The path.

    Raises:
        UsageError: If the path has another ending.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise UsageError("the file has the wrong ending", expected="a name ending in .safetensors", found=target.name)
    state, ties = _untie(model.state_dict())
    dropped = sorted(masks.read(model))
    recipe = {"format": FORMAT, "factory": factory, "masks": dropped, "ties": ties}
    if cut is not None:
        recipe["cut"] = dict(cut)
    partial = target.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, {"recipe": json.dumps(recipe)})
    partial.replace(target)
    return target


def _untie(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state into tensors to store and names that share another name's tensor."""
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    kept: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            ties[name] = first[key]
        else:
            first[key] = name
            kept[name] = tensor
    return kept, ties


def load(
    path: str | Path, *, model: nn.Module | None = None, build: Callable[[str], nn.Module] = build_model
) -> nn.Module:
    """Rebuild a saved network.

    Args:
        path: The file.
        model: An unchanged model to fill; needed where the file names no factory.
        build: Builds the model a factory names.

    Returns:
        The model with its masks in force.

    Raises:
        BadData: If the file is no such file, damaged, or of a newer format.
        BadModel: If the model does not fit the file.
        UsageError: If there is neither a model nor a factory.
    """
    try:
        with safe_open(path, framework="pt") as file:
            recipe = json.loads((file.metadata() or {}).get("recipe", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise BadData(f"{path} cannot be read", expected="a .safetensors file", found=str(error)) from error
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        found = recipe.get("format") if isinstance(recipe, dict) else None
        raise BadData(f"{path} was not written by this nervure", expected=f"format {FORMAT}", found=found)
    if model is None:
        if recipe["factory"] is None:
            raise UsageError(f"{path} names no factory", try_="load(path, model=...) with an unchanged model")
        model = build(recipe["factory"])
    if recipe.get("cut"):
        model = rebuild(model, recipe["cut"])
    return _fill(model, state, recipe, str(path))


def _fill(model: nn.Module, state: dict[str, Tensor], recipe: dict[str, Any], path: str) -> nn.Module:
    kept = {name: state[_buffer(name, masks.MASK)] for name in recipe["masks"]}
    carriers = {name: state[place] for name in kept if (place := _buffer(name, masks.CARRIER)) in state}
    if kept:
        masks.attach(model, {name: mask.to(torch.bool) for name, mask in kept.items()}, carriers=carriers)
    full = {**state, **{alias: state[name] for alias, name in recipe["ties"].items()}}
    problems = model.load_state_dict(full, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise BadModel(
            f"the model does not fit {path}",
            expected=f"also {problems.unexpected_keys[:3]}" if problems.unexpected_keys else None,
            found=f"{problems.missing_keys[:3]} with nothing to fill them" if problems.missing_keys else None,
            try_="the factory the file was saved with",
        )
    return model


def _buffer(name: str, ending: str) -> str:
    return name + ending
