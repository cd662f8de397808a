import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from nervure.core.sparse_maps import joint_clusters, lasso


def standard(x):
    return (x - x.mean(0)) / x.std(0, correction=0)


@pytest.mark.parametrize("penalty", [0.01, 0.1, 0.5])
def test_sparse_maps_are_those_of_lasso_for_every_target(penalty):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=draw, dtype=torch.float64)
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]  # nearly the same unit twice
    y = x @ torch.randn(12, 5, generator=draw, dtype=torch.float64) + torch.randn(300, 5, generator=draw)
    x, y = standard(x), standard(y)
    weights, explained = lasso(x.T @ x / 300, x.T @ y / 300, penalty, tolerance=1e-10, limit=20000)
    for target in range(5):
        fitted = Lasso(alpha=penalty, tol=1e-10, max_iter=100000).fit(x.numpy(), y[:, target].numpy())
        np.testing.assert_allclose(weights[:, target].numpy(), fitted.coef_, atol=1e-5)
        assert explained[target].item() == pytest.approx(fitted.score(x.numpy(), y[:, target].numpy()), abs=1e-5)


def test_a_large_penalty_leaves_nothing_and_no_units_are_no_error():
    weights, explained = lasso(torch.eye(3).double(), torch.full((3, 2), 0.4).double(), 0.5)
    assert not weights.any()
    assert not explained.any()
    assert lasso(torch.empty(0, 0).double(), torch.empty(0, 2).double(), 0.1)[1].tolist() == [0, 0]


def test_planted_clusters_are_found_and_counted_by_the_spectrum():
    member = torch.tensor([0, 1, 2] * 6)
    graph = torch.where(member[:, None] == member, 0.8, 0.02).double()
    labels, spectrum = joint_clusters(graph, 3, seed=0)
    for one in range(3):
        assert len(labels[member == one].unique()) == 1
    assert len(labels.unique()) == 3
    assert int((spectrum < 0.5).sum()) == 3
    # The normalised Laplacian written out.
    graph = graph.clone().fill_diagonal_(0)
    expected = np.linalg.eigvalsh(np.eye(18) - graph.numpy() / np.sqrt(np.outer(graph.sum(1), graph.sum(1))))
    np.testing.assert_allclose(spectrum.numpy(), expected, atol=1e-12)
    loose, _ = joint_clusters(torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)), 2, seed=0)
    assert loose[0] != loose[-1]


def test_two_nodes_are_one_cluster():
    assert joint_clusters(torch.ones(2, 2), 8, seed=0)[0].tolist() == [0, 0]
