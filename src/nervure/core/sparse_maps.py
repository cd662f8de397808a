"""Relations of many units to many, from their correlations alone: sparse linear maps and clusters."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from nervure.core import rng


def lasso(
    among: Tensor, cross: Tensor, penalty: float, *, tolerance: float = 1e-7, limit: int = 1000
) -> tuple[Tensor, Tensor]:
    """Predict every target from few sources: minimise |y - w'x|^2 / 2 + penalty |w|_1 per sample, for all at once.

    Accelerated proximal gradient with restarts (Beck and Teboulle, 2009) on correlations, so that its cost does not
    depend on the number of samples.

    Args:
        among: Correlations of the sources, shape (P, P).
        cross: Correlations of the sources with the targets, shape (P, Q).
        penalty: Above 0.
        tolerance: Largest change of a weight in a step that ends the search.
        limit: Most steps, at least 1.

    Returns:
        The weights, shape (P, Q), and the share of each target's variance the prediction explains, shape (Q,).

    Examples:
        >>> weights, explained = lasso(torch.eye(2), torch.tensor([[0.75], [0.1]]), 0.25)
        >>> weights.squeeze().tolist()
        [0.5, 0.0]
    """
    weights = torch.zeros_like(cross)
    if cross.numel():
        rate = 1 / float(torch.linalg.eigvalsh(among)[-1])
        ahead, pace = weights, 1.0
        for _ in range(limit):
            moved = ahead - rate * (among @ ahead - cross)
            new = moved.sign() * (moved.abs() - rate * penalty).clamp_min(0)
            step = new - weights
            if float(step.abs().max()) < tolerance:
                weights = new
                break
            if float(((ahead - new) * step).sum()) > 0:
                pace = 1.0
            following = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
            ahead = new + (pace - 1) / following * step
            weights, pace = new, following
    explained = 2 * (weights * cross).sum(0) - (weights * (among @ weights)).sum(0)
    return weights, explained


def joint_clusters(graph: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster the nodes of a weighted graph by the leading eigenvectors of its normalised Laplacian.

    Args:
        graph: Weights between nodes, symmetric and not negative, shape (N, N).
        count: Number of clusters; at most one less than the nodes are made.
        seed: Draws the starts.

    Returns:
        The cluster of each node, and the Laplacian's eigenvalues, rising.
    """
    weights = graph.double().clone().fill_diagonal_(0)
    degree = weights.sum(1).clamp_min(1e-12).rsqrt()
    laplacian = torch.eye(len(weights), dtype=torch.float64) - degree[:, None] * weights * degree
    spectrum = torch.linalg.eigvalsh(laplacian)
    count = min(count, len(weights) - 1)
    if count < 2:
        return torch.zeros(len(weights), dtype=torch.long), spectrum
    with warnings.catch_warnings(), rng.scope():  # importing it draws random numbers
        from sklearn.cluster import SpectralClustering  # slow to import

        method = SpectralClustering(count, affinity="precomputed", random_state=seed % 2**32, n_init=4)
        warnings.filterwarnings("ignore", "Graph is not fully connected")  # loose clusters are what is looked for
        labels = method.fit_predict(graph.double().numpy())
    return torch.from_numpy(labels).long(), spectrum
