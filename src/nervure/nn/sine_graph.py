"""Find in an MLP's traced graph which linear layer feeds which activation, and put sines there."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from nervure._kit import Unsupported, UsageError
from nervure.core import modules

METHOD = "sine_"
_MODULES = (
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.LeakyReLU, nn.PReLU,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink,
)  # fmt: skip
_FUNCTIONS = (
    F.relu, F.relu_, F.relu6, F.tanh, F.sigmoid, F.gelu, F.silu, F.elu, F.selu, F.celu, F.mish, F.leaky_relu,
    F.softplus, F.softsign, F.hardtanh, F.hardswish, torch.relu, torch.relu_, torch.tanh, torch.sigmoid,
    torch.sin, torch.cos,
)  # fmt: skip
_METHODS = ("relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "sin", "cos")
# What may stand between the layers without changing the distribution of a single value.
_NEUTRAL_MODULES = (nn.Dropout, nn.AlphaDropout, nn.Identity, nn.Flatten, nn.Unflatten)
_NEUTRAL_FUNCTIONS = (torch.cat, torch.concat, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze)
_NEUTRAL_METHODS = ("flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous")
_SHAPES = ("size", "dim")


class Sine(nn.Module):
    """Return sin(omega x).

    Args:
        omega: Angular frequency, above 0.

    Raises:
        UsageError: If omega is not positive.
    """

    def __init__(self, omega: float = 30.0) -> None:
        super().__init__()
        if not omega > 0:
            raise UsageError("omega is no frequency", expected="a number above 0", found=omega)
        self.omega = float(omega)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * x)

    def extra_repr(self) -> str:
        """Return the frequency."""
        return f"omega={self.omega:g}"


@torch.no_grad()
def initialise_(
    linear: nn.Linear,
    *,
    omega: float,
    first: bool,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> nn.Linear:
    """Draw a linear layer's weights and biases for a place in a sine network.

    Args:
        linear: The layer, changed in place; its fan-in is read from the weight, so surgery may have changed it.
        omega: Frequency of the sine after it (of the last sine, for the output layer).
        first: Whether it reads coordinates: within 1/n instead of sqrt(6/n)/omega.
        mask: Which weights are kept, shape (out, in): the fan-in of a row is then what it has left.
        generator: Draws them; torch's global one by default.

    Returns:
        The layer.
    """
    weight = linear.weight
    fan_in = torch.full((len(weight),), weight.shape[1], device=weight.device) if mask is None else mask.sum(1)
    fan_in = fan_in.clamp_min(1).to(weight.dtype)
    bound = 1 / fan_in if first else (6 / fan_in).sqrt() / omega
    weight.uniform_(-1, 1, generator=generator).mul_(bound.unsqueeze(1))
    if linear.bias is not None:
        linear.bias.uniform_(-1, 1, generator=generator).mul_(bound)
    return linear


@dataclass(frozen=True)
class Place:
    """Hold where a linear layer stands in a sine network.

    Args:
        name: Its qualified name.
        linear: The layer.
        omega: Frequency of the sine it feeds; for the output layer, of the last sine before it.
        first: Whether it reads the network's inputs and no sines.
    """

    name: str
    linear: nn.Linear
    omega: float
    first: bool


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Sine) or super().is_leaf_module(m, module_qualified_name)


class Plan:
    """Hold the traced graph of an MLP, checked: linear layers with one activation between any two.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        try:
            self.graph = _Tracer().trace(model)
        except Exception as error:
            raise Unsupported(
                METHOD, model, why=f"its forward cannot be traced ({error})", try_="building a Siren"
            ) from error
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.nodes = list(self.graph.nodes)
        self.linears = [node for node in self.nodes if self.kind(node) == "linear"]
        after = _closure(self.linears, lambda node: node.users)
        before = _closure(self.linears, lambda node: node.all_input_nodes)
        self.inner = [node for node in self.nodes if node in after and node in before and node not in self.linears]
        self._check()
        self.activations = [node for node in self.inner if self.kind(node) == "activation"]
        if not self.activations:
            raise Unsupported(METHOD, model, why="no activation stands between two linear layers")

    def kind(self, node: fx.Node) -> str:
        """Return ``"linear"``, ``"activation"``, ``"neutral"`` or ``"other"``."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            known = (("linear", nn.Linear), ("activation", (*_MODULES, Sine)), ("neutral", _NEUTRAL_MODULES))
            return next((kind for kind, types in known if isinstance(module, types)), "other")
        functions, methods = _FUNCTIONS, _METHODS
        if (node.op, node.target) in _pairs(functions, methods):
            return "activation"
        return "neutral" if (node.op, node.target) in _pairs(_NEUTRAL_FUNCTIONS, _NEUTRAL_METHODS) else "other"

    def _check(self) -> None:
        for node in self.nodes:
            module = self.modules.get(str(node.target)) if node.op == "call_module" else None
            kind = self.kind(node)
            if node.op == "get_attr" and isinstance(_attribute(self.model, str(node.target)), nn.Parameter):
                raise Unsupported(METHOD, str(node.target), why="a bare parameter has no initialisation of its own")
            if module is not None and kind == "other" and any(True for _ in module.parameters()):
                raise Unsupported(METHOD, str(node.target), why=f"{type(module).__name__} is no layer of an MLP")
            if kind == "linear" and (type(module) is not nn.Linear or parametrize.is_parametrized(module)):
                raise Unsupported(METHOD, str(node.target), why=f"{type(module).__name__} computes its weight")
        for node in self.inner:
            if self.kind(node) == "other" and not _is_shape(node):
                raise Unsupported(METHOD, _label(node), why="it changes values between two linear layers")
        for node in [*self.linears, *(node for node in self.inner if self.kind(node) == "activation")]:
            sources = {self.kind(source) for source in self.sources(node)}
            if self.kind(node) in sources:
                raise Unsupported(METHOD, _label(node), why=f"it follows another {self.kind(node)} layer directly")

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the nearest linear layers and activations a node reads, through neutral nodes."""
        found: list[fx.Node] = []
        for parent in node.all_input_nodes:
            if parent in self.inner and self.kind(parent) != "activation":
                found += self.sources(parent)
            elif parent in self.inner or parent in self.linears:
                found.append(parent)
        return found

    def places(self) -> list[Place]:
        """Return where each linear layer stands; every activation must be a sine by now.

        Raises:
            Unsupported: If an activation is no sine, or a layer is used at two places that want different weights.
        """
        omegas: dict[fx.Node, float] = {}
        for node in self.activations:
            module = self.modules.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(module, Sine):
                raise Unsupported(METHOD, _label(node), why="it is no sine", try_="sine_(model) first")
            omegas[node] = module.omega
        fed: dict[fx.Node, set[float]] = {node: set() for node in self.linears}
        for node, omega in omegas.items():
            for source in self.sources(node):
                fed[source].add(omega)
        found: dict[int, Place] = {}
        for node in self.linears:
            name, module = str(node.target), self.modules[str(node.target)]
            read = [omegas[source] for source in self.sources(node)]
            wanted = fed[node] or set(read[-1:])
            if not isinstance(module, nn.Linear) or len(wanted) != 1:
                raise Unsupported(METHOD, name, why=f"it feeds sines of {len(wanted)} frequencies")
            place = Place(name, module, wanted.pop(), first=not read)
            other = found.setdefault(id(module.weight), place)
            if (other.omega, other.first) != (place.omega, place.first):
                raise Unsupported(METHOD, name, why="its weight is used at two places that want different ones")
        return list(found.values())


def _pairs(functions: tuple[Any, ...], methods: tuple[str, ...]) -> set[tuple[str, Any]]:
    return {("call_function", function) for function in functions} | {("call_method", name) for name in methods}


def _is_shape(node: fx.Node) -> bool:
    """Tell nodes that compute shapes, not values."""
    asks = node.op == "call_method" and node.target in _SHAPES
    asks = asks or (node.op == "call_function" and node.target is getattr and node.args[1] == "shape")
    return asks or (
        node.op == "call_function"
        and node.target is operator.getitem
        and isinstance(node.args[0], fx.Node)
        and _is_shape(node.args[0])
    )


def _label(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _attribute(model: nn.Module, name: str) -> object:
    return operator.attrgetter(name)(model)


def _closure(starts: list[fx.Node], step: Any) -> set[fx.Node]:
    """Return all nodes reached from the starts in one or more steps."""
    seen: set[fx.Node] = set()
    queue = [near for node in starts for near in step(node)]
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += step(node)
    return seen


def swap_modules(model: nn.Module, omega: float) -> None:
    """Put sines in the place of a model's activation modules.

    Args:
        model: The network, changed in place.
        omega: Their frequency.

    Raises:
        Unsupported: If an activation is a function, or a module that is used on the output too.
    """
    plan = Plan(model)
    functional = [node for node in plan.activations if node.op != "call_module"]
    if functional:
        raise Unsupported(METHOD, _label(functional[0]), why="a function cannot be swapped", try_="sine(model), a copy")
    inside = {id(plan.modules[str(node.target)]) for node in plan.activations}
    for node in plan.nodes:
        if node.op == "call_module" and node not in plan.activations and id(plan.modules[str(node.target)]) in inside:
            raise Unsupported(METHOD, str(node.target), why="it acts on the output too", try_="sine(model), a copy")
    modules.replace_modules(
        model, lambda name, module: Sine(omega) if id(module) in inside and not isinstance(module, Sine) else None
    )


def swapped_copy(model: nn.Module, omega: float) -> fx.GraphModule:
    """Return a traced copy with sines in the place of all inner activations.

    Args:
        model: The network.
        omega: Their frequency.

    Returns:
        The copy.
    """
    plan = Plan(copy.deepcopy(model))
    for index, node in enumerate(plan.activations):
        name = f"sine{index}"
        plan.model.add_module(name, Sine(omega))
        with plan.graph.inserting_after(node):
            new = plan.graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(new)
        plan.graph.erase_node(node)
    return fx.GraphModule(plan.model, plan.graph, type(model).__name__)
