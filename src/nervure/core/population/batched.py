"""Run all members at once: node by node along the traced graph, or the whole network under `torch.vmap`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nervure.core import forward
from nervure.core.population import rules
from nervure.core.population.stack import Stack

Program = Callable[[Any], Any]


def trace(stack: Stack, inputs: Any) -> Program:
    """Compile the network in its present mode: a rule for every known layer, `torch.vmap` of every other node.

    Args:
        stack: The members.
        inputs: Inputs, from which only the structure is read: a tensor, or a tuple or dict of tensors.

    Returns:
        A function from stacked inputs to stacked outputs.
    """
    keys: list[Any] | None = None
    if isinstance(inputs, Mapping):
        keys = list(inputs)
    elif isinstance(inputs, tuple | list):
        keys = list(range(len(inputs)))
    entry = _Entry(_twin(stack.members[0]), keys, named=isinstance(inputs, Mapping))
    graph = _Tracer().trace(entry)
    return _Program(stack, entry, graph)


def whole(stack: Stack) -> Program:
    """Wrap the whole network in one `torch.vmap`, in its present mode.

    Args:
        stack: The members.

    Returns:
        A function from stacked inputs to stacked outputs.
    """
    model = _vmappable(stack.members[0])

    def run(inputs: Any) -> Any:
        return _vmap(
            lambda parameters, buffers, x: functional_call(
                model,
                {**parameters, **buffers},
                tuple(x) if isinstance(x, tuple | list) else () if isinstance(x, Mapping) else x,
                dict(x) if isinstance(x, Mapping) else None,
            ),
            (stack.leaves, stack.buffers, inputs),
        )

    return run


class _Entry(nn.Module):
    """Take all inputs as one value, so that arguments left at their defaults are not traced as unknowns."""

    def __init__(self, model: nn.Module, keys: list[Any] | None, *, named: bool) -> None:
        super().__init__()
        self.model, self.keys, self.named = model, keys, named
        self.training = model.training

    def forward(self, inputs: Any) -> Any:
        if self.keys is None:
            return self.model(inputs)
        if self.named:
            return self.model(**{key: inputs[key] for key in self.keys})
        return self.model(*[inputs[key] for key in self.keys])


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in rules.LAYERS or super().is_leaf_module(m, module_qualified_name)


Step = tuple[fx.Node, Callable[..., Any], tuple[Any, ...], dict[str, Any], tuple[fx.Node, ...]]


class _Program:
    """Hold the compiled nodes; `baked` says that dropout rates were copied and a new rate would not be seen."""

    def __init__(self, stack: Stack, entry: _Entry, graph: fx.Graph) -> None:
        self.stack, self.entry = stack, entry
        self.baked = False
        self.stacked: set[fx.Node] = set()
        self.constants: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        last: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            for source in node.all_input_nodes:
                last[source] = node
            if node.op == "placeholder":
                self.source = node
                self.stacked.add(node)
            elif node.op == "output":
                self.result = node.args[0]
            elif node.op == "get_attr":
                self._constant(node)
            else:
                self.steps.append((node, self._compile(node), node.args, node.kwargs, ()))
        kept = set(_nodes(self.result)) | set(self.constants)
        # Forget a value after its last use, as the network's own forward would.
        self.steps = [
            (
                *step[:4],
                tuple(source for source in step[0].all_input_nodes if last[source] is step[0] and source not in kept),
            )
            for step in self.steps
        ]

    def __call__(self, inputs: Any) -> Any:
        values = {self.source: inputs, **self.constants}
        for node, run, args, kwargs, dead in self.steps:
            values[node] = run(
                *fx.node.map_arg(args, values.__getitem__), **fx.node.map_arg(kwargs, values.__getitem__)
            )
            for source in dead:
                del values[source]
        return fx.node.map_arg(self.result, values.__getitem__)

    def _constant(self, node: fx.Node) -> None:
        path = str(node.target).removeprefix("model.")
        name = self.stack.aliases.get(path)
        if name is None:
            value: Any = self.entry
            for part in str(node.target).split("."):
                value = getattr(value, part)
            self.constants[node] = value
            return
        self.stacked.add(node)
        self.constants[node] = self.stack.leaves[name] if name in self.stack.leaves else self.stack.buffers[name]

    def _compile(self, node: fx.Node) -> Callable[..., Any]:
        sources = [source for source in node.all_input_nodes if source in self.stacked]
        if node.op == "call_module":
            self.stacked.add(node)
            path = str(node.target).removeprefix("model").removeprefix(".")
            layer = self.entry.model.get_submodule(path)
            rule = rules.LAYERS.get(type(layer))
            plain = len(node.args) == 1 and not node.kwargs and node.args[0] in self.stacked
            run = rule(self.stack, path, layer) if rule and plain else None
            return run or self._module(node, path, layer)
        call = _method(str(node.target)) if node.op == "call_method" else node.target
        assert callable(call)
        if not sources:
            return call
        if node.target is getattr or node.op == "call_method":
            question = node.args[1] if node.target is getattr else node.target
            if question in rules.QUESTIONS:
                return lambda x, *rest: call(_first(x), *rest)
        self.stacked.add(node)
        if self._is_input(node):
            return call
        if node.target in rules.POINTWISE and sources == [node.args[0]] == node.all_input_nodes:
            return call
        if node.target in rules.ARITHMETIC:
            return self._arithmetic(node, call)
        if node.target is F.dropout:
            return self._dropout
        if node.target is F.scaled_dot_product_attention and not (node.kwargs.get("dropout_p") or node.args[4:]):
            return _attention
        return self._function(node, call)

    def _is_input(self, node: fx.Node) -> bool:
        """Return whether a node only picks one of several inputs out of their container."""
        return self.entry.keys is not None and node.args[0] is self.source

    def _arithmetic(self, node: fx.Node, call: Callable[..., Any]) -> Callable[..., Any]:
        general = self._function(node, call)
        mask = [arg in self.stacked if isinstance(arg, fx.Node) else False for arg in node.args]

        def run(*args: Any, **kwargs: Any) -> Any:
            foreign = any(isinstance(arg, Tensor) and not own for arg, own in zip(args, mask, strict=True))
            if foreign or any(isinstance(value, Tensor) for value in kwargs.values()):
                return general(*args, **kwargs)
            return call(*rules.align(list(args)), **kwargs)

        return run

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return rules.drop(self.stack, x, [float(p)] * len(self.stack)) if training else x

    def _function(self, node: fx.Node, call: Callable[..., Any]) -> Callable[..., Any]:
        mask = _mask((node.args, node.kwargs), self.stacked)

        def run(*args: Any, **kwargs: Any) -> Any:
            return _vmap(lambda a, k: call(*a, **k), (args, kwargs), mask)

        return run

    def _module(self, node: fx.Node, path: str, layer: nn.Module) -> Callable[..., Any]:
        self.baked |= any(isinstance(module, nn.modules.dropout._DropoutNd) for module in layer.modules())
        layer = _vmappable(layer)
        stack, mask = self.stack, _mask((node.args, node.kwargs), self.stacked)
        names = {key: stack.name(path, key) for key, _ in (*layer.named_parameters(), *layer.named_buffers())}

        def run(*args: Any, **kwargs: Any) -> Any:
            weights = {
                key: stack.leaves[name] if name in stack.leaves else stack.buffers[name] for key, name in names.items()
            }
            return _vmap(
                lambda w, a, k: functional_call(layer, w, a, k),
                (weights, args, kwargs),
                (dict.fromkeys(names, 0), *mask),
            )

        return run


def _vmap(function: Callable[..., Any], args: tuple[Any, ...], mask: Any = 0) -> Any:
    """Map over the members; outputs that are not tensors, such as the None of an attention layer, pass by."""
    layout: list[Any] = []

    def inner(*values: Any) -> list[Tensor]:
        leaves, spec = torch.utils._pytree.tree_flatten(function(*values))
        layout[:] = [spec, leaves, [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]]
        return [leaves[i] for i in layout[2]]

    with _plain_attention():
        found = torch.vmap(inner, in_dims=mask, randomness="error")(*args)
    spec, leaves, places = layout
    for place, value in zip(places, found, strict=True):
        leaves[place] = value
    return torch.utils._pytree.tree_unflatten(leaves, spec)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Switch off the fused attention kernels, which have no batching rule, and give the switches back."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _mask(arguments: tuple[Any, Any], stacked: set[fx.Node]) -> Any:
    """Return the in_dims of a node's arguments: 0 where a value is stacked, None where not."""

    def walk(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return 0 if value in stacked else None
        if isinstance(value, tuple | list):
            return type(value)([walk(item) for item in value])  # vmap wants the very same container types
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        return None

    args, kwargs = arguments
    return tuple(walk(item) for item in args), {key: walk(item) for key, item in kwargs.items()}


def _nodes(result: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(result, found.append)
    return found


def _method(name: str) -> Callable[..., Any]:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, name)(*args, **kwargs)

    return call


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    if attn_mask is not None:
        raise ValueError("attention with a mask has no rule")
    return F.scaled_dot_product_attention(query, key, value, **kwargs)


def _first(x: Any) -> Any:
    return x[0] if isinstance(x, Tensor) else x


def _twin(model: nn.Module) -> nn.Module:
    """Copy a module around the same tensors, so that tracing it cannot leave anything in the member."""
    memo: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _vmappable(model: nn.Module) -> nn.Module:
    """Return a twin for use under vmap, which refuses dropout even where its rate is 0."""
    twin = _twin(model)
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0:
            module.training = False
    return twin


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy; classes are the last axis, so positions of a sequence count as samples.

    Args:
        output: What the model returned; its logits are of shape (..., classes).
        targets: Class indices, (...).

    Returns:
        A scalar.
    """
    return F.cross_entropy(forward.logits(output).flatten(0, -2), targets.flatten())


def member_losses(loss: Callable[[Any, Any], Tensor], output: Any, targets: Any) -> Tensor:
    """Return the loss of every member.

    Args:
        loss: From one member's output and targets to a scalar.
        output: Stacked outputs.
        targets: Stacked targets.

    Returns:
        The losses, shape (n,).
    """
    if loss is cross_entropy:
        scores = forward.logits(output)
        count = len(scores)
        each = F.cross_entropy(scores.flatten(0, -2), targets.flatten(), reduction="none").view(count, -1)
        return each.sum(1) / (targets.reshape(count, -1) != -100).sum(1)
    found: Tensor = torch.vmap(loss, randomness="error")(output, targets)
    return found
