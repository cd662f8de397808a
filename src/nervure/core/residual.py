"""Find the residual adds of a network in its traced graph: where a branch of layers joins what went around it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from nervure._kit import Unsupported
from nervure.core.forward import mode

_ADDS = {("call_function", function) for function in (operator.add, operator.iadd, torch.add)} | {
    ("call_method", name) for name in ("add", "add_")
}
# What reads a shape: its result carries no values.
_SHAPES = {("call_method", "size"), ("call_method", "dim"), ("call_function", len)}
_HIDDEN = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer


@dataclass(frozen=True)
class ResidualAdd:
    """Hold one residual add.

    Args:
        node: The add.
        branch: What it adds to the skip: the side with the layers.
        skip: What goes around them: the identity, or a projection with fewer layers.
    """

    node: fx.Node
    branch: fx.Node
    skip: fx.Node


def trace(model: nn.Module, *, method: str) -> fx.Graph:
    """Trace a model, and refuse one whose graph is not the same in train and in eval mode.

    Args:
        model: The model.
        method: Who asks, for the error.

    Returns:
        The graph.

    Raises:
        Unsupported: If the model cannot be traced, or hides residual adds in one of torch's modules.
    """
    for name, module in model.named_modules():
        if isinstance(module, _HIDDEN):
            raise Unsupported(method, name, why=f"the residual adds inside {type(module).__name__} cannot be reached")
    graphs = []
    for train in (True, False):
        with mode(model, train=train), _recorded_len(model):
            try:
                graphs.append(fx.Tracer(autowrap_functions=(len,)).trace(model))
            except Exception as error:  # a user's forward may raise anything when it is given proxies
                raise Unsupported(method, model, why=f"its forward cannot be traced ({error})") from error
    if str(graphs[0]) != str(graphs[1]):
        raise Unsupported(method, model, why="its forward differs between train and eval mode", try_="nn.Dropout")
    return graphs[0]


def residual_adds(model: nn.Module, graph: fx.Graph) -> list[ResidualAdd]:
    """Find the adds x + f(x) and p(x) + f(x), f with more weight layers in a row than p.

    Adds of equals, of two inputs, or of a position embedding are not residual: neither side goes around the other.

    Args:
        model: The model.
        graph: Its graph.

    Returns:
        The adds, in the order of the graph.
    """
    weighty = {name for name, module in model.named_modules(remove_duplicate=False) if _has_weight(module)}
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    found = []
    for index, node in enumerate(nodes):
        sides = node.all_input_nodes
        if (node.op, node.target) not in _ADDS or len(sides) != 2:
            continue
        one, two = (_depths(side, nodes[:index], weighty) for side in sides)
        shared = one.keys() & two.keys()
        if not shared:
            continue
        # The nearest shared value: what lies between it and the add is what the two sides do not share.
        start = max(shared, key=place.__getitem__)
        if one[start] != two[start]:
            branch, skip = sides if one[start] > two[start] else sides[::-1]
            found.append(ResidualAdd(node, branch, skip))
    return found


def _depths(end: fx.Node, before: list[fx.Node], weighty: set[str]) -> dict[fx.Node, int]:
    """Return each value that flows into a node, with the most weight layers on a way from it to that node's output."""
    depths = {end: 0}
    for node in reversed(before):
        if node not in depths or _reads_shape(node):
            continue
        reached = depths[node] + int(node.op == "call_module" and str(node.target) in weighty)
        for parent in node.all_input_nodes:
            if parent.op != "get_attr":
                depths[parent] = max(reached, depths.get(parent, 0))
    return depths


def _reads_shape(node: fx.Node) -> bool:
    return (node.op, node.target) in _SHAPES or (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "device", "dtype", "ndim")
    )


def _has_weight(module: nn.Module) -> bool:
    return any(value.ndim > 1 for value in module.parameters())


@contextmanager
def _recorded_len(model: nn.Module) -> Iterator[None]:
    """Let ``len(x)`` in a forward be recorded: the tracer wraps functions only where a module's globals name them."""
    spaces: list[dict[str, Any]] = []
    for module in model.modules():
        space = getattr(type(module).forward, "__globals__", {})
        if "len" not in space and not type(module).__module__.startswith("torch."):
            space["len"] = len
            spaces.append(space)
    try:
        yield
    finally:
        for space in spaces:
            space.pop("len", None)
