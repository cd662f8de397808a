"""Weights drawn from one seed, bit for bit the same on every machine, and files that store the seed in their place."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nervure._kit import BadData, BadModel, UsageError
from nervure.core import masks, modules, rng

FORMAT = 1
_BITS = 24  # of a single-precision mantissa, so that every number drawn is exact
_INDEX, _VALUE = "_index", "_value"


@torch.no_grad()
def draw_(model: nn.Module, *, seed: int) -> nn.Module:
    """Draw all connection weights in place from one seed: uniform with He's variance 2 / fan-in.

    The numbers are 24-bit integers times a constant, so no machine's logarithm or cosine takes part: another
    machine draws the same bits. Biases and norm parameters stay.

    Args:
        model: The model.
        seed: A 32-bit number, which with the parameters' names decides every weight.

    Returns:
        The same model.

    Raises:
        UsageError: If the seed does not fit into 32 bits.

    Examples:
        >>> one, two = draw_(nn.Linear(4, 3), seed=7), draw_(nn.Linear(4, 3), seed=7)
        >>> torch.equal(one.weight, two.weight)
        True
    """
    if not 0 <= seed < 2**32:
        raise UsageError("the seed is no 32-bit number", expected="0 to 4294967295", found=seed)
    for name, weight in modules.weights(model).items():
        weight.copy_(_weights(weight, rng.generator("seeded", seed, name)))
    return model


def _weights(like: Tensor, source: torch.Generator) -> Tensor:
    fan_in = max(1, like.numel() // like.shape[0])
    whole = torch.randint(-(2**_BITS) + 1, 2**_BITS, like.shape, generator=source)
    step = torch.tensor(math.sqrt(6 / fan_in) / 2**_BITS, dtype=torch.float32)
    return (whole.to(torch.float32) * step).to(like.device, like.dtype)


def save(model: nn.Module, path: str | Path, *, seed: int) -> Path:
    """Write a network whose dropped weights are those of a seed: the seed, and values and places of the others.

    Parameters without a mask and buffers are stored whole.

    Args:
        model: A masked model, whose carriers are the weights `draw_` gave it.
        path: Where to; a name ending in ``.safetensors``.
        seed: The seed of those weights.

    Returns:
        The path.

    Raises:
        UsageError: If the path has another ending.
        BadModel: If nothing is masked, or a dropped weight is not the seed's.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise UsageError("the file has the wrong ending", expected="a name ending in .safetensors", found=target.name)
    kept = masks.read(model)
    if not kept:
        raise BadModel("the model has no masks", try_="nervure.core.state.save, which stores every weight")
    named = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for name, mask in kept.items():
        weight = named[name].detach()
        drawn = _weights(weight, rng.generator("seeded", seed, name))
        if not torch.equal(weight[~mask], drawn[~mask]):
            raise BadModel(f"a frozen weight of {name} is not that of seed {seed}", try_="draw_(model, seed=...) first")
        places = mask.flatten().nonzero().squeeze(1)
        tensors[name + _INDEX] = places.to(torch.int32)
        tensors[name + _VALUE] = weight.flatten()[places].clone()
    tensors.update(_rest(model, kept))
    recipe = {"format": FORMAT, "seed": seed, "check": _check(model, kept)}
    partial = target.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"seeded": json.dumps(recipe)})
    partial.replace(target)
    return target


def load(model: nn.Module, path: str | Path, *, seed: int | None = None) -> nn.Module:
    """Rebuild a network that `save` wrote, bit for bit.

    Args:
        model: An unchanged model of the same architecture, filled in place.
        path: The file.
        seed: Draw the frozen weights from another seed, which gives another network; None takes the file's.

    Returns:
        The model, its masks in force.

    Raises:
        BadData: If the file is no such file, or this machine draws other weights from its seed.
        BadModel: If the model does not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            recipe = json.loads((file.metadata() or {}).get("seeded", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise BadData(f"{path} cannot be read", expected="a .safetensors file", found=str(error)) from error
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        raise BadData(f"{path} holds no seeded network", expected=f"format {FORMAT}", found=recipe)
    draw_(model, seed=recipe["seed"] if seed is None else seed)
    named = dict(model.named_parameters())
    kept: dict[str, Tensor] = {}
    for name in [key.removesuffix(_INDEX) for key in tensors if key.endswith(_INDEX)]:
        places = tensors.pop(name + _INDEX).long()
        if name not in named or (len(places) and int(places.max()) >= named[name].numel()):
            raise BadModel(f"the model does not fit {path}", expected=f"a parameter {name}")
        kept[name] = (
            torch.zeros(named[name].shape, dtype=torch.bool).view(-1).index_fill_(0, places, True).view_as(named[name])
        )
    carriers = {name: named[name].detach().clone() for name in kept}
    with torch.no_grad():
        for name, mask in kept.items():
            named[name][mask.to(named[name].device)] = tensors.pop(name + _VALUE).to(named[name].device)
    masks.attach(model, kept, carriers=carriers)
    _fill(model, tensors, str(path))
    if seed is None and _check(model, kept) != recipe["check"]:
        raise BadData(
            f"the weights of {path} are not those that were saved", try_="the library's version it was saved by"
        )
    return model


def _rest(model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return unmasked parameters and buffers by name, without the masks themselves."""
    own = {name + ending for name in kept for ending in (masks.MASK, masks.CARRIER)}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name not in kept and name not in own}


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    named = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in tensors.items():
        if name not in named or named[name].shape != tensor.shape:
            found = tuple(named[name].shape) if name in named else None
            raise BadModel(f"the model does not fit {path}", expected=f"{name} of {tuple(tensor.shape)}", found=found)
        named[name].copy_(tensor)


def _check(model: nn.Module, names: Mapping[str, object]) -> int:
    """Return a checksum of the named parameters' bytes."""
    named, found = dict(model.named_parameters()), 0
    for name in sorted(names):
        found = zlib.crc32(named[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), found)
    return found
