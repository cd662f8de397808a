"""What one job gets on a cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nervure._kit import UsageError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Say what one job gets on a cluster.

    Args:
        cpus: CPUs, and threads; a share of one, or a whole number.
        gpus: GPUs; a share of one, or a whole number.
        memory: Memory set aside, in GiB; none by default.

    Raises:
        UsageError: If a number is out of range.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory: float | None = None

    def __post_init__(self) -> None:
        if not (self.cpus > 0 and _countable(self.cpus)):
            raise UsageError("these are no CPUs", expected="a share of one, or a whole number", found=self.cpus)
        if not (self.gpus >= 0 and _countable(self.gpus)):
            raise UsageError("these are no GPUs", expected="0, a share of one, or a whole number", found=self.gpus)
        if self.memory is not None and not 0 < self.memory < math.inf:
            raise UsageError("this is no amount of memory", expected="GiB above 0", found=self.memory)

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU"] + [f"{self.gpus:g} GPU"] * (self.gpus > 0)
        return ", ".join(parts + [f"{self.memory:g} GiB" for _ in range(self.memory is not None)])

    def fit(self, node: dict[str, float]) -> int:
        """Return how many jobs a node of these resources holds, as Ray names and counts them."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": (self.memory or 0) * GIB}
        return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in asked.items() if amount)


def _countable(number: float) -> bool:
    return number <= 1 or (math.isfinite(number) and number == int(number))
