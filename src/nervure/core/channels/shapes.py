"""Rules of the operations that move, join, split or make dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nervure.core.channels.labels import Array, kept
from nervure.core.channels.trace import Dims, Rule, Trace, internal


def view(t: Trace, out: Tensor, _: Any, x: Tensor, shape: Any = None, *unused: Any, **ignored: Any) -> None:
    """Reshape: dimensions are cut into their common factors and joined again."""
    a = t.dims(x)
    labels, zero = _regroup(t, a, tuple(x.shape), tuple(out.shape))
    t.put(out, labels, zero, leaf=a.leaf)
    if isinstance(shape, list | tuple):
        t.sized(labels, shape)


def unflatten(t: Trace, out: Tensor, _: Any, x: Tensor, dim: int, sizes: Sequence[int], *names: Any) -> None:
    """Split a dimension."""
    view(t, out, None, x)
    t.sized(t.dims(out).labels[dim % x.ndim :], sizes)


def flatten(t: Trace, out: Tensor, _: Any, x: Tensor, *unused: Any, **ignored: Any) -> None:
    """Join dimensions."""
    view(t, out, None, x)


def _regroup(t: Trace, a: Dims, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[list[Array], list[bool]]:
    if 0 in before:
        return [kept(length) for length in after], [False] * len(after)
    cuts = [sorted({int(edge) for edge in np.cumprod([1, *shape])}) for shape in (before, after)]
    edges = sorted({*cuts[0], *cuts[1]})
    if any(high % low for low, high in itertools.pairwise(edges)):
        t.pin(a.labels, "a reshape shares no factors")
        return [kept(length) for length in after], [False] * len(after)
    factors: list[tuple[Array, bool]] = []
    start = 1
    for labels, zero, length in zip(a.labels, a.zero, before, strict=True):
        sizes = _between(edges, start, start * length)
        rest = labels
        for place, size in enumerate(sizes):
            last = place == len(sizes) - 1
            part, rest = (rest, rest) if last else t.labels.split(rest, size, len(rest) // size)
            factors.append((part, zero))
        start *= length
    labels_out, zero_out = [], []
    start = 1
    for length in after:
        count = len(_between(edges, start, start * length))
        parts, factors = factors[:count], factors[count:]
        joined = kept(1)
        for part, _ in parts:
            joined = t.labels.merge(joined, part)
        cuttable = [zero for part, zero in parts if part.any()]
        labels_out.append(joined)
        zero_out.append(all(cuttable) if cuttable else any(zero for _, zero in parts))
        start *= length
    return labels_out, zero_out


def _between(edges: list[int], start: int, stop: int) -> list[int]:
    """Return the ratios of neighbouring edges from start to stop."""
    inside = [edge for edge in edges if start <= edge <= stop]
    return [high // low for low, high in itertools.pairwise(inside)]


def squeeze(t: Trace, out: Tensor, _: Any, x: Tensor, dim: Any = None) -> None:
    """Drop dimensions of length 1."""
    a = t.dims(x)
    chosen = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {one % x.ndim for one in chosen if x.ndim and x.shape[one] == 1}
    _move(t, out, a, [axis for axis in range(x.ndim) if axis not in gone])


def unsqueeze(t: Trace, out: Tensor, _: Any, x: Tensor, dim: int) -> None:
    """Add a dimension of length 1."""
    a = t.dims(x)
    place = dim % out.ndim
    labels = [*a.labels[:place], kept(1), *a.labels[place:]]
    t.put(out, labels, [*a.zero[:place], False, *a.zero[place:]], leaf=a.leaf)


def _move(t: Trace, out: Tensor, a: Dims, order: Sequence[int]) -> None:
    chosen = a.take(order)
    t.put(out, chosen.labels, chosen.zero, leaf=a.leaf)


def permute(t: Trace, out: Tensor, _: Any, x: Tensor, dims: Sequence[int]) -> None:
    """Reorder dimensions."""
    _move(t, out, t.dims(x), dims)


def transpose(t: Trace, out: Tensor, _: Any, x: Tensor, first: int = 0, second: int = 1) -> None:
    """Swap two dimensions; the first two unless told."""
    order = list(range(x.ndim))
    if x.ndim > 1:
        order[first], order[second] = order[second], order[first]
    _move(t, out, t.dims(x), order)


def reverse(t: Trace, out: Tensor, _: Any, x: Tensor) -> None:
    """Reverse the dimensions."""
    _move(t, out, t.dims(x), range(x.ndim)[::-1])


def expand(t: Trace, out: Tensor, _: Any, x: Tensor, sizes: Sequence[int], **unused: Any) -> None:
    """Repeat along dimensions of length 1, as many times as asked for."""
    a = t.dims(x)
    extra = out.ndim - x.ndim
    labels: list[Array] = []
    for axis, length in enumerate(out.shape):
        known = a.labels[axis - extra] if axis >= extra else kept(1)
        labels.append(known if len(known) == length else t.labels.fresh(length))
    t.sized(labels, sizes)
    t.put(out, labels, [*([False] * extra), *a.zero])


def expand_as(t: Trace, out: Tensor, _: Any, x: Tensor, other: Tensor) -> None:
    """Repeat along dimensions of length 1, as often as another tensor is long."""
    a, b = t.dims(x), t.dims(other)
    extra = out.ndim - x.ndim
    known = [*b.labels[:extra], *(
        mine if len(mine) == len(theirs) else theirs for mine, theirs in zip(a.labels, b.labels[extra:], strict=True)
    )]  # fmt: skip
    t.put(out, known, [*([False] * extra), *(zero and x.shape[axis] > 1 for axis, zero in enumerate(a.zero))])


def repeat(t: Trace, out: Tensor, _: Any, x: Tensor, repeats: Sequence[int]) -> None:
    """Repeat whole dimensions."""
    a = t.dims(x)
    extra = out.ndim - x.ndim
    labels = [*(kept(length) for length in out.shape[:extra])]
    labels += [np.tile(one, times) for one, times in zip(a.labels, repeats[extra:], strict=True)]
    t.put(out, labels, [*([False] * extra), *a.zero])


def repeat_interleave(
    t: Trace, out: Tensor, _: Any, x: Tensor, repeats: Any = None, dim: int | None = None, **unused: Any
) -> None:
    """Repeat each index."""
    a = t.dims(x)
    if not isinstance(repeats, int) or dim is None:
        t.pin(a.labels, "it is repeated by a tensor")
        return t.put(out, [kept(length) for length in out.shape], [False] * out.ndim)
    labels = list(a.labels)
    labels[dim] = np.repeat(labels[dim], repeats)
    t.put(out, labels, a.zero)
    return None


def select(t: Trace, out: Tensor, _: Any, x: Tensor, dim: int, index: int) -> None:
    """Pick one index: the dimension stays whole, or another index would be picked."""
    a = t.dims(x)
    place = dim % x.ndim
    t.pin([a.labels[place]], "one index of it is picked")
    _move(t, out, a, [axis for axis in range(x.ndim) if axis != place])


def slice_(
    t: Trace, out: Tensor, _: Any, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> None:  # fmt: skip
    """Take a part of a dimension, which stays whole unless the part is all of it."""
    a = t.dims(x)
    labels = list(a.labels)
    if out.shape[dim] != x.shape[dim]:
        if not t.inside:
            t.pin([labels[dim]], "a fixed part of it is taken")
        labels[dim] = labels[dim][start:end:step]
    t.put(out, labels, a.zero, leaf=a.leaf)


def split(t: Trace, out: Sequence[Tensor], func: Any, x: Tensor, size: int | list[int], dim: int = 0) -> None:
    """Split by written sizes: each piece keeps its length, or follows the size it was given."""
    a, start = t.dims(x), 0
    pieces: list[Array] = []
    for piece in out:
        labels = list(a.labels)
        labels[dim] = labels[dim][start : start + piece.shape[dim]]
        start += piece.shape[dim]
        pieces.append(labels[dim])
        t.put(piece, labels, a.zero, leaf=a.leaf)
    if isinstance(size, int):
        for one in pieces:
            t.sized([one], [size])
    else:
        t.sized(pieces, size)
    if isinstance(size, int) and len({piece.shape[dim] for piece in out}) > 1:
        t.pin([a.labels[dim]], "it is split unevenly")


def chunk(t: Trace, out: Sequence[Tensor], _: Any, x: Tensor, chunks: int, dim: int = 0) -> None:
    """Split into equal parts: they lose the same places, so that they stay equal."""
    a = t.dims(x)
    count = len(out)
    if x.shape[dim] % count or count != chunks:
        t.pin([a.labels[dim]], "it is split unevenly")
        with internal(t):
            return split(t, out, None, x, [piece.shape[dim] for piece in out], dim)
    outer, inner = t.labels.split(a.labels[dim], count, x.shape[dim] // count)
    t.pin([outer], "it is split in equal parts")
    for place, piece in enumerate(out):
        labels = list(a.labels)
        labels[dim] = inner if not outer.any() and inner.any() else a.labels[dim].reshape(count, -1)[place]
        t.put(piece, labels, a.zero, leaf=a.leaf)
    return None


def gate(t: Trace, out: Tensor, _: Any, x: Tensor, dim: int = -1) -> None:
    """Multiply one half by the other one's sigmoid."""
    a = t.dims(x)
    outer, inner = t.labels.split(a.labels[dim], 2, x.shape[dim] // 2)
    t.pin([outer], "it is split in equal parts")
    labels = list(a.labels)
    labels[dim] = inner
    t.put(out, labels, a.zero)


def pack(t: Trace, out: Sequence[Tensor], _: Any, x: Tensor, *unused: Any) -> None:
    """Put sequences of several lengths into one row, or back."""
    a, row = t.dims(x), out[0]
    count = min(x.ndim, row.ndim) - 1
    lead = row.ndim - count
    t.pin(a.labels[: x.ndim - count], "it is packed")
    t.put(row, [*(kept(n) for n in row.shape[:lead]), *a.labels[-count:]], [*([False] * lead), *a.zero[-count:]])


def unbind(t: Trace, out: Sequence[Tensor], _: Any, x: Tensor, dim: int = 0) -> None:
    """Take a dimension apart, which stays whole."""
    a = t.dims(x)
    place = dim % x.ndim
    t.pin([a.labels[place]], "it is taken apart")
    for piece in out:
        _move(t, piece, a, [axis for axis in range(x.ndim) if axis != place])


def cat(t: Trace, out: Tensor, _: Any, tensors: Sequence[Tensor], dim: int = 0) -> None:
    """Join along a dimension."""
    parts = [t.dims(one) for one in tensors if one.ndim == out.ndim]
    place = dim % out.ndim
    for part in parts[1:]:
        for axis in range(out.ndim):
            if axis != place:
                t.labels.unite(parts[0].labels[axis], part.labels[axis])
    labels = list(parts[0].labels)
    labels[place] = np.concatenate([part.labels[place] for part in parts])
    t.put(out, labels, [all(part.zero[axis] for part in parts) for axis in range(out.ndim)])


def stack(t: Trace, out: Tensor, _: Any, tensors: Sequence[Tensor], dim: int = 0) -> None:
    """Join along a new dimension."""
    parts = [t.dims(one) for one in tensors]
    for part in parts[1:]:
        t.same(parts[0].labels, part.labels)
    place = dim % out.ndim
    labels, zero = list(parts[0].labels), [all(flags) for flags in zip(*(part.zero for part in parts), strict=True)]
    t.put(out, [*labels[:place], kept(len(tensors)), *labels[place:]], [*zero[:place], False, *zero[place:]])


def pad(t: Trace, out: Tensor, _: Any, x: Tensor, amounts: Sequence[int], *rest: Any, **unused: Any) -> None:
    """Pad: what is added is never cut; what reflects or repeats keeps the dimension whole."""
    a = t.dims(x)
    value = rest[-1] if rest and not isinstance(rest[-1], str) else None
    constant = not rest or not isinstance(rest[0], str) or rest[0] == "constant"
    labels = list(a.labels)
    for place, axis in enumerate(range(x.ndim - 1, x.ndim - 1 - len(amounts) // 2, -1)):
        low, high = amounts[2 * place], amounts[2 * place + 1]
        if (not constant or min(low, high) < 0) and (low or high):
            t.pin([labels[axis]], "it is padded by its own values")
            labels[axis] = kept(out.shape[axis])
        elif low or high:
            labels[axis] = np.concatenate([kept(low), labels[axis], kept(high)])
    t.put(out, labels, [zero and not value for zero in a.zero])


def index(t: Trace, out: Tensor, _: Any, x: Tensor, indices: Sequence[Tensor | None]) -> None:
    """Index by tensors: the dimensions they look up stay whole, the others keep their labels."""
    a = t.dims(x)
    looked, axis = [], 0
    places: list[int] = []
    for one in indices:
        width = 1 if one is None or not _boolean(one) else one.ndim
        if one is not None:
            looked += list(range(axis, axis + width))
        else:
            places += list(range(axis, axis + width))
        axis += width
    places += list(range(axis, x.ndim))
    t.pin([a.labels[one] for one in looked], "it is looked up by number")
    together = looked == list(range(looked[0], looked[-1] + 1)) if looked else True
    before = [place for place in places if looked and together and place < looked[0]]
    after = [place for place in places if place not in before]
    count = out.ndim - len(before) - len(after)
    middle = [kept(length) for length in out.shape[len(before) : len(before) + count]]
    t.put(
        out,
        [*(a.labels[one] for one in before), *middle, *(a.labels[one] for one in after)],
        [*(a.zero[one] for one in before), *([False] * count), *(a.zero[one] for one in after)],
    )


def _boolean(one: Tensor) -> bool:
    return one.dtype in (torch.bool, torch.uint8)


def index_select(t: Trace, out: Tensor, _: Any, x: Tensor, dim: int, indices: Tensor) -> None:
    """Look indices up: the dimension stays whole."""
    a = t.dims(x)
    labels = list(a.labels)
    t.pin([labels[dim]], "it is looked up by number")
    labels[dim] = kept(out.shape[dim])
    t.put(out, labels, a.zero)


def roll(t: Trace, out: Tensor, _: Any, x: Tensor, amounts: Any = (), dims: Any = ()) -> None:
    """Move indices along dimensions, which stay whole."""
    a = t.dims(x)
    chosen = amounts if not dims and not isinstance(dims, int) else dims
    axes = [chosen] if isinstance(chosen, int) else list(chosen)
    t.pin([a.labels[axis] for axis in axes], "it is rolled or flipped")
    t.put(out, a.labels, a.zero)


def channel_shuffle(t: Trace, out: Tensor, _: Any, x: Tensor, groups: int) -> None:
    """Swap groups and places in the groups."""
    a = t.dims(x)
    outer, inner = t.labels.split(a.labels[1], groups, x.shape[1] // groups)
    t.sized([outer], [groups])
    t.put(out, [a.labels[0], t.labels.merge(inner, outer), *a.labels[2:]], a.zero)


def pixel_shuffle(t: Trace, out: Tensor, _: Any, x: Tensor, factor: int) -> None:
    """Turn channels into space: all that make up one pixel of space stay."""
    a = t.dims(x)
    channel, inner = t.labels.split(a.labels[-3], x.shape[-3] // factor**2, factor**2)
    t.pin([inner, *a.labels[-2:]], "it becomes space")
    lead = a.labels[:-3]
    t.put(out, [*lead, channel, *(kept(n) for n in out.shape[-2:])], [*a.zero[:-3], a.zero[-3], False, False])


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "_reshape_alias"), view),
    "flatten": flatten,
    "unflatten": unflatten,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t"), transpose),
    "numpy_T": reverse,
    **dict.fromkeys(("expand", "broadcast_to"), expand),
    "expand_as": expand_as,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    "select": select,
    "slice": slice_,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), split),
    **dict.fromkeys(("chunk", "unsafe_chunk"), chunk),
    "unbind": unbind,
    "glu": gate,
    **dict.fromkeys(("_pack_padded_sequence", "_pad_packed_sequence"), pack),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack,
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    "index": index,
    "index_select": index_select,
    **dict.fromkeys(("roll", "flip"), roll),
    "channel_shuffle": channel_shuffle,
    "pixel_shuffle": pixel_shuffle,
}  # fmt: skip
