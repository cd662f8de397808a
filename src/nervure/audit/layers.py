"""What happens from layer to layer: dead and redundant units, signals and gradients that fade or explode."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nervure._kit import Unsupported
from nervure.audit.finding import Finding, Remedy
from nervure.audit.subject import Subject
from nervure.inspect.cnn_filter_quality import filter_quality

ALIKE = 0.999
PRUNER = "structurally-prune-anything"


def dead_units(subject: Subject) -> Finding:
    """Count the channels that hold one value on all samples and positions, at the entry of every layer but the first.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    shares, dead, total = {}, 0, 0
    for name, layer in list(subject.layers.items())[1:]:
        still = layer.inputs.std(0, correction=0) <= 1e-6 * layer.inputs.abs().amax().clamp_min(1e-30)
        shares[name] = float(still.double().mean())
        dead, total = dead + int(still.sum()), total + len(still)
    if not total:
        return Finding(check="dead units", level="cannot tell", measured="no layer follows another", meaning="")
    samples = max(len(layer.inputs) for layer in subject.layers.values())
    worst = max(shares, key=shares.__getitem__)
    measured = f"{dead} of {total} channels never change on up to {samples} samples and positions; most before {worst}"
    level = "ok" if not dead else "problem" if shares[worst] > 0.5 else "warning" if dead > 0.02 * total else "note"
    return Finding(
        check="dead units",
        level=level,  # type: ignore[arg-type]
        measured=measured,
        meaning="Dead units cost time and memory and do nothing; many of them mean that training lost capacity early."
        if dead
        else "Every unit is in use.",
        certainty="exact",
        remedy=Remedy(
            PRUNER,
            "Cut them out: the outputs stay as they are.",
            subject.command("prune", "--target macs=90%"),
        )
        if dead
        else None,
        values={"dead": float(dead), "units": float(total)},
        layers=shares,
        unit="share of dead channels at its entry",
    )


def redundant_units(subject: Subject) -> Finding:
    """Count the channels that are another channel times a number, within a thousandth.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    shares, twins, total = {}, 0, 0
    for name, layer in list(subject.layers.items())[1:]:
        moving = layer.inputs[:, layer.inputs.std(0, correction=0) > 0]
        if moving.shape[1] < 2 or len(moving) < 10:
            continue
        copies = _copies(moving)
        shares[name] = copies / moving.shape[1]
        twins, total = twins + copies, total + moving.shape[1]
    if not total:
        return Finding(
            check="redundant units", level="cannot tell", measured="no layer has two live channels", meaning=""
        )
    return Finding(
        check="redundant units",
        level="ok" if not twins else "warning" if twins > 0.05 * total else "note",
        measured=f"{twins} of {total} live channels are a multiple of an earlier one (correlation above {ALIKE})",
        meaning="Two units that always agree can be merged into one without loss."
        if twins
        else "No unit repeats another.",
        certainty="high",
        remedy=Remedy(
            "dynamic-clustering-compression",
            "Merge channels that do the same.",
            subject.command("prune", "--target macs=75%", "--method dynamic-clustering"),
        )
        if twins
        else None,
        values={"redundant": float(twins), "units": float(total)},
        layers=shares,
        unit="share of redundant channels at its entry",
    )


def _copies(rows: Tensor) -> int:
    """Return how many columns follow an earlier column that they are a multiple of, up to a constant."""
    z = F.normalize(rows - rows.mean(0), dim=0)
    alike = (z.T @ z).abs().triu(1) > ALIKE
    return int(alike.any(0).sum())


def signals(subject: Subject) -> Finding:
    """Follow the size of activations and gradients through the layers.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    scales = {name: layer.scale for name, layer in subject.layers.items()}
    found, samples = subject.gradients
    weights = dict(subject.probe.model.named_parameters())
    steps = {
        name: float(gradient.norm() / weights[name].detach().norm())
        for name, gradient in found.items()
        if gradient is not None and gradient.ndim > 1 and float(weights[name].detach().norm()) > 0
    }
    fade = _range({name: value for name, value in scales.items() if value > 0})
    flow = _range({name: value for name, value in steps.items() if value > 0})
    measured = (
        f"on {samples} samples the outputs' deviation differs {fade:.3g}-fold between layers, the gradient "
        f"beside the weight {flow:.3g}-fold"
    )
    level = "problem" if max(fade, flow) > 1e6 else "warning" if max(fade, flow) > 1e3 else "ok"
    return Finding(
        check="signals",
        level=level,  # type: ignore[arg-type]
        measured=measured,
        meaning="Signals and gradients are of like size in all layers."
        if level == "ok"
        else "Layers learn at speeds so different that one learning rate cannot fit them all.",
        certainty="medium",
        remedy=None
        if level == "ok"
        else Remedy("lsuv", "Start from weights scaled layer by layer on your data.", "nervure show lsuv"),
        values={"activations": fade, "gradients": flow},
        layers=steps,
        unit="norm of the gradient / norm of the weight",
    )


def _range(values: dict[str, float]) -> float:
    return max(values.values()) / min(values.values()) if values else 1.0


def filters(subject: Subject) -> Finding | None:
    """Judge the kernels of every convolution by the weights alone.

    Args:
        subject: The network.

    Returns:
        The finding; None without convolutions.
    """
    try:
        found = filter_quality(subject.model)
    except Unsupported:
        return None
    kinds = {name: layer.kind for name, layer in found.layers.items()}
    odd = {name: kind for name, kind in kinds.items() if kind in ("dead", "few patterns", "random")}
    worst = "; ".join(f"{name or 'the layer'} {kind}" for name, kind in list(odd.items())[:4])
    random = all(kind == "random" for kind in odd.values())
    meaning = (
        "Layers that look random have not learned: the network is untrained, under-trained or far too wide there."
        if random
        else "Dead kernels and repeated patterns say that the layer is wider than its task."
    )
    remedy = (
        Remedy("lsuv", "Train longer, or start better.", "nervure show lsuv")
        if random
        else Remedy(PRUNER, "Cut the layer's channels.", subject.command("prune", "--target macs=75%"))
    )
    return Finding(
        check="filters",
        level="warning" if odd else "ok" if found.verdict == "ok" else "cannot tell",
        measured=f"{len(kinds)} layers of kernels"
        + (f": {worst}" if odd else ", none random, dead or of few patterns"),
        meaning=meaning
        if odd
        else "The kernels have structure."
        if found.verdict == "ok"
        else "All layers are too small.",
        certainty="medium",
        remedy=remedy if odd else None,
        layers={name: layer.entropy for name, layer in found.layers.items()},
        unit="entropy of the kernels (base 10)",
    )
