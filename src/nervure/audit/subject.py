"""The network under audit, with what the checks share: its data, its learning rate and recorded layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nervure.core.forward import batch_size, call, mode, outputs, take
from nervure.core.graph import Stage
from nervure.core.probe import Probe
from nervure.core.taps import hooked

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
ROWS = 4096


@dataclass(frozen=True)
class Layer:
    """Hold what went into and came out of a linear layer or convolution, summed up.

    Args:
        inputs: Input channels at some samples and positions, shape (rows, channels).
        scale: Standard deviation of the outputs.
    """

    inputs: Tensor
    scale: float


class Subject:
    """Bind everything a check may ask for.

    Args:
        model: The user's network, as it came from them.
        name: What the user calls it, for commands.
        probe: The network bound to training data; None without data.
        test: Held-out inputs and targets; None without data.
        data: What the user calls the data, for commands.
        rate: The learning rate it is trained with, or None.
        seed: Decides everything random.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        probe: Probe | None = None,
        test: tuple[Any, Tensor] | None = None,
        data: str = "",
        rate: float | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.name, self.test, self.data = model, name, test, data
        self.rate, self.seed = rate, seed
        self._probe = probe

    @property
    def probe(self) -> Probe:
        """The network bound to its training data."""
        assert self._probe is not None  # checks that need data are not run without
        return self._probe

    def command(self, verb: str, *words: str) -> str:
        """Return a nervure command on this network and its data.

        Args:
            verb: Such as ``"prune"``.
            *words: What follows.

        Returns:
            The command line.
        """
        return " ".join(["nervure", verb, self.name, *(["--data", self.data] if self.data else []), *words])

    @cached_property
    def scores(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets of as many held-out samples as a tenth of the budget pays for, flat over positions."""
        assert self.test is not None
        inputs, targets = self.test
        # A forward costs about a third of what forward and backward do.
        allowed = int(0.1 * self.probe.seconds / (self.probe.gradient_seconds / 3))
        count = max(16, min(batch_size(inputs), allowed))
        with torch.no_grad():
            parts = [
                outputs(self.probe.model, take(inputs, slice(start, min(start + 256, count))))
                for start in range(0, count, 256)
            ]
        found = torch.cat(parts)
        return found.flatten(0, -2).double(), targets[:count].flatten()

    @cached_property
    def gradients(self) -> tuple[dict[str, Tensor | None], int]:
        """Parameter -> its gradient of the loss on some training samples, None where it has no path; and how many."""
        stage = Stage(self.probe.model, self.probe.batch(gradients=2), parameters=self.probe.parameters)
        with stage.ready():
            inputs, targets = stage.batches[0]
            value = self.probe.loss(stage.output(inputs), targets)
            found = torch.autograd.grad(value, list(stage.parameters.values()), allow_unused=True)
        return dict(zip(stage.parameters, found, strict=True)), stage.samples

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Linear layers and convolutions in the order they ran on some training samples; a layer used twice, once."""
        inputs, _ = self.probe.batch(gradients=1, share=0.1, most=256)
        kept: dict[str, Layer] = {}
        draw = torch.Generator().manual_seed(self.seed)

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if name not in kept and args and isinstance(args[0], Tensor):
                    rows = _rows(args[0].detach(), module)
                    chosen = torch.randperm(len(rows), generator=draw)[:ROWS]
                    kept[name] = Layer(
                        rows[chosen.to(rows.device)].double().cpu(), float(output.detach().double().std())
                    )

            return hook

        pairs = [
            (module, keep(name)) for name, module in self.probe.model.named_modules() if isinstance(module, WEIGHTED)
        ]
        with self.probe.untouched("recording"), torch.no_grad(), mode(self.probe.model, train=False), hooked(pairs):
            call(self.probe.model, inputs)
        return kept


def _rows(value: Tensor, module: nn.Module) -> Tensor:
    """Return samples and positions as rows and channels as columns."""
    if isinstance(module, nn.Linear):
        return value.reshape(-1, value.shape[-1])
    spatial = value.ndim - (module.weight.ndim - 1) if isinstance(module.weight, Tensor) else 1
    return value.movedim(spatial, -1).reshape(-1, value.shape[spatial])
