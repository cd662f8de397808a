"""What moves together: the rules of the channel graph, except that permuting changes no size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nervure.core.channels import layers, shapes, sources, values
from nervure.core.channels.trace import Dims, Rule, Trace, internal
from nervure.core.channels.watch import Rules


def _sizeless(rule: Rule) -> Rule:
    """Follow an operation without what it says about sizes."""

    def followed(t: Trace, *args: Any, **kwargs: Any) -> None:
        with internal(t):
            rule(t, *args, **kwargs)

    return followed


def _chunk(t: Trace, out: Sequence[Tensor], _: Any, x: Tensor, chunks: int, dim: int = 0) -> None:
    """Split into parts, which need not move alike."""
    shapes.split(t, out, None, x, [piece.shape[dim] for piece in out], dim)


def _attention(
    t: Trace, out: Any, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int,
    in_weight: Tensor | None, in_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero: bool,
    dropout: float, out_weight: Tensor, out_bias: Tensor | None, *unused: Any, use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None,
    **ignored: Any,
) -> None:  # fmt: skip
    """Torch's own attention: heads move whole; queries move with keys, values with the layer that reads them."""
    parts = [t.dims(one) for one in (query, key, value)]
    head = t.labels.fresh(heads)
    asked, read = (t.labels.merge(head, t.labels.fresh(width // heads)) for _ in range(2))
    rows = (asked, asked, read)
    packed = np.concatenate(rows)
    if use_separate_proj_weight:
        projections = [t.dims(one) for one in (q_proj_weight, k_proj_weight, v_proj_weight) if one is not None]
        for projection, labels in zip(projections, rows, strict=True):
            t.labels.unite(projection.labels[0], labels)
    else:
        known = t.dims(in_weight)  # type: ignore[arg-type]
        t.labels.unite(known.labels[0], packed)
        projections = [Dims([labels, known.labels[1]], known.zero, leaf=True) for labels in rows]
    for part, projection in zip(parts, projections, strict=True):
        t.contract(part, -1, projection, 1)
    if in_bias is not None:
        t.labels.unite(t.dims(in_bias).labels[0], packed)
    for bias, labels in ((bias_k, asked), (bias_v, read)):
        if bias is not None:
            t.labels.unite(t.dims(bias).labels[-1], labels)
    last = t.dims(out_weight)
    t.labels.unite(last.labels[1], read)
    t.consumed.append(last.labels[1])
    if out_bias is not None:
        t.same(t.dims(out_bias).labels, last.labels[:1])
    result, weights = out
    t.put(result, [*parts[0].labels[:-1], last.labels[0]], [False] * result.ndim)
    if weights is not None:
        t.put(weights, [np.zeros(length, np.int64) for length in weights.shape], [False] * weights.ndim)


def _rules() -> Rules:
    known = {**sources.RULES, **shapes.RULES, **values.RULES, **layers.RULES}
    known |= dict.fromkeys(("chunk", "unsafe_chunk"), _chunk)
    followed = {name: rule if rule is shapes.slice_ else _sizeless(rule) for name, rule in known.items()}
    return Rules(followed, _sizeless(values.pointwise), _sizeless(sources.unknown), _sizeless(_attention))


RULES = _rules()
