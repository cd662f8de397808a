"""Knowledge distillation from logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from nervure._kit import UsageError


def distillation(
    scores: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 2.0, share: float = 0.5
) -> Tensor:
    """Return (1 - share) cross-entropy + share T^2 KL(softmax(teacher / T) || softmax(scores / T)).

    Args:
        scores: The student's class scores, shape (N, classes).
        teacher: The teacher's, of the same shape; no gradient reaches them.
        labels: Class numbers, shape (N,).
        temperature: T, above 0.
        share: Weight of the teacher, in [0, 1].

    Returns:
        A scalar.

    Raises:
        UsageError: If a number is outside its range.

    Examples:
        >>> import torch
        >>> scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        >>> round(distillation(scores, scores, labels, share=1.0).item(), 6)
        0.0
    """
    if temperature <= 0 or not 0 <= share <= 1:
        raise UsageError("there is no such distillation", expected="T > 0, 0 <= share <= 1", found=(temperature, share))
    soft = F.kl_div(
        (scores / temperature).log_softmax(-1),
        (teacher.detach() / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - share) * F.cross_entropy(scores, labels) + share * temperature**2 * soft
