"""Rows of the Jacobian, one for each sample and cotangent, by closed form where there is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from nervure._kit import BadData, Unsupported
from nervure.core.capture import (
    Call,
    Recording,
    explained,
    record,
    refuse_batch_statistics,
    refuse_complex,
    require_samples,
    undisturbed,
    without_draws,
)
from nervure.core.forward import batch_size, outputs, take, tree_map
from nervure.core.rules import outer_form, rule
from nervure.core.vectors import only, select

PROBE = 3


@dataclass(frozen=True)
class Outer:
    """Hold the rows of one linear layer as outer products g_n a_n'.

    Args:
        weight: Name of the weight, or None where it is not chosen.
        bias: Name of the bias, or None.
        a: Inputs, shape (N, d_in).
        g: Output gradients, shape (O, N, d_out).
    """

    weight: str | None
    bias: str | None
    a: Tensor
    g: Tensor

    def explicit(self) -> dict[str, Tensor]:
        """Return the rows in full: name -> (O, N, *shape)."""
        rows = {self.weight: self.g.unsqueeze(-1) * self.a.unsqueeze(1)} if self.weight else {}
        return {**rows, self.bias: self.g} if self.bias else rows

    def inside(self, other: Outer | None = None) -> Tensor:
        """Return what multiplies G G' in the Gram matrix: A A' for the weight, plus 1 for the bias.

        Args:
            other: The factors of the columns; None takes these.

        Returns:
            Shape (N, M).
        """
        b = self.a if other is None else other.a
        inside = self.a @ b.T if self.weight else self.a.new_zeros(len(self.a), len(b))
        return inside + 1 if self.bias else inside


@dataclass
class Rows:
    """Hold Jacobian rows of N samples under O cotangents.

    Args:
        explicit: Name -> rows, shape (O, N, *shape).
        outers: Linear layers, kept as factors.
    """

    explicit: dict[str, Tensor] = field(default_factory=dict)
    outers: list[Outer] = field(default_factory=list)


class Engine:
    """Compute Jacobian rows of one model, checked against brute force on the first samples.

    A parameter takes the closed form if every use of it in the graph is a recorded call of a layer with one, and the
    rows of up to three samples equal those of autograd on each sample alone. Otherwise it takes ``torch.func.vmap``,
    under the same check, and at last a loop over samples.

    Args:
        model: The model, as it is: its mode is not changed. Batch normalisation must be in eval mode.
        inputs: A batch's inputs; the first three samples are used.
        names: Parameters, as in `nervure.core.vectors.select`.
        closed: Whether closed forms may be used.
        method: Who asks, for error messages.

    Raises:
        BadData: If an output is not finite.
        Unsupported: If the model mixes its samples or draws random numbers, or a parameter is complex.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        names: Any = None,
        *,
        closed: bool = True,
        method: str = "per-sample gradients",
    ) -> None:
        refuse_batch_statistics(model, method)
        self.model, self.method = model, method
        self.chosen = select(model, names)
        refuse_complex(model, self.chosen, method)
        self.closed: frozenset[str] = frozenset()
        self.mapped: frozenset[str] = frozenset()
        probe = take(inputs, slice(0, PROBE))
        with only(model, self.chosen), undisturbed(model):
            self._plan(probe, closed=closed)

    @property
    def looped(self) -> frozenset[str]:
        """Return the parameters that need a loop over samples."""
        return frozenset(self.chosen) - self.closed - self.mapped

    def _plan(self, probe: Any, *, closed: bool) -> None:
        with without_draws(self.model, self.method):
            recording = record(self.model, probe, self.chosen)
        count = batch_size(probe)
        require_samples(recording.output, count)
        output = recording.output.detach()
        if not bool(output.isfinite().all()):
            raise BadData("the outputs are not finite", found="NaN or infinity", try_="looking at inputs and weights")
        self.outputs = output[0].numel()
        draw = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        cotangent = draw.to(output)[None]
        alone = torch.cat([outputs(self.model, take(probe, slice(i, i + 1))).detach() for i in range(count)])
        tolerance = torch.finfo(output.dtype).eps ** 0.5
        if alone.shape != output.shape or not _near(alone, output, output.norm(), tolerance):
            raise Unsupported(
                self.method, self.model, why="the output of a sample depends on the other samples of its batch"
            )
        truth = loop_rows(self.model, probe, cotangent, self.chosen)
        size = sum(value.norm() ** 2 for value in truth.values()) ** 0.5

        def right(rows: Mapping[str, Tensor]) -> frozenset[str]:
            return frozenset(name for name in rows if _near(rows[name], truth[name], size, tolerance))

        if closed and recording.output.requires_grad:
            names = explained(recording, self.chosen)
            self.closed = right(expand(Trace(self, probe, recording, names).closed_rows(cotangent)))
        rest = {name: value for name, value in self.chosen.items() if name not in self.closed}
        if rest:
            try:
                self.mapped = right(vmap_rows(self.model, probe, cotangent, rest))
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                # The model holds an operation vmap has no rule for; the loop needs none.
                self.mapped = frozenset()

    @contextmanager
    def trace(self, inputs: Any) -> Iterator[Trace]:
        """Run the model on a batch and offer Jacobian rows of it.

        Args:
            inputs: The batch's inputs.

        Yields:
            The trace, valid inside the block.
        """
        with only(self.model, self.chosen), undisturbed(self.model):
            recording = record(self.model, inputs, self.chosen)
            require_samples(recording.output, batch_size(inputs))
            yield Trace(self, inputs, recording, self.closed & explained(recording, self.chosen))


class Trace:
    """Hold one forward pass, from which rows for any cotangents are computed.

    Args:
        engine: The engine.
        inputs: The batch's inputs.
        recording: Its forward pass.
        names: Parameters that take the closed form.
    """

    def __init__(self, engine: Engine, inputs: Any, recording: Recording, names: frozenset[str]) -> None:
        self.engine, self.inputs, self.names = engine, inputs, names
        self.output = recording.output
        known = {id(engine.chosen[name]): name for name in names}
        self._calls: list[tuple[Call, dict[str, str]]] = []
        uses: dict[str, int] = {}
        for call in recording.calls:
            local = {key: known[id(value)] for key, value in call.module._parameters.items() if id(value) in known}
            if local:
                self._calls.append((call, local))
                for name in local.values():
                    uses[name] = uses.get(name, 0) + 1
        self._outer = [
            outer_form(call.module, call.a) and all(uses[name] == 1 for name in local.values())
            for call, local in self._calls
        ]
        self._rules = [
            None if outer else rule(call.module, call.a)
            for (call, _), outer in zip(self._calls, self._outer, strict=True)
        ]

    @property
    def factored(self) -> frozenset[str]:
        """Return the parameters whose rows stay factors and take no memory of their own."""
        pairs = zip(self._calls, self._outer, strict=True)
        return frozenset(name for (_, local), outer in pairs if outer for name in local.values())

    def rows(self, cotangents: Tensor) -> Rows:
        """Return the rows of every chosen parameter.

        Args:
            cotangents: Shape (O, N, ...): O cotangents of the output.

        Returns:
            The rows.
        """
        rows = self.closed_rows(cotangents)
        rest = {name: value for name, value in self.engine.chosen.items() if name not in self.names}
        mapped = {name: value for name, value in rest.items() if name in self.engine.mapped}
        looped = {name: value for name, value in rest.items() if name not in self.engine.mapped}
        if mapped:
            rows.explicit.update(vmap_rows(self.engine.model, self.inputs, cotangents, mapped))
        if looped:
            rows.explicit.update(loop_rows(self.engine.model, self.inputs, cotangents, looped))
        return rows

    def closed_rows(self, cotangents: Tensor) -> Rows:
        """Return the rows of the parameters with a closed form: one backward pass for each cotangent.

        Args:
            cotangents: Shape (O, N, ...).

        Returns:
            The rows.
        """
        shape = cotangents.shape[:2]
        explicit = {
            name: torch.zeros(*shape, *value.shape, dtype=value.dtype, device=value.device)
            for name, value in self.engine.chosen.items()
            if name in self.names and not any(name in local.values() for _, local in self._calls)
        }
        outer: dict[int, Tensor] = {}
        for o, cotangent in enumerate(cotangents):
            seen: set[str] = set()
            for i, g in enumerate(self._backward(cotangent)):
                local, formula = self._calls[i][1], self._rules[i]
                if formula is None:
                    outer.setdefault(i, g.new_empty(*shape, *g.shape[1:]))[o] = g
                    continue
                for key, value in formula(g).items():
                    name = local.get(key)
                    if name is None:
                        continue
                    if name in seen:
                        explicit[name][o] += value
                        continue
                    seen.add(name)
                    if len(cotangents) == 1:
                        explicit[name] = value.unsqueeze(0)
                        continue
                    if name not in explicit:
                        explicit[name] = value.new_empty(*shape, *value.shape[1:])
                    explicit[name][o] = value
        outers = [
            Outer(self._calls[i][1].get("weight"), self._calls[i][1].get("bias"), self._calls[i][0].a, g)
            for i, g in outer.items()
        ]
        return Rows(explicit, outers)

    def _backward(self, cotangent: Tensor) -> list[Tensor]:
        """Return the gradient at the output of every call; no weight gradient is computed."""
        if not self._calls:
            return []
        edges = [call.edge for call, _ in self._calls]
        found = torch.autograd.grad(self.output, edges, cotangent, retain_graph=True, allow_unused=True)
        return [
            torch.zeros(call.shape, dtype=self.output.dtype, device=self.output.device) if g is None else g
            for g, (call, _) in zip(found, self._calls, strict=True)
        ]


def _near(value: Tensor, truth: Tensor, size: Tensor | float, tolerance: float) -> bool:
    # A part far smaller than the whole is rounding, such as the gradient of a key bias before a softmax.
    scale = torch.maximum(truth.norm(), torch.as_tensor(size).to(truth) * tolerance)
    return bool((value - truth).norm() <= tolerance * scale)


def expand(rows: Rows) -> dict[str, Tensor]:
    """Return all rows in full.

    Args:
        rows: Explicit rows and factors.

    Returns:
        Name -> rows, shape (O, N, *shape).
    """
    full = dict(rows.explicit)
    for outer in rows.outers:
        full.update(outer.explicit())
    return full


def loop_rows(
    model: nn.Module, inputs: Any, cotangents: Tensor, chosen: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return Jacobian rows by brute force: autograd on each sample alone.

    Args:
        model: The model.
        inputs: A batch's inputs.
        cotangents: Shape (O, N, ...).
        chosen: Name -> parameter that requires a gradient.

    Returns:
        Name -> rows, shape (O, N, *shape).
    """
    count, number = len(cotangents), cotangents.shape[1]
    rows = {name: value.new_zeros(count, number, *value.shape) for name, value in chosen.items()}
    for n in range(number):
        output = outputs(model, take(inputs, slice(n, n + 1)))
        for o in range(count if output.requires_grad else 0):
            found = torch.autograd.grad(
                output, list(chosen.values()), cotangents[o, n : n + 1], retain_graph=o + 1 < count, allow_unused=True
            )
            for name, g in zip(chosen, found, strict=True):
                if g is not None:
                    rows[name][o, n] = g
    return rows


def vmap_rows(
    model: nn.Module, inputs: Any, cotangents: Tensor, chosen: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return Jacobian rows by ``torch.func``: vmap over samples of the pull-back of every cotangent.

    Args:
        model: The model.
        inputs: A batch's inputs.
        cotangents: Shape (O, N, ...).
        chosen: Name -> parameter.

    Returns:
        Name -> rows, shape (O, N, *shape).
    """
    tensors: list[Tensor] = []
    tree_map(lambda tensor: tensors.append(tensor) or tensor, inputs)  # type: ignore[func-returns-value]
    parameters = {name: value.detach() for name, value in chosen.items()}

    def sample(cotangent: Tensor, *parts: Tensor) -> dict[str, Tensor]:
        left = iter(parts)
        inside = tree_map(lambda _: next(left).unsqueeze(0), inputs)

        def output(values: dict[str, Tensor]) -> Tensor:
            return outputs(_Bound(model, values), inside).squeeze(0)

        pull: Callable[[Tensor], tuple[dict[str, Tensor]]] = vjp(output, parameters)[1]
        return vmap(lambda c: pull(c)[0])(cotangent)

    # The fused attention kernels have no batching rule; operations without one run one by one, with a warning.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        rows = vmap(sample, in_dims=(1, *(0 for _ in tensors)), out_dims=1)(cotangents, *tensors)
    return {name: value.detach() for name, value in rows.items()}


class _Bound:
    """Call a model with some parameters replaced."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        self.model, self.values = model, values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.values, args, kwargs)
