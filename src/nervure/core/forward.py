"""Call any model on any batch: tensor, tuple and dict inputs; tensor, tuple, dict and object outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import BadData, BadModel


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call the model the way its inputs ask for: ``model(x)``, ``model(*xs)`` or ``model(**xs)``.

    Args:
        model: A module or function.
        inputs: A tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Returns:
        Whatever the model returns.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def logits(output: Any) -> Tensor:
    """Find the main output: the tensor itself, ``.logits``, ``["logits"]``, or the first tensor.

    Args:
        output: What a model returned.

    Returns:
        The main output.

    Raises:
        BadModel: If there is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise BadModel(
        "the model returned no tensor",
        expected="a tensor, a tuple, a dict, or an object with .logits",
        found=type(output).__name__,
    )


def outputs(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Return the main output of the model on a batch's inputs.

    Args:
        model: A module or function.
        inputs: As in `call`.

    Returns:
        The main output, shape (N, ...).
    """
    return logits(call(model, inputs))


def tree_map(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Apply a function to every tensor of a batch's inputs, keeping their structure.

    Args:
        function: From tensor to tensor.
        inputs: A tensor, or a tuple, list or dict of such.

    Returns:
        The same structure.
    """
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: tree_map(function, value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(tree_map(function, value) for value in inputs)
    return inputs


def batch_size(inputs: Any) -> int:
    """Return the number of samples: the length of the first axis of the first tensor.

    Args:
        inputs: A batch's inputs.

    Returns:
        The number of samples.

    Raises:
        BadData: If there is no tensor with an axis.
    """
    values = (
        [inputs] if isinstance(inputs, Tensor) else list(inputs.values() if isinstance(inputs, Mapping) else inputs)
    )
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise BadData("the batch has no tensor with a first axis", found=type(inputs).__name__)


def take(inputs: Any, index: Any) -> Any:
    """Return the chosen samples of a batch's inputs.

    Args:
        inputs: A tensor, or a tuple, list or dict of tensors with one first axis.
        index: A slice or an index tensor.

    Returns:
        The same structure with fewer samples.
    """
    return tree_map(lambda tensor: tensor[index], inputs)


@contextmanager
def mode(model: nn.Module, *, train: bool) -> Iterator[nn.Module]:
    """Put a model in train or eval mode and give every module its own mode back, also after an exception.

    Args:
        model: The model.
        train: Train mode when true, eval mode otherwise.

    Yields:
        The model.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(train)
        yield model
    finally:
        for module, flag in before:
            module.training = flag


@torch.no_grad()
def predict(model: nn.Module, inputs: Any, *, batch: int = 1024) -> Tensor:
    """Return the main outputs in eval mode, chunk by chunk, without gradients.

    Args:
        model: The model; its modes are restored.
        inputs: All inputs.
        batch: Samples per chunk, at least 1.

    Returns:
        The outputs, shape (N, ...).
    """
    with mode(model, train=False):
        count = batch_size(inputs)
        parts = [outputs(model, take(inputs, slice(start, start + batch))) for start in range(0, count, batch)]
    return torch.cat(parts)
