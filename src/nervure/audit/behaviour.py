"""Does the network answer the same question the same way, and are all its parts in use?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nervure.audit.finding import Finding, Remedy
from nervure.audit.subject import Subject
from nervure.core.capture import undisturbed
from nervure.core.forward import outputs, take

TOLERANCE = 1e-4


def determinism(subject: Subject) -> Finding:
    """Run one batch twice in eval mode, and one of its samples alone.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    model = subject.probe.model
    inputs, _ = subject.probe.first(32)
    with torch.no_grad(), undisturbed(model), torch.no_grad():
        once, again = outputs(model, inputs), outputs(model, inputs)
        alone = outputs(model, take(inputs, slice(0, 1)))
    size = float(once.abs().max().clamp_min(1e-30))
    twice, mixed = float((once - again).abs().max()) / size, float((once[:1] - alone).abs().max()) / size
    values = {"between_two_calls": twice, "alone_and_in_a_batch": mixed}
    measured = (
        f"{len(once)} samples: largest difference between two calls {twice:.1e}, alone and in a batch {mixed:.1e}"
    )
    if twice > 0:
        return Finding(
            check="determinism",
            level="problem",
            measured=measured,
            meaning="In eval mode the network gives one input two answers: something in it draws random numbers.",
            certainty="exact",
            remedy=Remedy("", "Look for functional dropout without training=self.training, or noise in forward."),
            values=values,
        )
    if mixed > TOLERANCE:
        return Finding(
            check="determinism",
            level="problem",
            measured=measured,
            meaning="The answer for a sample depends on the others of its batch: one by one it answers otherwise.",
            certainty="exact",
            remedy=Remedy("", "Look for batch norms without running statistics, or a softmax over the batch."),
            values=values,
        )
    return Finding(
        check="determinism",
        level="ok",
        measured=measured,
        meaning="The network answers the same question the same way.",
        certainty="exact",
        values=values,
    )


def modes(subject: Subject) -> Finding:
    """Look at the mode the network came in, and compare its answers in both.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    model = subject.probe.model
    inputs, targets = subject.probe.first(64)
    found: dict[str, Tensor] = {}
    for name, train in (("eval", False), ("train", True)):
        with torch.no_grad(), undisturbed(model), torch.no_grad():
            model.train(train)
            try:
                found[name] = outputs(model, inputs)
            finally:
                model.eval()
    changed = float((found["train"] - found["eval"]).abs().max() / found["eval"].abs().max().clamp_min(1e-30))
    losses = {name: float(subject.probe.loss(value, targets)) for name, value in found.items()}
    measured = (
        f"loss on {len(targets)} training samples: {losses['eval']:.4g} in eval mode, {losses['train']:.4g} in train"
    )
    values = {"largest_change": changed, **{f"loss_{name}": value for name, value in losses.items()}}
    if losses["eval"] > 2 * losses["train"] + 0.1:
        return Finding(
            check="modes",
            level="problem",
            measured=measured,
            meaning="It is much worse in eval than in train mode on the same samples: the running statistics of its "
            "norms do not fit its data.",
            remedy=Remedy("", "Estimate them anew on training data: nervure.core.renorm.reestimate_(model, batches)."),
            values=values,
        )
    if subject.model.training and changed > TOLERANCE:
        return Finding(
            check="modes",
            level="note",
            measured=measured,
            meaning="The network came in train mode, where it answers otherwise than in eval mode.",
            certainty="exact",
            remedy=Remedy("", "Call model.eval() before serving it."),
            values=values,
        )
    return Finding(
        check="modes", level="ok", measured=measured, meaning="Train and eval mode agree well enough.", values=values
    )


def parameters_in_use(subject: Subject) -> Finding:
    """Look for parameters without a gradient: frozen, unused, or cut off by a unit that is never active.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    found, samples = subject.gradients
    unused = [name for name, gradient in found.items() if gradient is None]
    zero = [name for name, gradient in found.items() if gradient is not None and bool((gradient == 0).all())]
    frozen = [name for name, value in subject.model.named_parameters() if not value.requires_grad]
    values = {"unused": float(len(unused)), "zero": float(len(zero)), "frozen": float(len(frozen))}
    measured = (
        f"of {len(found) + len(frozen)} parameter tensors {len(unused)} have no path to the loss, "
        f"{len(zero)} a gradient of exactly zero on {samples} samples, {len(frozen)} are frozen"
    )
    if not unused and not zero:
        meaning = "Every parameter that is trained has a part in the loss."
        return Finding(
            check="parameters", level="note" if frozen else "ok", measured=measured, meaning=meaning, values=values
        )
    names = ", ".join([*unused, *zero][:4])
    return Finding(
        check="parameters",
        level="warning",
        measured=measured,
        meaning=f"These learn nothing and still cost memory and time: {names}.",
        certainty="exact",
        remedy=Remedy("", "Remove them, or connect them; a ReLU before them may never be active."),
        values=values,
    )


def finite_weights(subject: Subject) -> Finding:
    """Look for weights that are not finite, or enormous beside the rest of their tensor.

    Args:
        subject: The network.

    Returns:
        The finding.
    """
    broken, outliers = [], {}
    for name, value in subject.model.named_parameters():
        if not value.is_floating_point() or not value.numel():
            continue
        if not bool(value.isfinite().all()):
            broken.append(name)
            continue
        size = value.detach().double().flatten().abs()
        # Of all but the largest, which would hide itself in the mean.
        typical = float(((size.square().sum() - size.max() ** 2).clamp_min(0) / max(1, len(size) - 1)).sqrt())
        if (
            typical > 0
            and value.numel() >= 64
            and float(size.max()) > 100 * typical * math.sqrt(math.log(value.numel()))
        ):
            outliers[name] = float(size.max()) / typical
    if broken:
        return Finding(
            check="weights",
            level="problem",
            measured=f"{len(broken)} tensors hold NaN or infinity: {', '.join(broken[:4])}",
            meaning="The network diverged; nothing else about it can be trusted.",
            certainty="exact",
            remedy=Remedy("", "Go back to the last checkpoint with finite weights and lower the learning rate."),
        )
    if outliers:
        return Finding(
            check="weights",
            level="warning",
            measured=f"{len(outliers)} tensors hold a weight far beyond the others: {', '.join(list(outliers)[:4])}",
            meaning="Single huge weights make low-precision formats lose all the small ones.",
            certainty="medium",
            layers=outliers,
            unit="largest weight / root mean square",
        )
    return Finding(check="weights", level="ok", measured="every weight is finite", meaning="Nothing stands out.",
                   certainty="exact")  # fmt: skip
