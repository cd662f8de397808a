"""Rules of the operations that carry weights: products, convolutions, norms, attention, recurrence, embedding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from nervure.core.channels.labels import Array, kept
from nervure.core.channels.trace import Dims, Follow, Rule, Trace

_CONV = nn.modules.conv._ConvNd
_SCALE = "attention is scaled by it"


def linear(t: Trace, out: Tensor, _: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Sum over the last dimension; rows of the weight become the last one."""
    a, w = t.dims(x), t.dims(weight)
    t.contract(a, -1, w, -1)
    rows, zero = (w.labels[:1], w.zero[:1]) if weight.ndim == 2 else ([], [])
    if bias is not None and rows:
        b = t.dims(bias)
        t.same(b.labels, rows)
        zero = [zero[0] and b.zero[0]]
    t.put(out, [*a.labels[:-1], *rows], [*(z and bias is None for z in a.zero[:-1]), *zero])


def matmul(t: Trace, out: Tensor, _: Any, left: Tensor, right: Tensor, **unused: Any) -> None:
    """Multiply matrices, batched or not."""
    _product(t, out, t.dims(left), t.dims(right))


def _product(t: Trace, out: Tensor, a: Dims, b: Dims) -> None:
    t.contract(a, -1, b, -2 if len(b.labels) > 1 else 0)
    lead_a, lead_b = a.take(range(len(a.labels) - 2)), b.take(range(len(b.labels) - 2))
    batch = broadcast(t, [lead_a, lead_b], len(out.shape[: max(len(lead_a.labels), len(lead_b.labels))]), every=False)
    rows = a.take([-2]) if len(a.labels) > 1 else Dims([], [])
    columns = b.take([-1]) if len(b.labels) > 1 else Dims([], [])
    parts = (batch, rows, columns)
    t.put(out, [one for part in parts for one in part.labels], [one for part in parts for one in part.zero])


def addmm(t: Trace, out: Tensor, _: Any, bias: Tensor, left: Tensor, right: Tensor, **unused: Any) -> None:
    """Multiply matrices and add."""
    _product(t, out, t.dims(left), t.dims(right))
    product = t.dims(out)
    whole = broadcast(t, [t.dims(bias), product], out.ndim, every=True)
    t.put(out, whole.labels, whole.zero)


def broadcast(t: Trace, parts: list[Dims], ndim: int, *, every: bool) -> Dims:
    """Unite dimensions aligned at the right; `every` asks all values to be zero, as in a sum, otherwise any."""
    labels: list[Array] = []
    zero: list[bool] = []
    for axis in range(-ndim, 0):
        here = [(part.labels[axis], part.zero[axis]) for part in parts if len(part.labels) >= -axis]
        length = max((len(one) for one, _ in here), default=1)
        full = [(one, flag) for one, flag in here if len(one) == length]
        first = next((one for one, _ in full if one.any()), full[0][0])
        for one, _ in full:
            t.labels.unite(first, one)
        flags = [flag for _, flag in full]
        labels.append(first)
        zero.append(all(flags) and len(full) == len(parts) if every else any(flags))
    return Dims(labels, zero)


def convolution(
    t: Trace, out: Tensor, _: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> None:  # fmt: skip
    """Convolve; see `_convolve`."""
    _convolve(t, out, x, weight, bias, groups, transposed=False)


def transposed(
    t: Trace, out: Tensor, _: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> None:  # fmt: skip
    """Convolve transposed; see `_convolve`."""
    _convolve(t, out, x, weight, bias, groups, transposed=True)


def _convolve(
    t: Trace, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, *, transposed: bool
) -> None:
    """Sum over the input channels of each group; axis 0 of a transposed weight is the input."""
    a, w = t.dims(x), t.dims(weight)
    channel = a.labels[-weight.ndim + 1]
    if groups == 1:
        enters, leaves = (w.labels[0], w.labels[1]) if transposed else (w.labels[1], w.labels[0])
        t.labels.unite(channel, enters)
    else:
        in_group, inputs = t.labels.split(channel, groups, len(channel) // groups)
        outputs = weight.shape[1] if transposed else weight.shape[0] // groups
        leaves = _grouped(t, in_group, t.labels.fresh(outputs))
        if transposed:
            t.labels.unite(w.labels[0], channel)
            enters, inner = channel, t.labels.split(leaves, groups, outputs)[1]
            t.labels.unite(w.labels[1], inner)
        else:
            t.labels.unite(w.labels[0], leaves)
            t.labels.unite(w.labels[1], inputs)
            enters = inputs
        if isinstance(t.module, _CONV):
            t.follows.append(Follow(t.path[-1][0], "groups", (in_group,)))
        else:
            t.sized([in_group], [groups])
    t.consumed.append(w.labels[0] if transposed else w.labels[1])
    if not a.zero[-weight.ndim + 1]:
        t.live_at(channel)
    for spatial in (*w.labels[2:], *a.labels[len(a.labels) - weight.ndim + 2 :]):
        t.labels.unite(spatial, kept(len(spatial)))
        t.space.append(spatial)
    if bias is not None:
        t.same(t.dims(bias).labels, [leaves])
    batch = a.labels[: -weight.ndim + 1]
    spatial_out = [kept(length) for length in out.shape[len(batch) + 1 :]]
    t.put(out, [*batch, leaves, *spatial_out], [*(False for _ in batch), True, *(False for _ in spatial_out)])


def _grouped(t: Trace, outer: Array, inner: Array) -> Array:
    """Return labels of (group, place in the group) pairs; a group of one is the group itself."""
    return outer if len(inner) == 1 else t.labels.merge(outer, inner)


def batch_norm(
    t: Trace, out: Any, _: Any, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    running_mean: Tensor | None = None, running_var: Tensor | None = None, *unused: Any, **ignored: Any,
) -> None:  # fmt: skip
    """Normalise each channel by itself, with what is stored of it."""
    a = t.dims(x)
    per_channel = [one for one in (weight, bias, running_mean, running_var) if one is not None]
    for one in per_channel:
        t.same(t.dims(one).labels, [a.labels[1]])
    zero = [False] * x.ndim
    zero[1] = weight is not None or a.zero[1]
    if not per_channel and hasattr(t.module, "num_features"):
        t.follows.append(Follow(t.path[-1][0], "num_features", (a.labels[1],)))
    t.put(out, a.labels, zero)


def layer_norm(
    t: Trace, out: Any, _: Any, x: Tensor, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None,
    *unused: Any, **ignored: Any,
) -> None:  # fmt: skip
    """Normalise over the last dimensions."""
    a, count = t.dims(x), len(shape)
    normed = a.labels[-count:]
    for labels in normed:
        t.mark_uneven(labels, "it is normalised over")
    for one in (weight, bias):
        if isinstance(one, Tensor):
            t.same(t.dims(one).labels, normed)
    if isinstance(t.module, nn.LayerNorm | nn.RMSNorm):
        t.follows.append(Follow(t.path[-1][0], "normalized_shape", tuple(normed)))
    else:
        t.sized(normed, shape)
    scaled = isinstance(weight, Tensor)
    t.put(out, a.labels, [*([False] * (x.ndim - count)), *(scaled or zero for zero in a.zero[-count:])])


def group_norm(
    t: Trace, out: Any, _: Any, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    *unused: Any, **ignored: Any,
) -> None:  # fmt: skip
    """Normalise over groups of channels: a whole group can go without a trace, a channel of each cannot."""
    a = t.dims(x)
    channel = a.labels[1]
    outer, inner = t.labels.split(channel, groups, len(channel) // groups)
    t.mark_uneven(inner, "it is normalised over")
    for one in (weight, bias):
        if one is not None:
            t.same(t.dims(one).labels, [channel])
    if isinstance(t.module, nn.GroupNorm):
        t.follows += [
            Follow(t.path[-1][0], "num_groups", (outer,)),
            Follow(t.path[-1][0], "num_channels", (channel,)),
        ]
    else:
        t.sized([outer], [groups])
    t.put(out, a.labels, [False, weight is not None or a.zero[1], *([False] * (x.ndim - 2))])


def weight_norm(t: Trace, out: Sequence[Tensor], _: Any, v: Tensor, g: Tensor, dim: int = 0) -> None:
    """A direction times a length: rows that are zero have no direction."""
    a, length = t.dims(v), t.dims(g)
    t.labels.unite(a.labels[dim], length.labels[dim])
    t.mark_uneven(a.labels[dim], "its norm is divided by")
    t.put(out[0], a.labels, a.zero, leaf=a.leaf)
    t.put(out[1], length.labels, length.zero)


def embedding(t: Trace, out: Tensor, _: Any, weight: Tensor, indices: Tensor, *unused: Any, **ignored: Any) -> None:
    """Look rows up."""
    w, a = t.dims(weight), t.dims(indices)
    t.pin(w.labels[:1], "its rows are looked up by number")
    t.put(out, [*a.labels, w.labels[1]], [*([False] * indices.ndim), w.zero[1]])


def einsum(t: Trace, out: Tensor, _: Any, equation: str, operands: list[Tensor], **unused: Any) -> None:
    """Name the dimensions by letters; those not in the result are summed over."""
    left, _arrow, right = equation.replace(" ", "").partition("->")
    names = [_letters(term, operand.ndim) for term, operand in zip(left.split(","), operands, strict=True)]
    every = [name for term in names for name in term]
    hidden = [name for name in dict.fromkeys(every) if len(name) > 1]
    plain = sorted(name for name in set(every) if len(name) == 1 and every.count(name) == 1)
    result = _letters(right, out.ndim) if _arrow else [*sorted(hidden), *plain]
    where: dict[str, list[tuple[Dims, int]]] = {}
    for term, operand in zip(names, operands, strict=True):
        known = t.dims(operand)
        for axis, name in enumerate(term):
            where.setdefault(name, []).append((known, axis))
    for name, uses in where.items():
        long = [use for use in uses if len(use[0].labels[use[1]]) > 1] or uses
        where[name] = long
        for one, other in itertools.pairwise(long):
            t.labels.unite(one[0].labels[one[1]], other[0].labels[other[1]])
        if name not in result:
            t.consumed += [known.labels[axis] for known, axis in long if known.leaf]
            if not any(known.zero[axis] for known, axis in long):
                t.mark_uneven(long[0][0].labels[long[0][1]], "a sum over it has terms other than zero")
            if not any(known.zero[axis] and not known.leaf for known, axis in long):
                t.live_at(long[0][0].labels[long[0][1]])
    t.put(
        out,
        [where[name][0][0].labels[where[name][0][1]] for name in result],
        [any(known.zero[axis] for known, axis in where[name]) for name in result],
    )


def _letters(term: str, ndim: int) -> list[str]:
    """Return a name for each dimension of a term; those of an ellipsis are numbered from the right."""
    before, dots, after = term.partition("...")
    count = ndim - len(before) - len(after) if dots else 0
    return [*before, *(f"...{9 - place}" for place in range(count, 0, -1)), *after]


def attention(
    t: Trace, out: Tensor, _: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> None:  # fmt: skip
    """Attend: features are summed over, keys go through a softmax, heads are a batch, shared or not."""
    q, k, v = t.dims(query), t.dims(key), t.dims(value)
    t.contract(q, -1, k, -1)
    if scale is None:
        t.mark_uneven(q.labels[-1], _SCALE)
    t.labels.unite(k.labels[-2], v.labels[-2])
    t.mark_uneven(k.labels[-2], "a softmax runs over it")
    heads = [part.take(range(len(part.labels) - 2)) for part in (q, k, v)]
    if enable_gqa and query.ndim > 2 and query.shape[-3] != key.shape[-3]:
        shared = t.labels.split(q.labels[-3], key.shape[-3], query.shape[-3] // key.shape[-3])[0]
        for part in heads[1:]:
            t.labels.unite(shared, part.labels[-1])
        # A head of the value serves several of the query, which can go without it.
        heads = [heads[0], *(Dims([*one.labels[:-1], q.labels[-3]], [*one.zero[:-1], False]) for one in heads[1:])]
    if attn_mask is not None:
        mask = t.dims(attn_mask)
        broadcast(t, [mask, Dims([*heads[0].labels, q.labels[-2], k.labels[-2]], [False] * query.ndim)], query.ndim,
                  every=False)  # fmt: skip
    batch = broadcast(t, [heads[0], heads[1], heads[2]], query.ndim - 2, every=False)
    t.put(out, [*batch.labels, q.labels[-2], v.labels[-1]], [*heads[2].zero, False, v.zero[-1]])


def recurrent(
    t: Trace, out: tuple[Tensor, ...], func: Any, first: Tensor, second: Any, third: Any, fourth: Any, *rest: Any
) -> None:
    """LSTM, GRU and plain recurrent layers: all layers and directions have one hidden size, as torch demands."""
    kind = func._schema.name.split("::", 1)[1]
    packed = isinstance(fourth, list | tuple)  # data, batch_sizes, hx, params; otherwise input, hx, params, has_biases
    states, weights, biased = (third, fourth, rest[0]) if packed else (second, third, fourth)
    tail = rest[1:] if packed else rest
    bidirectional = tail[3]
    batch_first = False if packed else tail[4]
    states = [states] if isinstance(states, Tensor) else list(states)
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    a, initial = t.dims(first), [t.dims(state) for state in states]
    hidden = t.labels.fresh(states[-1].shape[-1])
    t.labels.unite(initial[-1].labels[-1], hidden)
    projected = kind == "lstm" and states[0].shape[-1] != states[1].shape[-1]
    shown = t.labels.fresh(states[0].shape[-1]) if projected else hidden
    t.labels.unite(initial[0].labels[-1], shown)
    each = 2 + 2 * bool(biased) + projected
    directions = 2 if bidirectional else 1
    below, zero_below = a.labels[-1], a.zero[-1]
    flat = [weights[start : start + each] for start in range(0, len(weights), each)]
    for layer in range(0, len(flat), directions):
        for parts in flat[layer : layer + directions]:
            known = [t.dims(part) for part in parts]
            t.labels.unite(known[0].labels[1], below)
            t.labels.unite(known[1].labels[1], shown)
            t.consumed += [known[0].labels[1], known[1].labels[1]]
            for part in known[: each - projected]:
                t.labels.unite(part.labels[0], np.tile(hidden, gates))
            if projected:
                t.same(known[-1].labels, [shown, hidden])
                t.consumed.append(known[-1].labels[1])
        if not zero_below:
            t.live_at(below)
        below, zero_below = np.tile(shown, directions), True
    zero = all(part.zero[-1] for part in initial)
    lead = a.labels[:-1]
    t.put(out[0], [*lead, below], [*(False for _ in lead), zero])
    middle = initial[0].labels[1:-1] if packed or first.ndim < 3 else [a.labels[0 if batch_first else 1]]
    for state, labels in zip(out[1:], (shown, hidden), strict=False):
        if isinstance(state, Tensor) and state.ndim == len(middle) + 2:
            t.put(state, [kept(len(state)), *middle, labels], [False, *(False for _ in middle), zero])


def cell(
    t: Trace, out: Any, func: Any, x: Tensor, state: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of a recurrent layer: what comes out is indexed as what went in."""
    states = [state] if isinstance(state, Tensor) else list(state)
    before, a, enter, loop = [t.dims(one) for one in states], t.dims(x), t.dims(w_ih), t.dims(w_hh)
    hidden = before[0].labels[-1] if before[0].labels[-1].any() else loop.labels[1]
    t.contract(a, -1, enter, 1)
    t.consumed.append(loop.labels[1])
    for labels in (*(known.labels[-1] for known in before), loop.labels[1]):
        t.labels.unite(labels, hidden)
    for weight in (w_ih, w_hh, b_ih, b_hh):
        if weight is not None:
            t.labels.unite(t.dims(weight).labels[0], np.tile(hidden, len(weight) // len(hidden)))
    zero = all(known.zero[-1] for known in before)
    lead = a.labels[:-1]
    for one in (out,) if isinstance(out, Tensor) else out:
        t.put(one, [*lead, hidden], [*([False] * len(lead)), zero])


def multi_head(
    t: Trace, out: Any, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int,
    in_weight: Tensor | None, in_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero: bool,
    dropout: float, out_weight: Tensor, out_bias: Tensor | None, *unused: Any, use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None,
    **ignored: Any,
) -> None:  # fmt: skip
    """Torch's own attention: its width is that of the query, and every head has an equal share of it.

    So features go from the query's stream and from all heads at once, one of each head together.
    """
    parts = [t.dims(one) for one in (query, key, value)]
    shared = t.labels.fresh(width // heads)
    rows = np.tile(shared, heads)
    t.labels.unite(parts[0].labels[-1], rows)
    t.mark_uneven(shared, _SCALE)
    if use_separate_proj_weight:
        projections = [t.dims(one) for one in (q_proj_weight, k_proj_weight, v_proj_weight) if one is not None]
    else:
        packed = t.dims(in_weight)  # type: ignore[arg-type]
        projections = [Dims([rows, packed.labels[1]], packed.zero, leaf=True)] * 3
        t.labels.unite(packed.labels[0], np.tile(rows, 3))
    for part, projection in zip(parts, projections, strict=True):
        t.labels.unite(projection.labels[0], rows)
        t.contract(part, -1, projection, 1)
    if in_bias is not None:
        t.labels.unite(t.dims(in_bias).labels[0], np.tile(rows, 3))
    for bias in (bias_k, bias_v):
        if bias is not None:
            t.labels.unite(t.dims(bias).labels[-1], rows)
    last = t.dims(out_weight)
    t.labels.unite(last.labels[1], rows)
    t.consumed.append(last.labels[1])
    if out_bias is not None:
        t.same(t.dims(out_bias).labels, last.labels[:1])
    t.labels.unite(last.labels[0], rows)  # embed_dim is checked against both
    for part in parts[1:]:
        t.same(part.labels[:-1], parts[1].labels[:-1])
    result, weights = out
    t.put(result, [*parts[0].labels[:-1], last.labels[0]], [*([False] * (result.ndim - 1)), True])
    if weights is not None:
        t.put(weights, [kept(length) for length in weights.shape], [False] * weights.ndim)


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), addmm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed),
    **dict.fromkeys(("batch_norm", "instance_norm"), batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    "group_norm": group_norm,
    "embedding": embedding,
    "_weight_norm_interface": weight_norm,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), cell),
}
