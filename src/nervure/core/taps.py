"""Record activations with hooks that always come off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import NoEffect
from nervure.core import forward


@contextmanager
def hooked(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]], *, pre: bool = False) -> Iterator[None]:
    """Hang forward hooks on modules and take them off again, also after an exception.

    Args:
        pairs: (module, hook) with torch's own hook signature.
        pre: Whether the hooks run before the forward.

    Yields:
        Nothing.
    """
    handles = []
    try:
        for module, hook in pairs:
            handles.append(module.register_forward_pre_hook(hook) if pre else module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Taps(dict[str, list[Tensor]]):
    """Hold the recorded outputs: module name -> one tensor for each call, in order."""


@contextmanager
def tap(model: nn.Module, names: Iterable[str], *, detach: bool = True) -> Iterator[Taps]:
    """Record the outputs of modules during the block.

    A module used twice gives two tensors. Outputs are copied at once, so that a later in-place operation cannot
    change what was recorded (with ``detach=False`` the copy stays in the graph).

    Args:
        model: The model.
        names: Qualified names of the modules.
        detach: Whether to cut the recordings off the graph.

    Yields:
        The recordings, filled as the model runs.

    Raises:
        NoEffect: If the model has no module of a name.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> with tap(net, ["0"]) as seen:
        ...     _ = net(torch.ones(1, 3))
        >>> seen["0"][0].shape
        torch.Size([1, 2])
    """
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise NoEffect(f"the model has no module {', '.join(missing)}", expected="a name from named_modules()")
    taps = Taps({name: [] for name in names})

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = forward.logits(output)
            taps[name].append((value.detach() if detach else value).clone())

        return hook

    with hooked([(modules[name], keep(name)) for name in taps]):
        yield taps


def execution_order(model: nn.Module, inputs: Any) -> list[str]:
    """Return the names of the leaf modules in the order they are first called, which may differ from registration.

    Args:
        model: The model; run once in eval mode without gradients.
        inputs: A batch's inputs.

    Returns:
        The names; a module used twice appears once, one never called not at all.
    """
    order: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: order.setdefault(name)

    leaves = [(module, note(name)) for name, module in model.named_modules() if not list(module.children())]
    with hooked(leaves), forward.mode(model, train=False), torch.no_grad():
        forward.call(model, inputs)
    return list(order)
