"""How good the answers are, how honest the confidence, and what a shift by one pixel does."""

from __future__ import annotations

import torch
from torch import Tensor

from nervure.audit.finding import Finding, Remedy, share, spread
from nervure.audit.subject import Subject
from nervure.core.calibration import calibration_error
from nervure.core.forward import batch_size, outputs, take


def accuracy(subject: Subject) -> Finding:
    """Measure the held-out accuracy against chance and the commonest class.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    scores, targets = subject.scores
    right = int((scores.argmax(1) == targets).sum())
    found, low, high = share(right, len(targets))
    commonest = float(targets.bincount().max()) / len(targets)
    measured = (
        f"{found:.1%} right [{low:.1%}, {high:.1%}] of {len(targets)} held-out answers; the commonest class has "
        f"{commonest:.1%}"
    )
    values = {"accuracy": found, "low": low, "high": high, "commonest": commonest}
    if low > commonest:
        meaning = "It answers better than always naming the commonest class."
        return Finding(check="accuracy", level="ok", measured=measured, meaning=meaning, values=values)
    return Finding(
        check="accuracy",
        level="problem",
        measured=measured,
        meaning="It does not answer better than always naming the commonest class: is it trained, and on these labels?",
        remedy=Remedy("lsuv", "If it does not train, start from weights scaled on your data.", "nervure show lsuv"),
        values=values,
    )


def calibration(subject: Subject) -> Finding:
    """Compare the confidence of the answers with how often they are right.

    Args:
        subject: The network and its data.

    Returns:
        The finding.
    """
    scores, targets = subject.scores
    probabilities = scores.softmax(1)
    confidence, guess = probabilities.max(1)
    gap, low, high = spread((confidence - (guess == targets).double()).numpy(), seed=subject.seed)
    error = calibration_error(probabilities, targets)
    over = low > 0.05
    under = high < -0.05
    measured = (
        f"mean confidence less accuracy {gap:+.3f} [{low:+.3f}, {high:+.3f}] on {len(targets)} held-out answers; "
        f"calibration error {error:.3f}"
    )
    return Finding(
        check="calibration",
        level="warning" if over or under else "ok",
        measured=measured,
        meaning="It is surer than it is right: its probabilities cannot be taken at their word."
        if over
        else "It is less sure than it is right."
        if under
        else "Its confidence fits its accuracy on average.",
        remedy=Remedy("ivon", "Train with an optimizer that learns its own uncertainty.", "nervure show ivon")
        if over
        else None,
        values={"gap": gap, "low": low, "high": high, "error": error},
    )


def one_pixel(subject: Subject) -> Finding | None:
    """Shift held-out images by one pixel in four directions and count the answers that change.

    Args:
        subject: The network and its data.

    Returns:
        The finding; None where the inputs are not images.
    """
    assert subject.test is not None
    inputs, _ = subject.test
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or min(inputs.shape[2:]) < 4:
        return None
    probe = subject.probe
    allowed = int(0.1 * probe.seconds / (5 * probe.gradient_seconds / 3))
    images = inputs[: max(8, min(batch_size(inputs), allowed, 512))]
    with torch.no_grad():
        answers = [_answers(subject, moved) for moved in (images, *_moved(images))]
    changed = [int((one != answers[0]).sum()) for one in answers[1:]]
    flips = torch.stack([one != answers[0] for one in answers[1:]]).double().mean(0)
    found, low, high = spread(flips.numpy(), seed=subject.seed)
    return Finding(
        check="one-pixel shifts",
        level="warning" if low > 0.05 else "note" if low > 0.01 else "ok",
        measured=f"{found:.1%} of the answers change [{low:.1%}, {high:.1%}], {len(images)} images, four directions",
        meaning="A picture taken a pixel aside gets another answer: accuracy in use will be below that measured."
        if low > 0.01
        else "Answers hardly depend on a pixel's shift.",
        certainty="high",
        remedy=Remedy("", "Train with random crops, or blur before every stride.") if low > 0.05 else None,
        values={"changed": found, "low": low, "high": high, "worst_direction": max(changed) / len(images)},
    )


def _answers(subject: Subject, images: Tensor) -> Tensor:
    parts = [outputs(subject.probe.model, take(images, slice(at, at + 256))) for at in range(0, len(images), 256)]
    return torch.cat(parts).flatten(1, -2).argmax(-1) if parts[0].ndim > 2 else torch.cat(parts).argmax(1)


def _moved(images: Tensor) -> list[Tensor]:
    """Return the images moved by one pixel, the edge repeated."""
    wide = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[2:]
    return [wide[:, :, top : top + height, left : left + width] for top, left in ((0, 1), (2, 1), (1, 0), (1, 2))]
