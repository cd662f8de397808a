"""What a network costs: parameters, nonzeros, MACs, bytes on disk and measured milliseconds.

Physical MACs are what the hardware does with the tensors as they are; nonzero MACs are what would be left if every
zero weight were skipped. They are counted on two separate paths, so that a mask can never pass for a speed-up.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nervure.core import forward, masks
from nervure.core.modules import CONVOLUTIONS, TRANSPOSED


@dataclass(frozen=True)
class Cost:
    """Hold what one forward of one batch costs.

    Args:
        parameters: Number of parameters, tied ones once.
        nonzeros: Number of parameters that are not zero.
        macs: Multiply-adds the hardware does.
        nonzero_macs: Multiply-adds with a nonzero weight.
        bytes: Size of the state as a file.
    """

    parameters: int
    nonzeros: int
    macs: int
    nonzero_macs: int
    bytes: int

    def to_json(self) -> dict[str, int]:
        """Return the numbers by name."""
        return asdict(self)


def cost(model: nn.Module, inputs: Any) -> Cost:
    """Count a model's cost on a batch, in eval mode and without gradients.

    Args:
        model: The model, left as it is.
        inputs: A batch's inputs; MACs are for this batch, so use one sample for MACs per sample.

    Returns:
        The counts.

    Examples:
        >>> cost(nn.Linear(8, 4), torch.ones(1, 8)).macs
        32
    """
    parameters = list(model.parameters())
    physical = macs(model, inputs)
    return Cost(
        parameters=sum(parameter.numel() for parameter in parameters),
        nonzeros=sum(int(torch.count_nonzero(parameter)) for parameter in parameters),
        macs=physical,
        nonzero_macs=physical - _zero_macs(model, inputs),
        bytes=bytes_on_disk(model),
    )


def bytes_on_disk(model: nn.Module) -> int:
    """Return the size of the model's state as a safetensors file, without masks (a reader needs only the weights).

    Args:
        model: The model.

    Returns:
        The number of bytes really written.
    """
    seen: set[tuple[int, torch.Size]] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if name.endswith((masks.MASK, masks.CARRIER)) or (key in seen and tensor.numel()):
            continue
        seen.add(key)
        state[name] = tensor.contiguous()
    return len(to_bytes(state))


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Switch off the fused fast path of attention, which no hook or counter sees into."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def macs(model: nn.Module, inputs: Any) -> int:
    """Count the multiply-adds the hardware does, operator by operator as they run, in eval mode.

    Fused recurrent kernels are switched off for it, because the counter cannot see into them.

    Args:
        model: The model, left as it is.
        inputs: A batch's inputs.

    Returns:
        The count.
    """
    counter = FlopCounterMode(display=False)
    with forward.mode(model, train=False), torch.no_grad(), _slow_attention(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # said by the switch itself
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False), counter:
            forward.call(model, inputs)
    return int(counter.get_total_flops()) // 2


def _zero_macs(model: nn.Module, inputs: Any) -> int:
    """Count the multiply-adds whose weight is zero, layer by layer."""
    total: list[int] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for weight, positions in _uses(module, args or tuple(kwargs.values()), output):
            total.append(positions * (weight.numel() - int(torch.count_nonzero(weight))))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in model.modules()]
    try:
        with forward.mode(model, train=False), torch.no_grad(), _slow_attention():
            forward.call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sum(total)


def _uses(module: nn.Module, args: Any, output: Any) -> list[tuple[Tensor, int]]:
    """Return the weights a call multiplies with, and at how many positions each of their entries is used."""
    if isinstance(module, nn.Linear):
        return [(module.weight, output.numel() // module.out_features)]
    if isinstance(module, CONVOLUTIONS):
        return [(module.weight, output.numel() // module.out_channels)]
    if isinstance(module, TRANSPOSED):
        return [(module.weight, args[0].numel() // module.in_channels)]
    if isinstance(module, nn.RNNBase):
        steps = args[0].numel() // module.input_size
        return [(weight, steps) for name, weight in module.named_parameters() if name.startswith("weight")]
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        positions = args[0].numel() // args[0].shape[-1]
        return [(module.in_proj_weight, positions), (module.out_proj.weight, positions)]
    return []


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, on which times of small operations can be compared, and give the setting back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def milliseconds(
    run: Callable[[], Any], *, warm_up: int = 3, repeats: int = 10, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Measure how long a call takes, after warming up.

    Args:
        run: What to measure.
        warm_up: Calls before measuring, at least 0.
        repeats: Measured calls, at least 1.
        clock: ``time.perf_counter`` for wall time, ``time.process_time`` for CPU time.

    Returns:
        Minimum and median in milliseconds.
    """
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append((clock() - start) * 1000)
    return min(times), statistics.median(times)


def latency(model: nn.Module, inputs: Any, *, repeats: int = 10) -> tuple[float, float]:
    """Measure a forward in eval mode without gradients.

    Args:
        model: The model.
        inputs: A batch's inputs.
        repeats: Measured calls.

    Returns:
        Minimum and median in milliseconds.
    """
    with forward.mode(model, train=False), torch.no_grad():
        return milliseconds(lambda: forward.call(model, inputs), repeats=repeats)
