"""What the network costs, layer by layer, and how much of it could go."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import nn

from nervure._kit import bytes_text
from nervure.audit.finding import Finding, Remedy, share
from nervure.audit.layers import PRUNER
from nervure.audit.subject import Subject
from nervure.core import allocate, forward, masks, modules, scores
from nervure.core.cost import cost
from nervure.core.taps import hooked

DENSITIES = (0.5, 0.2, 0.1)


def price(subject: Subject) -> Finding:
    """Measure time and memory, in all and by module.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    inputs, _ = subject.probe.batch(gradients=10, share=0.05, most=64, least=1)
    count = forward.batch_size(inputs)
    model = subject.probe.model
    counted = cost(model, forward.take(inputs, slice(0, 1)))
    times, whole = _times(model, inputs)
    slowest = sorted(times, key=times.__getitem__, reverse=True)[:3]
    told = ", ".join(f"{name} {times[name] / whole:.0%}" for name in slowest)
    return Finding(
        check="price",
        level="note",
        measured=f"{counted.parameters:,} parameters ({bytes_text(counted.bytes)}), {counted.macs:,} multiply-adds a "
        f"sample, {whole:.3g} ms for a batch of {count} here",
        meaning=f"Most of the time goes to {told}." if told else "",
        certainty="high",
        remedy=Remedy(
            PRUNER,
            "Make it smaller.",
            subject.command("prune", "--target ms=50%"),
        ),
        values={"parameters": counted.parameters, "bytes": counted.bytes, "macs": counted.macs, "ms": whole},
        layers=times,
        unit=f"ms for a batch of {count}",
    )


def _times(model: nn.Module, inputs: Any, *, repeats: int = 3) -> tuple[dict[str, float], float]:
    """Return milliseconds of every leaf module and of the whole forward: the least of a few runs."""
    began: dict[int, float] = {}
    found: list[dict[str, float]] = []
    names = {id(module): name for name, module in modules.leaf_modules(model)}

    def start(module: nn.Module, args: Any) -> None:
        began[id(module)] = time.perf_counter()

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        name = names[id(module)]
        found[-1][name] = found[-1].get(name, 0.0) + (time.perf_counter() - began[id(module)]) * 1000

    leaves = [module for _, module in modules.leaf_modules(model)]
    wholes = []
    with (
        forward.mode(model, train=False),
        torch.no_grad(),
        hooked([(leaf, start) for leaf in leaves], pre=True),
        hooked([(leaf, stop) for leaf in leaves]),
    ):
        for _ in range(repeats + 1):
            found.append({})
            at = time.perf_counter()
            forward.call(model, inputs)
            wholes.append((time.perf_counter() - at) * 1000)
    least = {name: min(one[name] for one in found[1:]) for name in found[1]}
    return least, min(wholes[1:])


def prunability(subject: Subject) -> Finding:
    """Drop the smallest weights of all layers together, without any training after, and look at the accuracy.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    inputs, targets = subject.test if subject.test is not None else subject.probe.data
    allowed = int(0.1 * subject.probe.seconds / (len(DENSITIES) * subject.probe.gradient_seconds / 3))
    count = max(16, min(forward.batch_size(inputs), allowed, 1000))
    x, y = forward.take(inputs, slice(0, count)), targets[:count].flatten()
    weights = modules.weights(subject.probe.model)
    worth = scores.magnitude(weights)

    def right(model: nn.Module) -> int:
        found = forward.predict(model, x, batch=256)
        return int((found.flatten(0, -2).argmax(1) == y).sum())

    base = right(subject.probe.model)
    left: dict[float, tuple[float, float, float]] = {}
    for density in DENSITIES:
        small = copy.deepcopy(subject.probe.model)
        masks.attach(small, allocate.globally(worth, allocate.whole(weights), density=density))
        left[density] = share(right(masks.baked(small)), len(y))
    known = share(base, len(y))
    kept = [density for density, (found, _, _) in left.items() if found >= known[0] - 0.02]
    told = ", ".join(f"{density:.0%}: {found:.1%}" for density, (found, _, _) in left.items())
    best = min(kept, default=None)
    return Finding(
        check="prunability",
        level="note",
        measured=f"accuracy {known[0]:.1%} [{known[1]:.1%}, {known[2]:.1%}] on {len(y)} answers; with the largest "
        f"weights alone, untrained after: {told}",
        meaning=f"{1 - best:.0%} of the weights can go at once for two points at most; with training after, more."
        if best is not None
        else "Every cut needs training after: no half of the weights can go at once for two points.",
        certainty="medium",
        remedy=Remedy(
            "lottery-ticket",
            "Prune and train on; zeros save bytes, cut channels save time.",
            subject.command("prune", f"--target density={best / 2:.0%}" if best else "--target density=50%"),
        ),
        values={f"accuracy_at_{density:g}": found for density, (found, _, _) in left.items()} | {"accuracy": known[0]},
    )
