"""One forward pass, recorded: what each layer saw, and where in the autograd graph its output is born."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nervure._kit import BadModel, Unsupported
from nervure.core.forward import outputs
from nervure.core.rng import scope
from nervure.core.rules import has_rule, least_axes


@dataclass(frozen=True)
class Call:
    """Hold one call of one layer.

    Args:
        module: The layer.
        a: Its input, detached.
        version: The input's version at the call; a later in-place write changes it.
        edge: The place in the graph where the output was born. In-place operations on the output, such as an
            in-place ReLU, give the tensor a new history but leave this place as it was.
        shape: Shape of the output.
    """

    module: nn.Module
    a: Tensor
    version: int
    edge: GradientEdge
    shape: torch.Size

    def per_sample(self, count: int) -> bool:
        """Say whether axis 0 can be the sample axis, and the input is still what the layer saw."""
        batched = self.a.ndim >= least_axes(self.module) and len(self.a) == count == self.shape[0]
        return batched and self.a._version == self.version


@dataclass(frozen=True)
class Recording:
    """Hold the output of a forward pass and the calls of the layers that own chosen parameters.

    Args:
        output: The main output, shape (N, ...), with its graph.
        calls: In order of execution.
    """

    output: Tensor
    calls: tuple[Call, ...]


def record(model: nn.Module, inputs: Any, chosen: Mapping[str, nn.Parameter]) -> Recording:
    """Run the model once and record the calls of layers with a closed form that own a chosen parameter.

    Args:
        model: The model.
        inputs: One batch's inputs.
        chosen: Name -> parameter.

    Returns:
        The recording.
    """
    wanted = {id(value) for value in chosen.values()}
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values()]
        if isinstance(output, Tensor) and output.grad_fn is not None and len(given) == 1:
            a = given[0].detach()
            calls.append(Call(module, a, a._version, get_gradient_edge(output), output.shape))

    owners = [
        module
        for module in model.modules()
        if has_rule(module) and any(id(value) in wanted for value in module._parameters.values())
    ]
    # First in the row, so that a user's hook that replaces the output cannot come between.
    handles = [module.register_forward_hook(hook, prepend=True, with_kwargs=True) for module in owners]
    try:
        output = outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Recording(output, tuple(calls))


def uses(output: Tensor, chosen: Mapping[str, nn.Parameter]) -> Counter[str]:
    """Count how often each parameter enters the graph of an output.

    Args:
        output: A tensor with a graph.
        chosen: Name -> parameter.

    Returns:
        Name -> number of edges into the parameter.
    """
    names = {id(value): name for name, value in chosen.items()}
    count: Counter[str] = Counter()
    seen = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for child, _ in node.next_functions:
            name = names.get(id(getattr(child, "variable", None)))
            if name is not None:
                count[name] += 1
            stack.append(child)
    return count


def explained(recording: Recording, chosen: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Return the parameters whose every use in the graph is a recorded call that keeps samples on axis 0.

    A tied weight, or a layer called twice, is explained when all its uses are recorded. A functional use such as
    ``F.linear(x, layer.weight * 2)`` leaves one use unexplained.

    Args:
        recording: From `record`.
        chosen: Name -> parameter.

    Returns:
        The names.
    """
    names = {id(value): name for name, value in chosen.items()}
    calls: Counter[str] = Counter()
    spoilt = set()
    for call in recording.calls:
        for value in call.module._parameters.values():
            name = names.get(id(value))
            if name is not None:
                calls[name] += 1
                if not call.per_sample(len(recording.output)):
                    spoilt.add(name)
    count = uses(recording.output, chosen)
    return frozenset(name for name in chosen if name not in spoilt and count[name] == calls[name])


def refuse_batch_statistics(model: nn.Module, method: str) -> None:
    """Refuse batch normalisation that normalises by the batch: then no sample has a gradient of its own.

    Args:
        model: The model.
        method: Who asks.

    Raises:
        Unsupported: If such a module is found.
    """
    for name, module in model.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and (module.training or module.running_mean is None):
            raise Unsupported(
                method,
                name or type(module).__name__,
                why="batch normalisation by the statistics of the batch mixes the samples",
                try_="model.eval(), or GroupNorm",
            )


def refuse_complex(model: nn.Module, chosen: Mapping[str, nn.Parameter], method: str) -> None:
    """Refuse complex parameters, whose derivatives are none of real numbers.

    Args:
        model: The model.
        chosen: The parameters to differentiate.
        method: Who asks.

    Raises:
        Unsupported: If one is complex.
    """
    found = [name for name, value in chosen.items() if value.is_complex()]
    if found:
        raise Unsupported(method, model, why=f"{found[0]} is complex", try_="real and imaginary parts as parameters")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Switch gradients on, and give buffers and global generators back as they were, also after an exception.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    before = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    with scope(), torch.enable_grad():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, version, value in before:
                    if buffer._version != version:
                        buffer.copy_(value)


@contextmanager
def without_draws(model: nn.Module, method: str) -> Iterator[None]:
    """Refuse a model that draws random numbers inside the block.

    Args:
        model: The model.
        method: Who asks.

    Yields:
        Nothing.

    Raises:
        Unsupported: If the global generators moved.
    """
    devices = sorted({str(value.device) for value in model.parameters() if value.device.type == "cuda"})

    def state() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]

    start = state()
    yield
    if any(not torch.equal(old, new) for old, new in zip(start, state(), strict=True)):
        raise Unsupported(
            method, model, why="its forward pass draws random numbers, such as live dropout", try_="model.eval()"
        )


def require_samples(output: Tensor, count: int) -> None:
    """Check that axis 0 of an output counts the samples.

    Args:
        output: The main output.
        count: Samples that went in.

    Raises:
        BadModel: If it does not.
    """
    if output.ndim == 0 or len(output) != count:
        raise BadModel(
            "the first axis of the main output is not the batch", expected=f"({count}, ...)", found=tuple(output.shape)
        )
