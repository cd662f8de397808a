"""A network cut where chosen layers read: every section between two cuts is a function of what its layers read."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nervure._kit import BadData, NoEffect, Unsupported
from nervure.core.forward import batch_size, tree_map
from nervure.core.graph import Stage, as_batches
from nervure.spec import Batch

_LINEAR = (nn.Linear, nn.modules.conv._ConvNd)
_READERS = (*_LINEAR, nn.RNNBase)
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_BIASED = (*_LINEAR, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
METHOD = "the interaction basis"
# Most numbers of the gradients held at a time: 64 MB.
_TOGETHER = 2**23


@dataclass(frozen=True)
class Read:
    """Hold what one call of a layer reads.

    Args:
        name: The module; "#2" and so on marks its further calls.
        arriving: What arrives, as rows of units, shape (N, T, units); a function of what earlier layers read.
        leaf: What the layer reads instead: equal values, cut off the graph, in the layer's own shape.
        axis: The axis of the units in `leaf`.
        computed: Whether it was computed from parameters, unlike the raw input.
        limit: Most directions that the layer itself can tell apart.
    """

    name: str
    arriving: Tensor
    leaf: Tensor
    axis: int
    computed: bool
    limit: int


@dataclass(frozen=True)
class Cut:
    """Hold one forward pass, cut.

    Args:
        reads: What the layers read, in order of execution; the last one is the model's output, which nothing reads.
        constant: The constant unit that feeds the biases, shape (N,).
        weight: Its weight in the integral over scaled inputs.
    """

    reads: tuple[Read, ...]
    constant: Tensor
    weight: float = 1.0

    def pull(self, index: int, cotangents: Tensor, constant: Tensor) -> dict[int, Tensor]:
        """Return the gradients of what arrives at one layer, with respect to what earlier ones read.

        Args:
            index: Which layer.
            cotangents: Shape (K, N, T, units).
            constant: What its own constant unit adds to each, shape (K, N).

        Returns:
            Index of every layer it depends on directly -> gradients, shape (K, N, T', units' + 1). The last unit is
            the constant one; biases act at all positions alike.
        """
        value = self.reads[index].arriving
        if not value.requires_grad or not index:
            return {}
        parents = self.reads[:index]
        found = _gradients(value, [*(read.leaf for read in parents), self.constant], cotangents)
        bias = constant if found[-1] is None else constant + found[-1]
        pulled = {}
        for place, (read, gradient) in enumerate(zip(parents, found[:-1], strict=True)):
            if gradient is not None:
                units = _rows(gradient.flatten(0, 1), read.axis).unflatten(0, gradient.shape[:2])
                share = (bias / units.shape[2])[..., None, None].expand(*units.shape[:3], 1)
                pulled[place] = torch.cat([units, share], -1)
        return pulled


class Sections:
    """Run a copy of a model in eval mode and float64, cut where some layers read.

    Args:
        model: The model; it is not touched.
        batches: One batch (inputs, targets) or a sequence of batches; targets are not read.
        layers: Names of modules; None takes all linear, convolutional and recurrent layers.

    Raises:
        NoEffect: If there is no module of a name.
    """

    def __init__(self, model: nn.Module, batches: Batch | Sequence[Batch], layers: Sequence[str] | None) -> None:
        self.model = copy.deepcopy(model).double().eval()
        for value in self.model.parameters():
            value.requires_grad_(value.is_floating_point())
        named = dict(self.model.named_modules())
        missing = [] if layers is None else [name for name in layers if name not in named]
        if missing:
            raise NoEffect(f"the model has no module {', '.join(missing)}", expected="a name from named_modules()")
        self.named = layers is not None
        chosen = layers if layers is not None else [name for name, one in named.items() if isinstance(one, _READERS)]
        if not chosen:
            raise Unsupported(METHOD, model, why="it has no linear layer", try_="naming the layers to look at")
        self.layers = {name: named[name] for name in chosen}
        wide = [(tree_map(_wide, inputs), targets) for inputs, targets in as_batches(batches)]
        self.stage = Stage(self.model, wide, method=METHOD)
        self.inputs = [inputs for inputs, _ in wide]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Open a block in which the model may be run."""
        with self.stage.ready():
            yield

    def cuts(self, inputs: Any, points: int) -> list[Cut]:
        """Run one batch, cut, once or at Gauss-Legendre points of a path on which what layers read grows from zero.

        Args:
            inputs: The batch's inputs.
            points: Number of points; 0 takes the data themselves alone.

        Returns:
            One cut for each point, and first the data themselves, of weight 0 where there are others.
        """
        true = self._run(inputs)
        if not points:
            return [true]
        at, weights = np.polynomial.legendre.leggauss(points)
        leaves = [read.leaf.detach() for read in true.reads]
        scaled = [
            self._run(inputs, scale=(float(place) + 1) / 2, weight=float(weight) / 2, leaves=leaves)
            for place, weight in zip(at, weights, strict=True)
        ]
        return [Cut(true.reads, true.constant, 0.0), *scaled]

    def _run(
        self, inputs: Any, *, scale: float = 1.0, weight: float = 1.0, leaves: Sequence[Tensor] | None = None
    ) -> Cut:
        count = batch_size(inputs)
        constant = torch.full((count,), scale, dtype=torch.float64, device=self.stage.device).requires_grad_()
        reads: list[Read] = []
        calls: dict[str, int] = {}

        def read(name: str, module: nn.Module, value: Tensor) -> Tensor:
            axis = self._axis(name, module, value, count)
            calls[name] = calls.get(name, 0) + 1
            start = value.detach() if leaves is None else scale * leaves[len(reads)]
            leaf = start.clone().requires_grad_()
            label = name if calls[name] == 1 else f"{name}#{calls[name]}"
            reads.append(
                Read(label, _rows(value, axis).clone(), leaf, axis, value.requires_grad, _limit(module, value))
            )
            return leaf.clone()

        def reader(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                if not given:
                    raise Unsupported(METHOD, name, why="it reads no tensor")
                leaf = read(name, module, given[0])
                swapped = [leaf if value is given[0] else value for value in args]
                return tuple(swapped), {key: leaf if one is given[0] else one for key, one in kwargs.items()}

            return hook

        def biased(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if len(output) != count:
                why = "the first axis of what a biased layer returns is not that of samples"
                raise Unsupported(METHOD, module, why=why)
            bias: Tensor = module.bias  # type: ignore[assignment]
            shape = (-1,) + (1,) * (output.ndim - 2) if isinstance(module, _CHANNELS_FIRST) else bias.shape
            change = (constant - 1).view(-1, *[1] * (output.ndim - 1))
            return output + change * bias.view(shape)

        with ExitStack() as stack:
            for name, module in self.layers.items():
                stack.callback(module.register_forward_pre_hook(reader(name), with_kwargs=True).remove)
            for module in self.model.modules():
                if isinstance(module, _BIASED) and module.bias is not None:
                    stack.callback(module.register_forward_hook(biased, prepend=True).remove)
            output = self.stage.output(inputs)
        silent = [name for name in self.layers if name not in calls]
        if (self.named and silent) or not reads:
            raise NoEffect(f"the model never calls {', '.join(silent)}", expected="layers that are part of a forward")
        if not bool(output.isfinite().all()):
            raise BadData("the outputs are not finite", found="NaN or infinity", try_="looking at inputs and weights")
        axis = 1 if output.ndim > 3 else -1
        rows = _rows(output, axis) if output.ndim > 1 else output[:, None, None]
        reads.append(Read("output", rows, output.detach(), axis, True, rows.shape[-1]))
        return Cut(tuple(reads), constant, weight)

    def _axis(self, name: str, module: nn.Module, value: Tensor, count: int) -> int:
        """Return the axis of the units of what a layer reads.

        Raises:
            Unsupported: If it has no axis of units, or the first one is not that of samples.
        """
        late = getattr(module, "batch_first", True) is False
        if not value.is_floating_point() or value.ndim < 2 or len(value) != count or late:
            why = "what it reads must be real numbers of shape (samples, ...)"
            raise Unsupported(METHOD, name or type(module).__name__, why=why, try_="naming other layers")
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.RNNBase | nn.MultiheadAttention):
            return -1
        return 1 if isinstance(module, _CHANNELS_FIRST) or value.ndim > 3 else -1


class Runs:
    """Offer the cut runs of every batch; those of a single batch are kept.

    Args:
        sections: The model, cut.
        points: As in `Sections.cuts`.
    """

    def __init__(self, sections: Sections, points: int) -> None:
        self.sections, self.points = sections, points
        single = len(sections.inputs) == 1
        self._kept = sections.cuts(sections.inputs[0], points) if single else None

    def __iter__(self) -> Iterator[list[Cut]]:
        if self._kept is not None:
            yield self._kept
        else:
            yield from (self.sections.cuts(inputs, self.points) for inputs in self.sections.inputs)


def signs_of(
    cut: Cut, index: int, directions: int, probes: int, draw: torch.Generator
) -> Iterator[tuple[Tensor, float]]:
    """Offer combinations of a layer's directions and positions, shape (K, N, T, directions), and their weight.

    They are single ones where these are few, else random signs.

    Args:
        cut: A run of the batch.
        index: Which layer.
        directions: Its number of directions.
        probes: Most combinations.
        draw: Draws the signs.

    Yields:
        Combinations and the weight of each.
    """
    samples, positions, _ = cut.reads[index].arriving.shape
    single = positions * directions
    count = min(single, probes)
    largest = max(read.leaf.numel() for read in cut.reads[: index + 1])
    step = max(1, _TOGETHER // max(largest, samples * single, 1))
    device = cut.constant.device
    for start in range(0, count, step):
        size = min(step, count - start)
        if single <= probes:
            units = torch.eye(single, dtype=torch.float64, device=device)[start : start + size]
            yield units.view(size, 1, positions, directions).expand(-1, samples, -1, -1), 1.0
        else:
            shape = (size, samples, positions, directions)
            yield (2.0 * torch.randint(2, shape, generator=draw) - 1).double().to(device), 1 / probes


def single_of(
    cut: Cut, index: int, directions: int, probes: int, draw: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Offer the directions of a layer one by one, at single positions or under random signs of all positions.

    Args:
        cut: A run of the batch.
        index: Which layer.
        directions: Its number of directions.
        probes: Most positions that are taken singly, else the number of random signs.
        draw: Draws the signs.

    Yields:
        Combinations, shape (K, N, T, directions), the direction of each, and their weight.
    """
    samples, positions, _ = cut.reads[index].arriving.shape
    each = min(positions, probes)
    largest = max(samples * positions * directions, *(read.leaf.numel() for read in cut.reads[: index + 1]))
    for some in torch.arange(each * directions).split(max(1, _TOGETHER // largest)):
        signs = torch.zeros(len(some), samples, positions, directions, dtype=torch.float64)
        place, direction = some // max(directions, 1), some % max(directions, 1)
        if each == positions:
            signs[torch.arange(len(some)), :, place, direction] = 1
        else:
            drawn = 2 * torch.randint(2, (len(some), samples, positions), generator=draw) - 1
            signs[torch.arange(len(some)), :, :, direction] = drawn.double()
        device = cut.constant.device
        yield signs.to(device), direction.to(device), 1.0 if each == positions else 1 / each


def pulled(cuts: Sequence[Cut], index: int, C: Tensor, signs: Tensor) -> dict[int, Tensor]:
    """Return the gradients of combinations of a layer's coordinates, integrated over the points.

    Args:
        cuts: The runs of a batch.
        index: Which layer.
        C: Its rotation, shape (units + 1, directions).
        signs: The combinations, shape (K, N, T, directions).

    Returns:
        Index of every layer it depends on directly -> gradients, as in `Cut.pull`.
    """
    cotangents, constant = signs @ C[:-1].T, (signs @ C[-1]).sum(2)
    found: dict[int, Tensor] = {}
    for cut in cuts:
        if cut.weight:
            for parent, gradients in cut.pull(index, cotangents, constant).items():
                found[parent] = found.get(parent, 0) + cut.weight * gradients
    return found


def rows(read: Read) -> Tensor:
    """Return what a layer reads as rows of units.

    Args:
        read: The layer's reading.

    Returns:
        Shape (N, T, units), without a graph.
    """
    return _rows(read.leaf.detach(), read.axis)


def _rows(value: Tensor, axis: int) -> Tensor:
    if value.ndim == 2:
        return value.unsqueeze(1)
    return value.movedim(axis, -1).flatten(1, -2)


def _limit(module: nn.Module, value: Tensor) -> int:
    """Return how many directions a layer can tell apart at most; of one that is not linear, no fewer than it reads."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels * math.prod(module.kernel_size)
    return value.numel()


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _gradients(value: Tensor, inputs: Sequence[Tensor], cotangents: Tensor) -> list[Tensor | None]:
    """Return the gradients for K cotangents, shape (K, *input); together where torch can, else one by one."""
    largest = max(one.numel() for one in (value, *inputs))
    parts = cotangents.split(max(1, _TOGETHER // largest))
    found = [_part(value, inputs, part) for part in parts]
    return [None if one[0] is None else torch.cat(one) for one in zip(*found, strict=True)]


def _part(value: Tensor, inputs: Sequence[Tensor], cotangents: Tensor) -> tuple[Tensor | None, ...]:
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if len(cotangents) > 1:
        try:
            with warnings.catch_warnings():
                # Operations without a batching rule run one by one, with a warning.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return torch.autograd.grad(value, inputs, cotangents, is_grads_batched=True, **options)
        except (RuntimeError, NotImplementedError):
            pass  # An operation cannot be batched; one by one needs none.
    each = [torch.autograd.grad(value, inputs, one, **options) for one in cotangents]
    return tuple(None if one[0] is None else torch.stack(one) for one in zip(*each, strict=True))
