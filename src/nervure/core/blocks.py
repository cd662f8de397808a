"""Cut a network into blocks that run one after the other, each fed by one tensor alone."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nervure._kit import BadModel, Unsupported, UsageError
from nervure.core import forward
from nervure.core.modules import NORMS, weights

Part = str | Callable[[Any], Any]
METHOD = "blocks.cut"
_BURNT = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def cut(model: nn.Module, *, parts: Sequence[Part | Sequence[Part]] | None = None) -> list[nn.Module]:
    """Split a network into consecutive blocks that share its parameters.

    A block begins before a layer with weights, wherever a single tensor carries all that the rest needs: between
    the layers of a plain network, between the stages of a residual one, never inside a skip connection. The forward
    is traced, so ModuleLists, functional activations and several inputs of the first block are understood.

    Args:
        model: The network; left as it is.
        parts: Instead of tracing: the blocks in order, each a module's name, a function, or a sequence of such.

    Returns:
        At least two blocks; calling them in order is the network's forward.

    Raises:
        Unsupported: If the forward cannot be traced or nowhere goes through one tensor.
        UsageError: If `parts` names a module the model does not have.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> len(cut(net))
        3
        >>> len(cut(net, parts=[("0", torch.relu), ("2", torch.relu, "4")]))
        2
    """
    blocks = _given(model, parts) if parts is not None else _traced(model)
    if len(blocks) < 2:
        raise Unsupported(
            METHOD, model, why="nowhere does one tensor carry all", try_="parts=[...], the blocks in order"
        )
    return blocks


class Chain(nn.Module):
    """Run modules and functions one after the other.

    Args:
        steps: The modules and functions.
    """

    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        super().__init__()
        self.steps = list(steps)
        self.members = nn.ModuleList(step for step in steps if isinstance(step, nn.Module))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the last step's output."""
        value = self.steps[0](*args, **kwargs)
        for step in self.steps[1:]:
            value = step(value)
        return value


def _given(model: nn.Module, parts: Sequence[Part | Sequence[Part]]) -> list[nn.Module]:
    known = dict(model.named_modules(remove_duplicate=False))

    def find(part: Part) -> Callable[[Any], Any]:
        if not isinstance(part, str):
            return part
        if part not in known:
            raise UsageError(f"the model has no module {part!r}", expected=f"one of {', '.join(filter(None, known))}")
        return known[part]

    groups: list[Sequence[Part]] = [[part] if isinstance(part, str) or callable(part) else part for part in parts]
    return [Chain([find(part) for part in group]) for group in groups]


class _Tracer(fx.Tracer):
    """Trace into the user's modules, or hold those the root owns for opaque."""

    def __init__(self, opaque: frozenset[nn.Module] = frozenset()) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph:
    """Trace the forward; where a stage's own forward cannot be traced, hold the stages for opaque.

    Raises:
        Unsupported: If the root's own forward cannot be traced either.
    """
    stages = [
        stage
        for child in model.children()
        for stage in (child if isinstance(child, nn.ModuleList | nn.Sequential) else [child])
    ]
    try:
        return _Tracer().trace(model)
    except Exception as inner:
        try:
            return _Tracer(frozenset(stages)).trace(model)
        except Exception:
            raise Unsupported(
                METHOD, model, why=f"its forward cannot be traced ({inner})", try_="parts=[...], the blocks in order"
            ) from inner


def _traced(model: nn.Module) -> list[nn.Module]:
    graph = _trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    connections = weights(model)
    nodes = list(graph.nodes)
    for node in nodes:
        if node.op == "call_function" and node.target in _BURNT:
            raise Unsupported(METHOD, node.name, why="tracing fixes functional dropout", try_="nn.Dropout")

    def carries(node: fx.Node) -> bool:
        if node.op == "get_attr":
            return node.target in connections
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        return module is not None and not isinstance(module, NORMS) and any(True for _ in module.parameters())

    ends = _narrow(nodes)
    bounds = [0, *(end + 1 for end in ends), len(nodes)]
    heavy = [any(carries(node) for node in nodes[a:b]) for a, b in itertools.pairwise(bounds)]
    chosen = _choose(ends, heavy)
    starts = [-1, *chosen]
    return [
        _segment(model, nodes[a + 1 : b + 1], nodes[a] if a >= 0 else None, nodes[b] if b < len(nodes) - 1 else None)
        for a, b in zip(starts, [*chosen, len(nodes) - 1], strict=True)
    ]


def _narrow(nodes: list[fx.Node]) -> list[int]:
    """Return the places after which exactly one value, computed there or before, is still needed."""
    place = {node: index for index, node in enumerate(nodes)}
    last = [max((place[user] for user in node.users), default=-1) for node in nodes]
    found = []
    for index, node in enumerate(nodes[:-1]):
        alive = [one for one in range(index + 1) if last[one] > index and nodes[one].op != "get_attr"]
        if alive == [index] and node.op != "placeholder" and not any(_unpacks(user) for user in node.users):
            found.append(index)
    return found


def _unpacks(node: fx.Node) -> bool:
    """Tell ``value[0]``: the value is then a tuple, as from chunk or a recurrent layer, and no tensor."""
    return node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int)


def _choose(ends: list[int], heavy: list[bool]) -> list[int]:
    """Choose the places right before a stretch with weights, with weights since the last chosen one."""
    chosen, weighty = [], False
    for index, end in enumerate(ends):
        weighty = weighty or heavy[index]
        if weighty and heavy[index + 1]:
            chosen.append(end)
            weighty = False
    return chosen


def _segment(model: nn.Module, nodes: list[fx.Node], enters: fx.Node | None, leaves: fx.Node | None) -> fx.GraphModule:
    """Return a stretch of the graph as a module of its own; parameters are shared, not copied."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if enters is not None:
        copies[enters] = graph.placeholder("x")

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies and node.op == "get_attr":  # a parameter read early and used late
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        copies[node] = graph.node_copy(node, copied)
    if leaves is not None:
        graph.output(copies[leaves])
    return fx.GraphModule(model, graph, "Block")


@torch.no_grad()
def check(blocks: Sequence[nn.Module], model: nn.Module, inputs: Any) -> list[Tensor]:
    """See that the blocks in order give what the network gives, in eval mode.

    Args:
        blocks: What `cut` returned.
        model: The network.
        inputs: A batch's inputs.

    Returns:
        The main output of every block.

    Raises:
        BadModel: If they do not, or a block hands on something else than a tensor.
    """
    with forward.mode(model, train=False):
        wanted = forward.outputs(model, inputs)
        found, value = [], inputs
        for index, block in enumerate(blocks):
            value = forward.call(block, inputs) if index == 0 else block(value)
            if index < len(blocks) - 1 and not isinstance(value, Tensor):
                raise BadModel(f"block {index} hands on no tensor", found=type(value).__name__)
            found.append(forward.logits(value))
    if found[-1].shape != wanted.shape or not torch.allclose(found[-1], wanted, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise BadModel("the blocks do not compute what the model computes", try_="listing every step in `parts`")
    return found
