"""The memory of IVON: spans that a pass serves in one call, of blocks whose parameters are copied together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nervure._kit import Unsupported
from nervure.core.noise import Stream
from nervure.optim._ivon_kernels import HALF, Kernels, Rule, choose
from nervure.optim._ivon_memory import Sample, where

BLOCK = 1 << 20
"""Elements of a block; a larger parameter is a block of its own."""

ALIGN = 16
"""Elements that every parameter starts at a multiple of, so that no vector crosses a cache line."""

STAGGER = 80
"""Elements that each row starts later in its page than the one before: equal places would fight for a cache's sets."""


class Rows(NamedTuple):
    """Vectors of equal length.

    Attributes:
        hess: The Hessian.
        momentum: The momentum.
        shift: What a sample adds to the mean, then what an update adds to it.
        packed: The gradients, in memory that blocks may share.
    """

    hess: Tensor
    momentum: Tensor
    shift: Tensor
    packed: Tensor

    def cut(self, start: int, stop: int) -> Rows:
        """Return a stretch of every vector."""
        return Rows(*(row[start:stop] for row in self))


def lay_out(groups: Sequence[dict[str, Any]], state: Any, *, fused: bool) -> list[Span]:
    """Give the trainable parameters of every group, device and type their memory.

    Args:
        groups: The optimizer's groups.
        state: The optimizer's state; what it holds is taken over, and it then holds views of the memory.
        fused: Whether the passes over the memory are compiled.

    Returns:
        The spans.

    Raises:
        Unsupported: If parameters are complex.
    """
    spans: list[Span] = []
    for group in groups:
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in group["params"]:
            if p.requires_grad:
                alike.setdefault((p.device, p.dtype), []).append(p)
        for params in alike.values():
            spans += _spans(params, group, state, fused=fused)
    return spans


def _spans(params: list[Tensor], group: dict[str, Any], state: Any, *, fused: bool) -> Iterator[Span]:
    like = params[0]
    if not like.is_floating_point():
        raise Unsupported("IVON", "parameter", why=f"its type is {like.dtype}", try_="real parameters")
    kind = torch.float64 if like.dtype is torch.float64 else torch.float32
    kernels = choose(like.device, kind, fused=fused)
    parts = list(_cut(params))
    lengths = [_up(sum(map(_room, part)), 2 * HALF) for part in parts]
    length = sum(lengths)
    # Each row is memory of its own, so that what is saved with a state is (nearly) that alone.
    hess, momentum, shift, packed = (_row(length, turn, kind, like.device) for turn in range(4))
    hess.fill_(group["hess_init"])
    rows = Rows(hess, momentum, shift, packed if kernels.whole else packed[: max(lengths)].clone())
    if kernels.whole:
        yield Span(rows, parts, lengths, state, group=group, kernels=kernels)
        return
    for part, size, end in zip(parts, lengths, accumulate(lengths), strict=True):
        own = rows.cut(end - size, end)._replace(packed=rows.packed[:size])
        yield Span(own, [part], [size], state, group=group, kernels=kernels)


def _row(length: int, turn: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(length + turn * STAGGER, dtype=dtype, device=device)[turn * STAGGER :]


def _up(length: int, to: int) -> int:
    return -(-length // to) * to


def _room(parameter: Tensor) -> int:
    return _up(parameter.numel(), ALIGN)


def _cut(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    length = 0
    for p in params:
        if part and length + _room(p) > BLOCK:
            yield part
            part, length = [], 0
        part.append(p)
        length += _room(p)
    yield part


class Block:
    """Hold some neighbouring parameters, and views of memory in their shapes.

    Args:
        params: The parameters.
        rows: Their memory.
        state: The optimizer's state.
    """

    def __init__(self, params: list[Tensor], rows: Rows, state: Any) -> None:
        self.params, self.rows = params, rows
        self.sizes = [_room(p) for p in params]
        hessians, momenta, self.shift_views, self.packed_views = map(self.views, rows)
        for p, *views in zip(params, hessians, momenta, strict=True):
            old = state[p]
            for name, view in zip(("hess", "momentum"), views, strict=True):
                if name in old:
                    view.copy_(old[name])
                old[name] = view
            old.setdefault("step", 0)
        self.product: Tensor | None = None
        self.raw: Tensor | None = None

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Cut a row of the block into one vector for each parameter."""
        rows = flat[: sum(self.sizes)].split(self.sizes)
        return [row[: p.numel()] for row, p in zip(rows, self.params, strict=True)]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Cut a row of the block into one tensor of each parameter's shape."""
        return [part.view(p.shape) for part, p in zip(self.parts(flat), self.params, strict=True)]

    def keep(self) -> None:
        """Keep gradient times shift of the first sample before the second one overwrites the shift."""
        if self.product is None:
            self.raw = self.pack().clone() if self.raw is None else self.raw
            self.product = self.rows.shift * self.raw

    def forget(self) -> None:
        """Forget the samples of the last step."""
        self.product = self.raw = None

    def merge(self, before: Sequence[Tensor | None], count: int) -> None:
        """Average the block's gradient with those of the samples before it.

        Args:
            before: Gradients from before this sample, or None.
            count: Number of samples, this one included.
        """
        if count == 1 and all(grad is None for grad in before):
            return
        change = self.pack()
        if self.product is None or self.raw is None:
            self.raw = change.clone()
        else:
            self.product.lerp_(self.rows.shift * change, 1 / count)
            change.sub_(self.raw).div_(count)
            self.raw += change
        for p, old, new in zip(self.params, before, self.views(change), strict=True):
            if old is not None or p.grad is not None:
                p.grad = (new.clone() if old is None else old + new).to(p.dtype)

    def pack(self) -> Tensor:
        """Return the gradients as one vector in the state's precision, zeros where there is none.

        Raises:
            Unsupported: If a gradient is sparse.
        """
        grads = [p.grad for p in self.params]
        if any(grad is not None and grad.layout is not torch.strided for grad in grads):
            raise Unsupported("IVON", "parameter", why="its gradient is sparse", try_="sparse=False")
        filled = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(self.params, grads, strict=True)]
        torch._foreach_copy_(self.packed_views, filled)
        return self.rows.packed

    def rescale(self) -> None:
        """Put the mean of gradient times shift in the shift, scaled as the gradients were between sample and step."""
        assert self.product is not None
        assert self.raw is not None
        rows = (self.rows.shift, self.rows.packed, self.raw, self.product)
        for out, new, raw, product in zip(*map(self.parts, rows), strict=True):
            size = raw.dot(raw)
            torch.mul(product, torch.where(size > 0, new.dot(raw) / size, 0.0), out=out)

    def move(self, changes: Sequence[Tensor]) -> None:
        """Add the changes, one for each parameter, to the parameters that have a gradient."""
        where([p.grad is not None for p in self.params], torch._foreach_add_, self.params, changes)


class Span:
    """Hold neighbouring blocks of one group and serve them in one call of a pass.

    Args:
        rows: Their memory.
        parts: The parameters of each block.
        lengths: The elements of each block.
        state: The optimizer's state.
        group: Source of the hyper-parameters.
        kernels: The passes.
    """

    def __init__(
        self,
        rows: Rows,
        parts: Sequence[list[Tensor]],
        lengths: Sequence[int],
        state: Any,
        *,
        group: dict[str, Any],
        kernels: Kernels,
    ) -> None:
        self.rows, self.group, self.kernels = rows, group, kernels
        starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        self.blocks = [
            Block(part, rows.cut(start, start + length), state)
            for part, start, length in zip(parts, starts, lengths, strict=True)
        ]
        self.places = [
            (p, state[p], start + end - size, start + end)
            for block, start in zip(self.blocks, starts, strict=True)
            for p, size, end in zip(block.params, block.sizes, accumulate(block.sizes), strict=True)
        ]
        self._drawn: tuple[float, ...] | None = None
        params = [p for block in self.blocks for p in block.params]
        like = params[0]
        self.sample = Sample(
            params,
            rows.shift,
            self._views,
            partial(_row, len(rows.shift), 4, like.dtype, like.device),
            point=kernels.whole and like.dtype is rows.shift.dtype,
        )

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([len(block.rows.shift) for block in self.blocks])
        return [view for block, part in zip(self.blocks, parts, strict=True) for view in block.views(part)]

    def perturb(self, noise: Stream) -> None:
        """Draw the shift eps / sqrt(ess (h + delta)) and let the parameters hold mean plus shift."""
        self.draw(noise)
        self.sample.enter()

    def draw(self, noise: Stream) -> None:
        """Draw the shift alone, unless an update has drawn this very one already."""
        self.sample.forget()
        source = self._source(noise)
        if source != self._drawn:
            state, ess, delta, _ = source
            self.kernels.draw(self.rows.shift, self.rows.hess, state, ess, delta)
        self._drawn = None

    def _source(self, noise: Stream) -> tuple[int, float, float, int]:
        """Take words from the noise; return all that the shift depends on."""
        state = noise.take(len(self.rows.shift) // 2)
        return state, self.group["ess"], self.group["weight_decay"], self.rows.hess._version

    def update(self, scale: Tensor | None, noise: Stream) -> None:
        """Move mean, momentum and Hessian; a parameter without a gradient stays as it is.

        Args:
            scale: What the gradients were multiplied by, or None.
            noise: A copy of the stream, from which the next sample will be drawn.
        """
        source = self._source(noise)
        if all(p.grad is None for p, *_ in self.places):
            return
        for block in reversed(self.blocks):
            block.pack()
        hess, momentum, shift, grad = self.rows
        if scale is not None:
            grad.div_(scale.to(grad.device))
        runs = list(self._runs())
        several = self.blocks[0].product is not None
        ahead = self.kernels.advance is not None and not several and runs[0][0] == slice(0, self.places[-1][-1])
        if ahead:
            assert self.kernels.advance is not None
            shifted = self.sample.whole
            mean = (self.sample.row if shifted else self.sample.mean()).to(grad.dtype)
            self.kernels.advance(self._rule(runs[0][1]), shifted, hess, momentum, mean, shift, grad, source[0])
            self._drawn = (*source[:3], hess._version)
            self.sample.forget()
        else:
            self._update_runs(runs, several=several)
        for block in reversed(self.blocks):
            block.move(block.packed_views if ahead else block.shift_views)

    def _update_runs(self, runs: Sequence[tuple[slice, int]], *, several: bool) -> None:
        hess, momentum, shift, grad = self.rows
        mean = self.sample.mean().to(grad.dtype)
        factor = grad
        if several:
            for block in self.blocks:
                block.rescale()
            factor = torch.ones_like(grad)
        for place, step in runs:
            rows = (hess, momentum, mean, shift, factor, grad)
            self.kernels.update(self._rule(step), *(row[place] for row in rows))

    def _runs(self) -> Iterator[tuple[slice, int]]:
        """Count the step.

        Yields:
            Each stretch of moved parameters that have made as many steps, and their number.
        """
        counted = []
        for p, own, start, stop in self.places:
            moved = p.grad is not None
            own["step"] += moved
            counted.append((own["step"] if moved else 0, start, stop))
        for step, run in groupby(counted, key=itemgetter(0)):
            stretch = list(run)
            if step:
                yield slice(stretch[0][1], stretch[-1][2]), step

    def _rule(self, step: int) -> Rule:
        group = self.group
        beta1, beta2 = group["betas"]
        factor = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
        return Rule(
            ess=group["ess"],
            delta=group["weight_decay"],
            momentum_gain=1 - beta1,
            hess_gain=1 - beta2,
            debias=1 - beta1**step,
            lr=float(group["lr"]) * factor,
            clip=group["clip_radius"],
        )
