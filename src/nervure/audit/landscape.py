"""How sharp the loss is here, and whether the examples pull together."""

from __future__ import annotations

from nervure.audit.finding import Finding, Remedy
from nervure.audit.subject import Subject
from nervure.core.forward import take
from nervure.core.lanczos import eigenpairs, trace
from nervure.core.operators import hessian
from nervure.inspect.functional_dimension import local_dimension
from nervure.inspect.gradient_coherence import m_coherence

PRODUCTS, PROBES = 20, 6
RANKED = 1500


def curvature(subject: Subject) -> Finding:
    """Measure the largest eigenvalue of the Hessian against 2 / learning rate, on two batches.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    probe = subject.probe
    # A product costs about two gradients.
    inputs, targets = probe.batch(gradients=2 * (PRODUCTS + PROBES), share=0.35, most=1024)
    half = len(targets) // 2
    found = []
    with probe.untouched("curvature"):
        whole = hessian(probe.model, (inputs, targets), probe.loss, parameters=probe.parameters)
        spread = trace(whole, products=PROBES, method="hutchinson", seed=subject.seed)
        for part in (slice(0, half), slice(half, None)):
            batch = (take(inputs, part), targets[part])
            operator = hessian(probe.model, batch, probe.loss, parameters=probe.parameters)
            found.append(eigenpairs(operator, 1, which="largest", tolerance=2e-2, limit=PRODUCTS, seed=subject.seed))
    low, high = sorted(float(one.values[0]) for one in found)
    top = (low + high) / 2
    largest_rate = 2 / top if top > 0 else float("inf")
    measured = (
        f"largest eigenvalue {low:.4g} and {high:.4g} on two batches of {half} training samples, trace "
        f"{spread.value:.4g} [{spread.low:.4g}, {spread.high:.4g}]"
    )
    values = {"eigenvalue": top, "low": low, "high": high, "trace": spread.value}
    if not all(bool(one.converged.all()) for one in found):
        return Finding(
            check="curvature",
            level="cannot tell",
            measured=f"{PRODUCTS} products were too few for the largest eigenvalue to converge",
            meaning="A value without a proof of convergence is not given.",
        )
    remedy = Remedy("hessian-spectrum", "Look at the spectrum layer by layer.", "nervure show hessian-spectrum")
    if subject.rate is None:
        return Finding(
            check="curvature",
            level="note",
            measured=measured,
            meaning=f"Gradient descent is stable here up to a rate of {largest_rate:.3g}; --rate compares yours.",
            certainty="medium",
            remedy=remedy,
            values=values,
        )
    over = low > 2 / subject.rate
    values["edge"] = 2 / subject.rate
    return Finding(
        check="curvature",
        level="warning" if over else "ok",
        measured=f"{measured}; 2 / rate is {2 / subject.rate:.4g}",
        meaning="The curvature is beyond what plain gradient descent of this rate can follow: the loss will "
        "oscillate or spike unless the rate falls."
        if over
        else "The learning rate is within what the curvature allows.",
        certainty="medium",
        remedy=Remedy("hessian-spectrum", f"Lower the rate under {largest_rate:.3g}, or anneal it.") if over else None,
        values=values,
    )


def coherence(subject: Subject) -> Finding:
    """Measure how far the gradients of single examples share a direction, layer by layer.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    # Layers that are not linear write every example's gradient out: about four passes.
    found = subject.probe.run(m_coherence, subject.probe.batch(gradients=5, share=0.15, most=1024))
    whole = found.whole
    measured = (
        f"on {whole.m} training samples two examples share {whole.shared:.4g} +- {2 * whole.error:.2g} of a gradient "
        f"(m-coherence {whole.m_coherence:.3g})"
    )
    values = {"shared": whole.shared, "error": whole.error, "m_coherence": whole.m_coherence}
    layers = {name: layer.shared for name, layer in found.layers.items()}
    told = {
        "ok": "Examples pull together: what is learned on one helps others.",
        "warn": "Each example pulls its own way, as with random labels: further training memorises, or has ended.",
        "cannot tell": "The samples are too few to tell shared gradients from none.",
    }
    level = {"ok": "ok", "warn": "note", "cannot tell": "cannot tell"}[found.verdict]
    remedy = Remedy(
        "gradient-coherence",
        "Drop what few examples share: nervure.inspect.median_of_means_ in place of backward.",
        "nervure show gradient-coherence",
    )
    return Finding(
        check="coherence",
        level=level,  # type: ignore[arg-type]
        measured=measured,
        meaning=told[found.verdict],
        certainty="medium",
        remedy=remedy if found.verdict == "warn" else None,
        values=values,
        layers=layers,
        unit="shared part of two examples' gradients",
    )


def dimension(subject: Subject) -> Finding:
    """Count the parameter entries that no output depends on, and the rank of the Jacobian where that is feasible.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    probe = subject.probe
    size = sum(value.numel() for name, value in probe.model.named_parameters() if name in set(probe.parameters))
    # The rank takes a pass in double precision for every output; without it one pass does for all.
    passes = 2.0 if size > RANKED else 4.0 * subject.scores[0].shape[1]
    batch = probe.batch(gradients=passes, share=0.1)
    found = probe.run(local_dimension, batch, most=RANKED)
    silent = sum(found.silent.values())
    values = {"silent": float(silent), "parameters": float(found.parameters)}
    measured = f"on {len(batch[1])} samples no output depends on {silent:,} of {found.parameters:,} parameters"
    if found.dimension is not None:
        values["dimension"] = float(found.dimension)
        measured += f"; {found.dimension:,} directions of them change the outputs (rank of {found.rows:,} outputs)"
    share = silent / max(1, found.parameters)
    return Finding(
        check="functional dimension",
        level="warning" if share > 0.25 else "note" if silent else "ok",
        measured=measured,
        meaning="These parameters can be removed without changing an answer here; rarer inputs may still use them."
        if silent
        else "Every parameter changes some output.",
        certainty="medium",
        remedy=Remedy("functional-dimension", "Cut what is not used.", subject.command("prune", "--target density=90%"))
        if share > 0.25
        else None,
        values=values,
    )
