"""The channel graph: what must be cut together, and the cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from nervure.core.channels import copies, layers, shapes, sources, surgery, values
from nervure.core.channels.groups import Group, Keep, Pinned, Reasons, Table, tabulate
from nervure.core.channels.watch import Rules, run

_RULES = Rules(
    {**sources.RULES, **shapes.RULES, **values.RULES, **layers.RULES},
    elementwise=values.pointwise,
    unknown=sources.unknown,
    attention=layers.multi_head,
)


@dataclass(frozen=True)
class ChannelGraph:
    """Hold which indices of which parameters and buffers make up each channel of a network.

    One forward pass in eval mode is watched: every operation says which indices of its inputs and outputs are the same
    channel, every shape read in the forward remembers what it counts. A channel is cut by dropping its indices from
    all tensors; the result is a smaller network of the same class, without masks or hooks. Axes that cannot be cut, or
    that no rule follows, are kept whole and listed in `pinned` with the reason.

    Args:
        table: The table of all axes.
        reasons: Why axes are kept whole.
        inputs: The inputs it was traced with, which every cut network is tried on.
        shapes: The shapes of the outputs.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = ChannelGraph.of(net, torch.ones(1, 3))
        >>> [(one.parameter, one.axis) for one in graph.groups[0].slices]
        [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
        >>> small = graph.cut(net, {0: [0, 1, 2]})
        >>> small[0]
        Linear(in_features=3, out_features=3, bias=True)
    """

    table: Table
    reasons: Reasons
    inputs: Any
    shapes: list[torch.Size]

    @classmethod
    def of(cls, model: nn.Module, inputs: Any) -> ChannelGraph:
        """Trace a model.

        Args:
            model: The model; left as it is.
            inputs: A batch's inputs: a tensor, a tuple of positional or a dict of keyword arguments.

        Returns:
            The graph.

        Raises:
            Unsupported: If the model cannot be copied or run.
        """
        trace = run(model, inputs, _RULES)
        names: dict[int, list[str]] = {}
        for name, tensor in copies.every(model, remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        table, reasons = tabulate(trace, {one[0]: tuple(one) for one in names.values()})
        return cls(table, reasons, inputs, trace.outputs)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups of channels that can be cut, in the order of the forward."""
        return self.table.groups()

    @cached_property
    def pinned(self) -> tuple[Pinned, ...]:
        """The axes that are never cut, with the reasons."""
        return self.reasons.pinned()

    def cut(self, model: nn.Module, keep: Keep) -> nn.Module:
        """Return a smaller copy of a model and see that it runs.

        Args:
            model: The model the graph was made of, or of the same shape.
            keep: Group -> the channels that stay, as a boolean vector or as numbers; other groups stay whole.

        Returns:
            A model of the same class; parameters keep requires_grad.

        Raises:
            Unsupported: If the cut model does not run, because its forward holds a size that was not followed.
            BadModel: If the model does not fit the graph.
            UsageError: If `keep` names no group or leaves a group empty.
        """
        smaller = surgery.cut(model, self.table, keep)
        surgery.check(smaller, self.inputs, self.shapes)
        return smaller

    def cut_(self, model: nn.Module, keep: Keep) -> None:
        """Cut a model in place, without trying it; gradients are cut along, optimizer states are not.

        Args:
            model: As in `cut`.
            keep: As in `cut`.

        Raises:
            BadModel: As in `cut`.
            UsageError: As in `cut`.
        """
        surgery.cut_(model, self.table, keep)

    def mask(self, model: nn.Module, keep: Keep) -> nn.Module:
        """Return a copy of a model with every slice of the channels to cut set to zero.

        For exact groups it computes what the cut model computes.

        Args:
            model: As in `cut`.
            keep: As in `cut`.

        Returns:
            A model of the same shape.

        Raises:
            BadModel: As in `cut`.
            UsageError: As in `cut`.
        """
        return surgery.mask(model, self.table, keep)

    def after(self, keep: Keep) -> ChannelGraph:
        """Return the graph of the cut model without tracing again.

        Args:
            keep: As in `cut`.

        Returns:
            A graph with the same groups, their channels numbered anew.

        Raises:
            UsageError: As in `cut`.
        """
        return replace(self, table=self.table.without(keep))
