"""The checks all contracts share: what belongs to the user is as it was, and one seed gives one result."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class Broken(AssertionError):
    """Report a contract that a method breaks."""


def require(kept: bool, what: str) -> None:
    """Raise `Broken` unless the condition holds.

    Args:
        kept: The condition.
        what: What is broken where it does not.

    Raises:
        Broken: If it does not.
    """
    if not kept:
        raise Broken(what)


def tensors(value: object, name: str = "result") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors and numbers of any result, with a name for each, in one order.

    Args:
        value: A tensor, number, module, or a mapping, sequence or object of such.
        name: The name of the whole.

    Yields:
        (name, tensor).
    """
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, bool | int | float):
        yield name, torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, nn.Module):
        yield from tensors(dict(value.state_dict()), name)
    elif isinstance(value, np.ndarray):
        yield name, torch.from_numpy(np.ascontiguousarray(value))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from tensors(value[key], f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from tensors(one, f"{name}.{index}")
    elif hasattr(value, "__dict__"):
        yield from tensors({key: one for key, one in vars(value).items() if not key.startswith("_")}, name)


def digest(value: object) -> str:
    """Return a text that two results share only if they are equal bit for bit.

    Args:
        value: As in `tensors`.

    Returns:
        Hexadecimal digits.

    Raises:
        Broken: If there is nothing to compare.
    """
    found, count = hashlib.sha256(), 0
    for name, tensor in tensors(value):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        count += 1
    require(count > 0, "the result holds no tensor and no number")
    return found.hexdigest()


def state_of(model: nn.Module) -> dict[str, str]:
    """Return everything about a model that a method must leave alone, each as a comparable text.

    Args:
        model: The model.

    Returns:
        What -> text.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        found[f"class of {name or 'the model'}"] = f"{type(module)} {id(module)}"
        found[f"mode of {name or 'the model'}"] = str(module.training)
        found[f"hooks of {name or 'the model'}"] = str([list(getattr(module, hooks, ())) for hooks in _HOOKS])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"value of {name}"] = digest(tensor)
        found[f"identity of {name}"] = str(id(tensor))
        found[f"requires_grad of {name}"] = str(tensor.requires_grad)
        found[f"gradient of {name}"] = "none" if tensor.grad is None else digest(tensor.grad)
        found[f"hooks of {name}"] = str(len(tensor._backward_hooks or ())) + str(
            len(getattr(tensor, "_post_accumulate_grad_hooks", None) or ())
        )
    return found


def surroundings() -> dict[str, str]:
    """Return the process-wide settings a method must leave alone, each as a comparable text.

    Returns:
        What -> text.
    """
    _, keys, *place = np.random.get_state()
    return {
        "torch's global generator": digest(torch.get_rng_state()),
        "NumPy's global generator": digest(torch.from_numpy(np.asarray(keys).astype(np.int64))) + str(place),
        "Python's global generator": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        "the default dtype": str(torch.get_default_dtype()),
        "the default device": str(torch.get_default_device()),
        "gradient mode": str(torch.is_grad_enabled()),
        "the number of threads": str(torch.get_num_threads()),
        "deterministic mode": str(torch.are_deterministic_algorithms_enabled()),
    }


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """See that the models and the process are left as they were, also where the body raises.

    Args:
        *models: The user's models.

    Yields:
        Nothing.

    Raises:
        Broken: Naming what changed; process-wide settings are put right first, so that other tests do not suffer.

    Examples:
        >>> with untouched(nn.Linear(2, 1)):
        ...     torch.manual_seed(3)
        Traceback (most recent call last):
        nervure.testing.checks.Broken: changed: torch's global generator
    """
    before = [state_of(model) for model in models]
    around = surroundings()
    settings = torch.get_rng_state(), np.random.get_state(), random.getstate(), torch.get_default_dtype()
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        yield
    finally:
        now = surroundings()
        torch.set_rng_state(settings[0])
        np.random.set_state(settings[1])
        random.setstate(settings[2])
        torch.set_default_dtype(settings[3])
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
        changed = [what for what, text in around.items() if now[what] != text]
        for model, old in zip(models, before, strict=True):
            new = state_of(model)
            changed += [what for what in {**old, **new} if old.get(what) != new.get(what)]
        require(not changed, f"changed: {', '.join(changed[:6])}")


def same(one: object, two: object, what: str) -> None:
    """See that two results are equal bit for bit.

    Args:
        one: A result, as in `tensors`.
        two: Another.
        what: Said where they differ.
    """
    left, right = dict(tensors(one)), dict(tensors(two))
    require(left.keys() == right.keys(), f"{what}: other entries")
    require(bool(left), f"{what}: nothing to compare")
    for name, value in left.items():
        require(value.shape == right[name].shape and digest(value) == digest(right[name]), f"{what}: {name} differs")


def finite(value: object, what: str) -> None:
    """See that a result has no NaN and no infinity.

    Args:
        value: As in `tensors`.
        what: Said where it has.
    """
    for name, tensor in tensors(value):
        require(bool(torch.isfinite(tensor).all()) if tensor.is_floating_point() else True, f"{what}: {name}")


class Poison(nn.Module):
    """Wrap a model so that a later forward raises: what a method leaves behind then must be nothing.

    Args:
        model: The model.
        after: Number of forwards that still work.
    """

    class Raised(RuntimeError):
        """Report the planned failure."""

    def __init__(self, model: nn.Module, *, after: int = 0) -> None:
        super().__init__()
        self.model, self.left = model, [after]  # a list, so that copies of the wrapper count together

    def __deepcopy__(self, memo: dict[int, Any]) -> Poison:
        import copy

        twin = Poison(copy.deepcopy(self.model, memo))
        twin.left, twin.training = self.left, self.training
        return twin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output, or raise.

        Raises:
            Raised: When the forwards that still work are used up.
        """
        if self.left[0] <= 0:
            raise Poison.Raised("planned")
        self.left[0] -= 1
        return self.model(*args, **kwargs)
