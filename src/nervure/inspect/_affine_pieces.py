"""Run a network on a frame of points with every unit held on one of its linear pieces, where the network is affine."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nervure._kit import Unsupported
from nervure.core.capture import undisturbed, without_draws
from nervure.core.forward import outputs, take


@dataclass(frozen=True)
class Pieces:
    """Hold a piecewise-linear function: slope_i z + offset_i for break_{i-1} < z <= break_i.

    Args:
        breaks: Rising, m of them.
        slopes: m + 1 numbers, or tensors that broadcast with a batch.
        offsets: m + 1 numbers.
    """

    breaks: tuple[float, ...]
    slopes: tuple[Any, ...]
    offsets: tuple[float, ...]

    def of(self, z: Tensor) -> Tensor:
        """Return the number of each entry's piece."""
        return sum((z > one for one in self.breaks), torch.zeros(z.shape, dtype=torch.long, device=z.device))

    def on(self, piece: Tensor, z: Tensor) -> Tensor:
        """Return the value of the given pieces, continued beyond their ends."""
        result = torch.zeros_like(z)
        for number, (slope, offset) in enumerate(zip(self.slopes, self.offsets, strict=True)):
            result = torch.where(piece == number, slope * z + offset, result)
        return result


class Chooser(Protocol):
    """Say on which piece each unit is held."""

    def pieces(self, z: Tensor, pieces: Pieces) -> Tensor:
        """Return a piece for each unit, shape (frames, units), from its values on the frames' points.

        The values have shape (frames, points, units).
        """

    def largest(self, z: Tensor, valid: Tensor) -> Tensor:
        """Return which candidate is the maximum, shape (frames, units).

        The candidates have shape (frames, points, units, candidates), of which some may not be valid.
        """


# What is linear in all tensors it is given, each row for itself or found out by the comparison with the model.
_LINEAR = frozenset((
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select", "narrow", "split",
    "split_with_sizes", "unsafe_split", "unbind", "chunk", "cat", "stack", "squeeze", "unsqueeze", "clone", "copy",
    "alias", "detach", "contiguous", "_to_copy", "index", "index_select", "gather", "flip", "roll", "repeat", "unfold",
    "im2col", "col2im", "as_strided", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "diagonal", "tril", "triu",
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "mean", "sum", "cumsum", "add", "sub",
    "rsub", "neg", "slice_scatter", "select_scatter", "fill", "zero", "masked_fill", "where", "div", "lerp",
    "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm",
))  # fmt: skip
# Places of arguments that must not depend on the input.
_STATISTICS = (1, 2, 3, 4)
_FIXED: dict[str, tuple[int, ...]] = {
    "index": (1,), "index_select": (2,), "gather": (2,), "masked_fill": (1,), "where": (0,), "div": (1,), "lerp": (2,),
    "native_batch_norm": _STATISTICS, "_native_batch_norm_legit_no_training": _STATISTICS,
    "cudnn_batch_norm": _STATISTICS, "batch_norm": _STATISTICS,
}  # fmt: skip
# Places of the factors of a product; at most one may depend on the input.
_FACTORS = {
    "mul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "addmm": (1, 2), "addmv": (1, 2),
    "addbmm": (1, 2), "baddbmm": (1, 2), "addcmul": (1, 2), "convolution": (0, 1), "linear": (0, 1), "matmul": (0, 1),
}  # fmt: skip
_CONSTANT = frozenset((
    "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"
))  # fmt: skip


def _of(breaks: Sequence[float], slopes: Sequence[Any], offsets: Sequence[float]) -> Pieces:
    """Drop what lies beyond an infinite break."""
    keep = [number for number, one in enumerate(breaks) if math.isfinite(one)]
    first = 1 if breaks[0] == -math.inf else 0
    held = slice(first, first + len(keep) + 1)
    return Pieces(tuple(breaks[n] for n in keep), tuple(slopes[held]), tuple(offsets[held]))


def _clamp(low: Any, high: Any) -> Pieces:
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return _of((low, high), (0.0, 1.0, 0.0), (low, 0.0, high))


_SITES: dict[str, Callable[..., Pieces]] = {
    "relu": lambda: _of((0.0,), (0.0, 1.0), (0.0, 0.0)),
    "leaky_relu": lambda slope=0.01: _of((0.0,), (slope, 1.0), (0.0, 0.0)),
    "_prelu_kernel": lambda slope: _of((0.0,), (slope, 1.0), (0.0, 0.0)),
    "hardtanh": lambda low=-1.0, high=1.0: _clamp(low, high),
    "clamp": lambda min=None, max=None: _clamp(min, max),
    "clamp_min": lambda min: _clamp(min, None),
    "clamp_max": lambda max: _clamp(None, max),
    "abs": lambda: _of((0.0,), (-1.0, 1.0), (0.0, 0.0)),
    "hardsigmoid": lambda: _of((-3.0, 3.0), (0.0, 1 / 6, 0.0), (0.0, 0.5, 1.0)),
    "softshrink": lambda lambd=0.5: _of((-lambd, lambd), (1.0, 0.0, 1.0), (lambd, 0.0, -lambd)),
}


class _Frames(TorchDispatchMode):
    """Follow what depends on the input, hold units on their pieces, refuse what is not piecewise linear."""

    def __init__(self, frames: int, points: int, chooser: Chooser, method: str, model: nn.Module) -> None:
        super().__init__()
        self.frames, self.points, self.chooser = frames, points, chooser
        self.method, self.model = method, model
        # A weak reference keeps the storage's identity from being given to another while the set lives.
        self.moving: set[StorageWeakRef] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled; asking the compiler to stand aside would import it, which takes seconds.
        return False

    def mark(self, value: Any) -> None:
        """Note that tensors depend on the input, and with them all views of their memory."""
        for one in tree_leaves(value):
            if isinstance(one, Tensor):
                self.moving.add(StorageWeakRef(one.untyped_storage()))

    def moves(self, value: Any) -> bool:
        """Say whether a tensor in an argument depends on the input."""
        found = [one for one in tree_leaves(value) if isinstance(one, Tensor) and one.layout == torch.strided]
        return any(StorageWeakRef(one.untyped_storage()) in self.moving for one in found)

    def refuse(self, why: str) -> Unsupported:
        return Unsupported(self.method, self.model, why=why)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.moves((args, kwargs)):
            return func(*args, **kwargs)
        whole = func._schema.name.split("::")[1]
        in_place = whole.endswith("_")
        name = whole.rstrip("_")
        if name in _CONSTANT:
            return func(*args, **kwargs)
        result: Any
        if name == "rrelu_with_noise" and not any(args[4:5]):
            lower, upper = args[2] if len(args) > 2 else 1 / 8, args[3] if len(args) > 3 else 1 / 3
            name, args = "leaky_relu", (args[0], (lower + upper) / 2)
        if name in _SITES and not self.moves((args[1:], kwargs)) and not _tensors(name, args[1:], kwargs):
            result = self._site(args[0], _SITES[name](*args[1:], **kwargs))
        elif name in ("maximum", "minimum", "max", "min") and len(args) == 2 and isinstance(args[1], Tensor):
            # max(a, b) = b + relu(a - b), min(a, b) = a - relu(a - b)
            excess = self._site(args[0] - args[1], _SITES["relu"]())
            result = args[1] + excess if name.startswith("max") else args[0] - excess
        elif name in ("max", "amax") and len(args) > 1:
            result = self._max(name, *args[1:], z=args[0], **kwargs)
        elif name == "max_pool2d_with_indices":
            result = self._pool(*args, **kwargs), func(*args, **kwargs)[1]
        else:
            self._require_linear(name, args, kwargs)
            result = func(*args, **kwargs)
            self.mark(result)
            return result
        if in_place:
            result = args[0].copy_(result)
        self.mark(result)
        return result

    def _require_linear(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        places = _FACTORS.get(name, ())
        if sum(self.moves(args[place]) for place in places if place < len(args)) > 1:
            raise self.refuse(f"{name} multiplies two things that both depend on the input")
        if name not in _LINEAR and not places:
            raise self.refuse(f"{name} is not known to be piecewise linear")
        fixed = any(self.moves(args[place]) for place in _FIXED.get(name, ()) if place < len(args))
        if fixed or kwargs.get("rounding_mode") or (name.endswith("batch_norm") and args[5] is True):
            raise self.refuse(f"{name} is not linear in an argument that depends on the input")

    def _split(self, z: Tensor) -> tuple[Tensor, int]:
        """Return (frames, points, ...) and the axis that held them."""
        rows = self.frames * self.points
        axes = [axis for axis in range(z.ndim) if z.shape[axis] == rows]
        axis = 0 if z.ndim and z.shape[0] % rows == 0 else axes[0] if axes else -1
        if axis < 0:
            raise self.refuse(f"a unit's input of shape {tuple(z.shape)} has no axis of samples")
        moved = z.movedim(axis, 0)
        return moved.reshape(self.frames, self.points, -1), axis

    def _site(self, z: Tensor, pieces: Pieces) -> Tensor:
        flat, axis = self._split(z)
        piece = self.chooser.pieces(flat, pieces)
        moved = z.movedim(axis, 0)
        spread = piece[:, None].expand(flat.shape).reshape(moved.shape).movedim(0, axis)
        return pieces.on(spread, z)

    def _largest(self, z: Tensor, valid: Tensor) -> Tensor:
        """Return the chosen one of the candidates on the last axis, rows first."""
        flat = z.reshape(self.frames, self.points, -1, z.shape[-1])
        chosen = self.chooser.largest(flat, valid.expand(z.shape).reshape(flat.shape)[0, 0])
        index = chosen[:, None, :, None].expand(*flat.shape[:-1], 1)
        return flat.gather(-1, index).reshape(z.shape[:-1])

    def _max(self, name: str, dim: Any, keepdim: bool = False, *, z: Tensor) -> Any:
        dims = [dim] if isinstance(dim, int) else list(dim)
        if len(dims) != 1 or dims[0] % z.ndim == 0 or z.shape[0] % (self.frames * self.points):
            raise self.refuse(f"{name} runs over more than one axis or over the samples")
        value = self._largest(z.movedim(dims[0], -1), torch.ones(1, dtype=torch.bool, device=z.device))
        value = value.unsqueeze(dims[0]) if keepdim else value
        if name == "amax":
            return value
        return torch.return_types.max((value, torch.max(z, dims[0], keepdim=keepdim)[1]))

    def _pool(
        self, z: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
    ) -> Tensor:
        padding, stride = _pair(padding), _pair(stride or kernel)
        places = torch.arange(1, z.shape[-1] * z.shape[-2] + 1, dtype=z.dtype, device=z.device)
        shape = {"dilation": _pair(dilation), "padding": padding, "stride": stride}
        # Entry 0 stands for the border.
        index = nn.functional.unfold(places.reshape(1, 1, *z.shape[-2:]), _pair(kernel), **shape)[0].T.long()
        sizes = torch.max_pool2d(places.reshape(1, 1, *z.shape[-2:]), kernel, stride, padding, dilation, ceil_mode)
        if sizes[0, 0].numel() != len(index) or z.ndim != 4:
            raise self.refuse("max pooling with incomplete windows")
        flat = torch.cat([z.new_zeros(*z.shape[:2], 1), z.flatten(2)], 2)
        return self._largest(flat[:, :, index], index > 0).reshape(*z.shape[:2], *sizes.shape[-2:])


def _pair(value: Any) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _tensors(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Say whether the bounds of an activation are tensors, other than PReLU's slope."""
    return name != "_prelu_kernel" and any(isinstance(one, Tensor) for one in tree_leaves((args, kwargs)))


def twin(model: nn.Module) -> nn.Module:
    """Return a copy in float64 and eval mode."""
    return copy.deepcopy(model).double().eval()


def run(
    model: nn.Module, inputs: Any, *, frames: int, points: int, chooser: Chooser, method: str = "affine_piece"
) -> Tensor:
    """Run a model on frames of points, every unit held on the piece that is chosen for its frame.

    Held so, the model is affine on each frame: points at an origin and one step along each axis give its whole map.

    Args:
        model: From `twin`.
        inputs: Floating-point tensors of frames * points rows, frame by frame, in the model's structure; other tensors
            do not move.
        frames: How many frames.
        points: Points in each.
        chooser: Holds the units; it is called in the order of execution.
        method: Who asks, for errors.

    Returns:
        The main output, shape (frames, points, outputs).

    Raises:
        Unsupported: If an operation on what depends on the input is not known to be piecewise linear.
    """
    held = _Frames(frames, points, chooser, method, model)
    held.mark([value for value in tree_leaves(inputs) if isinstance(value, Tensor) and value.is_floating_point()])
    if not held.moving:
        raise Unsupported(method, model, why="no input is a floating-point tensor")
    with undisturbed(model), torch.no_grad(), without_draws(model, method), held:
        found = outputs(model, inputs)
    if not found.ndim or len(found) != frames * points:
        raise Unsupported(method, model, why=f"its outputs of shape {tuple(found.shape)} have no axis of samples")
    return found.reshape(frames, points, -1)


def deviation(model: nn.Module, inputs: Any, expected: Tensor, method: str) -> float:
    """Compare what was found with the model itself, the first three samples one by one.

    Args:
        model: From `twin`.
        inputs: Its inputs.
        expected: What was found, shape (N, outputs).
        method: Who asks, for errors.

    Returns:
        The largest deviation.

    Raises:
        Unsupported: If it is more than rounding: then the model mixes samples.
    """
    count = len(expected)
    with torch.no_grad():
        found = torch.cat(
            [
                outputs(model, take(inputs, slice(start, stop))).reshape(stop - start, -1)
                for start, stop in itertools.pairwise([*range(min(3, count)), *sorted({min(3, count), count})])
            ]
        )
    error = float((found - expected).abs().max())
    if not error <= 1e-6 * max(1.0, float(expected.abs().max())):
        raise Unsupported(method, model, why=f"held on its pieces it is {error:.2g} from itself: it mixes samples")
    return error
