"""The cases: a model, its tags and batches that fit it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure._kit import UnknownId, UsageError, did_you_mean
from nervure.core import forward, rng
from nervure.zoo import conv, dense, sequence


def _vectors(features: int) -> Callable[[int, torch.Generator], Any]:
    return lambda count, draw: torch.randn(count, features, generator=draw)


def _images(size: int, channels: int = 1) -> Callable[[int, torch.Generator], Any]:
    return lambda count, draw: torch.randn(count, channels, size, size, generator=draw)


def _series(length: int = 5, features: int = 6) -> Callable[[int, torch.Generator], Any]:
    return lambda count, draw: torch.randn(count, length, features, generator=draw)


def _tokens(vocabulary: int = 20, length: int = 8) -> Callable[[int, torch.Generator], Any]:
    return lambda count, draw: torch.randint(vocabulary, (count, length), generator=draw)


def _two_inputs(count: int, draw: torch.Generator) -> dict[str, Tensor]:
    return {"left": torch.randn(count, 12, generator=draw), "right": torch.randn(count, 6, generator=draw)}


def _graphs(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    upper = (torch.rand(count, 7, 7, generator=draw) < 0.4).float().triu(1)
    return torch.randn(count, 7, 6, generator=draw), upper + upper.transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """Hold one zoo model with batches that fit it.

    Args:
        name: Its name.
        tags: What is special about it.
        make: Builds it; keyword arguments change its size.
        inputs: Draws inputs for a number of samples.
        classes: Number of classes of its targets.
    """

    name: str
    tags: frozenset[str]
    make: Callable[..., nn.Module]
    inputs: Callable[[int, torch.Generator], Any]
    classes: int = 10

    def model(self, *, seed: int = 0, **options: Any) -> nn.Module:
        """Build the model with weights drawn by the seed.

        Args:
            seed: The seed; the global generators are left alone.
            **options: Passed to the model's class.

        Returns:
            The model in train mode.
        """
        with rng.scope("zoo", self.name, seed):
            return self.make(**options)

    def batch(self, count: int = 8, *, seed: int = 0) -> tuple[Any, Tensor]:
        """Draw inputs and targets.

        Args:
            count: Number of samples.
            seed: The seed.

        Returns:
            The inputs and int64 targets.
        """
        draw = rng.generator("batch", self.name, seed)
        inputs = self.inputs(count, draw)
        shape = (count, 8) if "tokens" in self.tags else (count,)
        return inputs, torch.randint(self.classes, shape, generator=draw)

    def loss(self, model: Callable[..., Any], batch: tuple[Any, Tensor]) -> Tensor:
        """Return the mean cross-entropy of a batch, over positions too for language models.

        Args:
            model: The model, or anything callable like it.
            batch: Inputs and targets.

        Returns:
            A scalar.
        """
        scores = forward.outputs(model, batch[0])
        return F.cross_entropy(scores.flatten(0, -2), batch[1].flatten())


_CASES = {
    entry.name: entry
    for entry in (
        Case("mlp", frozenset({"dense"}), dense.MLP, _images(8)),
        Case("lenet-300-100", frozenset({"dense"}), dense.LeNet300, _images(28)),
        Case("lenet", frozenset({"conv"}), conv.LeNet, _images(28)),
        Case("deep-conv", frozenset({"conv", "in-place"}), conv.DeepConv, _images(8)),
        Case("residual-conv", frozenset({"conv", "residual", "batchnorm"}), conv.ResidualConv, _images(8)),
        Case("pre-activation", frozenset({"conv", "residual", "groupnorm"}), conv.PreActivationNet, _images(8)),
        Case("depthwise", frozenset({"conv", "grouped", "batchnorm"}), conv.DepthwiseNet, _images(8)),
        Case("u-net", frozenset({"conv", "concat", "transposed"}), conv.UNet, _images(8)),
        Case("cat-chunk", frozenset({"conv", "concat", "shared-module"}), conv.CatChunkNet, _images(8)),
        Case("vit", frozenset({"attention", "residual", "raw-parameter"}), sequence.ViT, _images(8)),
        Case("encoder", frozenset({"attention", "residual"}), sequence.EncoderNet, _series(), 4),
        Case("lstm", frozenset({"recurrent"}), lambda **o: sequence.RecurrentNet("lstm", **o), _series(), 4),
        Case("gru", frozenset({"recurrent"}), lambda **o: sequence.RecurrentNet("gru", **o), _series(), 4),
        Case("tied-lm", frozenset({"attention", "tied", "tokens"}), sequence.TiedLM, _tokens(), 20),
        Case("raw-parameter", frozenset({"dense", "raw-parameter"}), dense.RawParameter, _vectors(16), 4),
        Case("twice-used", frozenset({"dense", "shared-module"}), dense.TwiceUsed, _vectors(16), 4),
        Case("dict-tuple", frozenset({"dense", "dict-input", "tuple-output"}), dense.DictInTupleOut, _two_inputs, 4),
        Case("graph", frozenset({"dense", "tuple-input", "graph"}), dense.GraphNet, _graphs, 4),
    )
}


def names() -> list[str]:
    """Return the names of all cases."""
    return list(_CASES)


def cases(*tags: str) -> list[Case]:
    """Return the cases that have all the tags.

    Args:
        *tags: Tags; none means every case.

    Returns:
        The cases.
    """
    return [entry for entry in _CASES.values() if entry.tags.issuperset(tags)]


def case(name: str) -> Case:
    """Return one case.

    Args:
        name: Its name.

    Returns:
        The case.

    Raises:
        UnknownId: If there is none of that name.

    Examples:
        >>> sorted(case("residual-conv").tags)
        ['batchnorm', 'conv', 'residual']
    """
    if name not in _CASES:
        near = did_you_mean(name, _CASES)
        raise UnknownId(
            f"there is no zoo model {name!r}", expected=f"one of {', '.join(_CASES)}", try_=" or ".join(near)
        )
    return _CASES[name]


# Option that sets a model's hidden width, and its default: what a smaller dense network of the same kind changes.
_WIDTHS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (64, 32)},
    "lenet-300-100": {"hidden": (300, 100)},
    "deep-conv": {"width": 8},
    "residual-conv": {"widths": (8, 16)},
    "u-net": {"width": 6},
    "lstm": {"width": 12},
    "gru": {"width": 12},
}


def build(name: str, *, shape: tuple[int, ...], classes: int, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """Build a zoo model to fit a data set.

    Args:
        name: The case's name.
        shape: Shape of one sample.
        classes: Number of classes.
        seed: Draws the weights.
        scale: Factor of all hidden widths, above 0.

    Returns:
        The model.

    Raises:
        UsageError: If the model cannot take samples of that shape, or has no width to scale.
    """
    entry = case(name)
    options = _fit(entry, shape)
    if options is None:
        raise UsageError(f"the zoo model {name} cannot take samples of shape {shape}", try_="mlp, or your own --model")
    if scale != 1.0:
        if name not in _WIDTHS:
            raise UsageError(f"the width of the zoo model {name} cannot be scaled", expected=f"one of {[*_WIDTHS]}")
        options = {**options, **{key: _scaled(value, scale) for key, value in _WIDTHS[name].items()}}
    return entry.model(seed=seed, classes=classes, **options)


def _scaled(width: Any, scale: float) -> Any:
    return max(1, round(width * scale)) if isinstance(width, int) else tuple(_scaled(one, scale) for one in width)


def _fit(entry: Case, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """Return the size options that make a model take samples of the shape, or None."""
    if entry.name in ("mlp", "lenet-300-100") or (entry.name in ("raw-parameter", "twice-used") and len(shape) == 1):
        return {"features": math.prod(shape)}
    if entry.name in ("lstm", "gru", "encoder") and len(shape) == 2:
        return {"features": shape[1]}
    if len(shape) != 3 or not entry.tags.intersection({"conv", "attention"}):
        return None
    if entry.name == "lenet":
        return {"channels": shape[0], "size": shape[1]} if min(shape[1:]) >= 12 and shape[1] == shape[2] else None
    if entry.name == "vit":
        return {"channels": shape[0], "size": shape[1]} if shape[1] % 4 == 0 and shape[1] == shape[2] else None
    return {"channels": shape[0]} if "conv" in entry.tags else None
