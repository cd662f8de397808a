"""Frozen random weights under learnt masks: what the supermask papers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nervure._kit import Unsupported
from nervure.core import forward, modules, rng

LAYERS = (nn.Linear, *modules.CONVOLUTIONS, *modules.TRANSPOSED)
ELU_SECOND_MOMENT = 0.6449  # of ELU applied to a standard normal variable
Make = Callable[[Tensor, str], "Mask"]


class Mask(nn.Module):
    """Turn learnt scores into a weight: frozen times mask. Subclasses say what the mask is.

    Args:
        frozen: The weight that is never trained.
        scores: First values of what is learnt in its place.
    """

    frozen: Tensor

    def __init__(self, frozen: Tensor, scores: Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen", frozen)
        self._first = scores

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the first scores; what the layer held before is replaced."""
        return self._first

    def forward(self, scores: Tensor) -> Tensor:
        """Return the weight."""
        return self.frozen * self.mask(scores)

    def mask(self, scores: Tensor) -> Tensor:
        """Return the mask, with the gradient of its straight-through estimate.

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a subclass defines mask(scores)")


def put_on_(model: nn.Module, make: Make, *, method: str) -> nn.Module:
    """Freeze a model and put a mask on the weight of every linear and convolution layer, in place.

    Biases become zero, norms plain, and nothing but the masks' scores is trained.

    Args:
        model: The model.
        make: From (weight, name) to the mask.
        method: Name of the method, for errors.

    Returns:
        The same model.

    Raises:
        Unsupported: If a weight belongs to another kind of layer, or to two of them.
    """
    names = {module: name for name, module in model.named_modules()}
    places = modules.owners(model)
    found: dict[str, nn.Module] = {}
    for name in modules.weights(model):
        module, attribute = places[name][0]
        if not isinstance(module, LAYERS) or attribute != "weight":
            raise Unsupported(
                method, module, why=f"{name} belongs to no linear or convolution layer", try_="pruning, which takes it"
            )
        if len(places[name]) > 1:
            raise Unsupported(method, module, why=f"{name} is tied to another layer's", try_="an untied model")
        found[names[module]] = module
    if not found:
        raise Unsupported(method, model, why="it has no trainable linear or convolution layer")
    for name, module in found.items():
        parametrize.register_parametrization(module, "weight", make(_weight(module).detach(), name), unsafe=True)
    for module in model.modules():
        _freeze(module)
    return model


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise Unsupported("a supermask", module, why="its weight is no tensor")
    return weight


@torch.no_grad()
def _freeze(module: nn.Module) -> None:
    """Zero and freeze biases, and make norms plain; the scores of masks stay trainable."""
    if isinstance(module, parametrize.ParametrizationList | Mask):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, modules.NORMS) and name == "weight":
            parameter.fill_(1)
        elif name == "bias":
            parameter.zero_()
        parameter.requires_grad_(False)


def on(model: nn.Module) -> Iterator[tuple[str, Mask, Tensor]]:
    """Go through the masks of a model.

    Args:
        model: What `put_on_` returned.

    Yields:
        Name of the layer, mask, scores.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            stack = module.parametrizations.weight
            mask = stack[0]
            if isinstance(mask, Mask):
                yield name, mask, stack.original


def freeze_(model: nn.Module) -> nn.Module:
    """Take masks off in place and leave the weights they make in eval mode, as an ordinary network.

    Args:
        model: What `put_on_` returned.

    Returns:
        The same model, all of whose parameters may be trained again.
    """
    with forward.mode(model, train=False):
        for name, _, _ in list(on(model)):
            parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=True)
    return model.requires_grad_(True)


def density(model: nn.Module) -> float:
    """Return the share of masked weights that are not zero in eval mode.

    Args:
        model: What `put_on_` returned.

    Returns:
        A number in [0, 1].
    """
    with torch.no_grad(), forward.mode(model, train=False):
        found = [(int(torch.count_nonzero(mask(scores))), scores.numel()) for _, mask, scores in on(model)]
    return sum(kept for kept, _ in found) / max(1, sum(total for _, total in found))


def signed_constants(like: Tensor, *, gain: Literal["elu", "relu"], seed: int, name: str) -> Tensor:
    """Return signs by chance times the standard deviation that keeps the variance of activations.

    Args:
        like: The weight to replace, shape (out, in, ...).
        gain: The activation the network uses.
        seed: Draws the signs.
        name: Makes each layer's its own.

    Returns:
        A tensor like it.
    """
    fan_in = max(1, like.numel() // like.shape[0])
    moment = ELU_SECOND_MOMENT if gain == "elu" else 0.5
    draw = torch.randint(0, 2, like.shape, generator=rng.generator("signs", seed, name)) * 2 - 1
    return draw.to(like.device, like.dtype) / math.sqrt(moment * fan_in)
