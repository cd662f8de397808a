"""Two worlds that no sample and hypothesis can tell apart, with all parities of a few bits enumerated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Worlds:
    """Hold draws: in world A the learner outputs the true parity, in B a random one that fits the sample.

    Args:
        x: Samples of bits, shape (m, n, d).
        y: Their true parities, shape (m, n).
        hypothesis: The learner's parity, shape (m, d).
        truth: The true parity, shape (m, d).
        second: Whether the draw is of world B.
        fitting: How many parities fit the sample.
    """

    x: Tensor
    y: Tensor
    hypothesis: Tensor
    truth: Tensor
    second: Tensor
    fitting: Tensor

    @property
    def error(self) -> Tensor:
        """The hypothesis' population error: 0 if it is the truth, else 1/2, as two parities agree on half of all."""
        return 0.5 * (self.hypothesis != self.truth).any(1).double()

    @property
    def floor(self) -> float:
        """Return the least mean absolute error of any function of sample and hypothesis, given the samples drawn."""
        return float((0.25 * (1 - 1 / self.fitting.double())).mean())


def draw(count: int, *, bits: int, samples: int, source: torch.Generator) -> Worlds:
    """Draw from an even mixture of both worlds.

    Args:
        count: m.
        bits: d, at most 14: all parities are enumerated.
        samples: n.
        source: The generator.

    Returns:
        The draws.
    """
    every = (torch.arange(2**bits).unsqueeze(1) >> torch.arange(bits)) & 1
    parts = []
    for size in torch.arange(count).split(max(1, 2**25 // (samples * 2**bits))):
        m = len(size)
        x = torch.randint(0, 2, (m, samples, bits), generator=source)
        truth = every[torch.randint(len(every), (m,), generator=source)]
        y = (x * truth.unsqueeze(1)).sum(2) % 2
        fits = ((x.float() @ every.T.float()).to(torch.int8) % 2 == y.unsqueeze(2)).all(1)
        second = torch.rand(m, generator=source) < 0.5
        other = every[torch.multinomial(fits.float(), 1, generator=source).squeeze(1)]
        parts.append((x, y, torch.where(second.unsqueeze(1), other, truth), truth, second, fits.sum(1)))
    return Worlds(*(torch.cat(column) for column in zip(*parts, strict=True)))
