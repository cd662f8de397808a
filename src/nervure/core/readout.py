"""What fixed features know: simple classifiers fitted on them, and few-shot episodes."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nervure._kit import BadData, UsageError
from nervure.core import rng

Kind = Literal["ridge", "logistic", "nearest-mean", "nearest-neighbours"]
KINDS: tuple[Kind, ...] = ("ridge", "logistic", "nearest-mean", "nearest-neighbours")
PENALTIES = tuple(float(p) for p in np.logspace(-2, 5, 8))


class Readout:
    """Fit a classifier on features that stay as they are.

    Features are standardised by the training samples; one that never varies is dropped. The ridge penalty is chosen by
    leaving one out in closed form, from a fixed grid; logistic regression has a fixed one.

    Args:
        features: Training features, shape (N, ...); flattened to a row a sample.
        labels: Classes, shape (N,).
        kind: ``"ridge"`` regression on +-1 targets, ``"logistic"`` regression, the ``"nearest-mean"`` of the classes
            (whose features are only centred, not scaled) or a vote of five ``"nearest-neighbours"``.

    Raises:
        UsageError: If there is no such kind.
        BadData: If features and labels differ in number, features are not finite, or there is one class alone.

    Examples:
        >>> x = torch.tensor([[0.0], [0.1], [0.9], [1.0]])
        >>> Readout(x, torch.tensor([0, 0, 1, 1])).accuracy(x, torch.tensor([0, 0, 1, 1]))
        1.0
    """

    def __init__(self, features: Tensor, labels: Tensor, *, kind: Kind = "ridge") -> None:
        if kind not in KINDS:
            raise UsageError("there is no such readout", expected=", ".join(KINDS), found=kind)
        if len(features) != len(labels):
            raise BadData("features and labels differ in number", expected=len(labels), found=len(features))
        rows, classes = _rows(features), labels.detach().cpu().numpy()
        if not np.isfinite(rows).all():
            raise BadData("the features are not finite", found="NaN or infinity", try_="a smaller learning rate")
        if len(np.unique(classes)) < 2:
            raise BadData("there is one class alone", expected="two classes or more")
        self._fitted = _estimator(kind).fit(rows, classes)

    def predict(self, features: Tensor) -> Tensor:
        """Return the classes of samples.

        Args:
            features: Shape (N, ...), as wide as those fitted on.

        Returns:
            Shape (N,), int64.
        """
        return torch.from_numpy(np.asarray(self._fitted.predict(_rows(features)), dtype=np.int64))

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Return the share of right answers.

        Args:
            features: Shape (N, ...).
            labels: Shape (N,).

        Returns:
            Between 0 and 1.
        """
        return float((self.predict(features) == labels.cpu()).double().mean())


def _rows(features: Tensor) -> Any:
    return features.detach().cpu().double().flatten(1).numpy()


def _estimator(kind: Kind) -> Any:
    # Imported here: scikit-learn takes longer to import than most of what is fitted with it. The import draws numbers.
    with rng.scope():
        from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
        from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    heads: dict[Kind, Any] = {
        "ridge": RidgeClassifierCV(alphas=PENALTIES),
        "logistic": LogisticRegression(C=0.1, max_iter=1000),
        "nearest-mean": NearestCentroid(),
        "nearest-neighbours": KNeighborsClassifier(5),
    }
    return make_pipeline(StandardScaler(with_std=kind != "nearest-mean"), heads[kind])


def few_shot(
    features: Tensor, labels: Tensor, *, ways: int = 2, shots: int = 3, episodes: int = 500, seed: int = 0
) -> Tensor:
    """Return the accuracy of nearest class means in few-shot episodes.

    An episode draws `ways` classes and `shots` samples of each; every other sample of these classes is a question.

    Args:
        features: Shape (N, ...).
        labels: Classes, shape (N,).
        ways: Classes of an episode, at least 2.
        shots: Samples a class, at least 1.
        episodes: How many episodes, at least 1.
        seed: Draws them.

    Returns:
        Shape (episodes,), float64; episodes share samples, so their spread understates that over new classes.

    Raises:
        BadData: If there are too few classes, or a class has no sample left to ask about.

    Examples:
        >>> x, y = torch.eye(2).repeat(6, 1), torch.arange(2).repeat(6)
        >>> few_shot(x, y, episodes=4).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    rows = features.detach().cpu().double().flatten(1)
    places = [(labels.cpu() == c).nonzero().squeeze(1) for c in labels.unique().cpu()]
    if ways < 2 or shots < 1 or episodes < 1 or len(places) < ways or min(len(one) for one in places) <= shots:
        least = min((len(one) for one in places), default=0)
        found = f"{len(places)} classes, of which one has {least} samples"
        raise BadData(
            "there are no such episodes", expected=f"{ways} classes of more than {shots} samples", found=found
        )
    draw = torch.Generator().manual_seed(seed)
    return torch.tensor([_episode(rows, places, ways, shots, draw) for _ in range(episodes)], dtype=torch.float64)


def _episode(rows: Tensor, places: list[Tensor], ways: int, shots: int, draw: torch.Generator) -> float:
    chosen = torch.randperm(len(places), generator=draw)[:ways].tolist()
    orders = [places[c][torch.randperm(len(places[c]), generator=draw)] for c in chosen]
    means = torch.stack([rows[order[:shots]].mean(0) for order in orders])
    right = [
        float((torch.cdist(rows[order[shots:]], means).argmin(1) == way).double().mean())
        for way, order in enumerate(orders)
    ]
    return sum(right) / ways
