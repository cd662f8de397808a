"""Count what is spent: forwards, backwards, optimizer steps, seconds and the bytes saved for backward."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from nervure._kit import BadModel
from nervure.core import forward


class Meter:
    """Count what a stretch of work spends.

    Optimizer steps are counted for every optimizer that steps meanwhile, but not again for one that steps inside
    another's step; forwards and backwards for the watched models; saved bytes for every tensor that autograd keeps,
    parameters left out.

    Args:
        *models: Models whose passes are counted.
        track_saved: Whether to count saved bytes, which costs time at every operation.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> with Meter(model) as meter:
        ...     model(torch.randn(3, 4)).sum().backward()
        >>> meter.forwards, meter.backwards, meter.steps, meter.peak_saved_bytes
        (1, 1, 0, 48)
    """

    def __init__(self, *models: nn.Module, track_saved: bool = True) -> None:
        self.models, self.track_saved = models, track_saved
        self.forwards = self.backwards = self.steps = 0
        self.seconds = self.cpu_seconds = 0.0
        self.saved_bytes = self.peak_saved_bytes = 0
        self._handles: list[Any] = []
        self._outermost: torch.optim.Optimizer | None = None

    def __enter__(self) -> Meter:
        parameters = {p.untyped_storage().data_ptr() for model in self.models for p in model.parameters()}
        self._handles = [model.register_forward_hook(self._forward) for model in self.models]
        self._handles.append(register_optimizer_step_pre_hook(self._enter_step))
        self._handles.append(register_optimizer_step_post_hook(self._step))
        self._saved: AbstractContextManager[Any] = nullcontext()
        if self.track_saved:
            self._saved = torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: _Saved(tensor, self, parameters), _Saved.unpack
            )
        self._saved.__enter__()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]
        self._saved.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.forwards += 1
        try:
            main = forward.logits(output)
        except BadModel:
            return  # a pass without a tensor output cannot be differentiated either
        if main.requires_grad:
            main.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += 1

    def _enter_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._outermost is None:
            self._outermost = optimizer

    def _step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self._outermost:
            self.steps += 1
            self._outermost = None

    def cost(self) -> dict[str, float]:
        """Return the counts as a dict for a Record."""
        return {
            "forwards": self.forwards,
            "backwards": self.backwards,
            "steps": self.steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            **({"peak_saved_bytes": self.peak_saved_bytes} if self.track_saved else {}),
        }


class _Saved:
    """Hold a tensor saved for backward and give its bytes back when autograd lets go of it."""

    def __init__(self, tensor: Tensor, meter: Meter, parameters: set[int]) -> None:
        self.tensor, self.meter = tensor, meter
        own = tensor.untyped_storage().data_ptr() in parameters
        self.bytes = 0 if own else tensor.numel() * tensor.element_size()
        meter.saved_bytes += self.bytes
        meter.peak_saved_bytes = max(meter.peak_saved_bytes, meter.saved_bytes)

    def unpack(self) -> Tensor:
        return self.tensor

    def __del__(self) -> None:
        self.meter.saved_bytes -= self.bytes
