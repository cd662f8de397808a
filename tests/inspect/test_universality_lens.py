"""Mixtures against enumeration and closed forms, masses against known ones, Langevin dynamics on a Gaussian."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.special import betaln
from torch import nn

from nervure._kit import BadData, UsageError
from nervure.inspect._mixture_trial import langevin
from nervure.inspect.universality_lens import mass_bound, mixture_regret, prior_mass


def test_the_mixture_over_a_finite_class_is_that_of_enumeration():
    k = 4
    rules = torch.tensor(list(itertools.product((0.2, 0.8), repeat=k)))  # 2^k tables of probabilities
    labels = torch.tensor([1.0, 0, 1, 1])
    losses = -(labels * rules.log() + (1 - labels) * (1 - rules).log()).sum(1)
    truth = losses[5]
    direct = -math.log(sum(math.exp(-float(loss)) for loss in losses) / 2**k) - float(truth)
    assert float(mixture_regret(losses, truth)) == pytest.approx(direct, rel=1e-6)
    prior = torch.linspace(-3, 0, 2**k)
    prior = prior - prior.logsumexp(0)
    weighted = -math.log(sum(math.exp(float(w - loss)) for w, loss in zip(prior, losses, strict=True))) - float(truth)
    assert float(mixture_regret(losses, truth, prior)) == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize(("ones", "n"), [(3, 10), (40, 100)])
def test_a_fine_beta_prior_gives_the_krichevsky_trofimov_code(ones, n):
    p = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = -0.5 * (p.log() + (1 - p).log())
    prior = density - density.logsumexp(0)
    losses = -(ones * p.log() + (n - ones) * (1 - p).log())
    code = float(mixture_regret(losses, torch.tensor(0.0, dtype=torch.float64), prior))
    closed = -(betaln(ones + 0.5, n - ones + 0.5) - betaln(0.5, 0.5))
    assert code == pytest.approx(closed, rel=1e-3)


def test_the_bound_is_the_least_over_all_eps_and_infinite_without_mass():
    divergences = torch.tensor([0.5, 0.01, 0.2, 0.01])
    by_hand = min(
        50 * eps - math.log(sum(d <= eps + 1e-12 for d in divergences.tolist()) / 4) for eps in divergences.tolist()
    )
    assert mass_bound(divergences, 50)[0] == pytest.approx(by_hand)
    assert mass_bound(torch.full((5,), math.inf), 10)[0] == math.inf
    prior = torch.tensor([-math.inf, 0.0])
    assert mass_bound(torch.tensor([0.0, 0.3]), 10, prior) == (pytest.approx(3.0), pytest.approx(0.3))


def test_the_mixture_never_loses_more_than_the_bound_by_exact_divergences():
    """Averaged over all label strings, for every truth of a small class."""
    rules = torch.tensor([[0.1, 0.5], [0.3, 0.6], [0.9, 0.4]], dtype=torch.float64)
    strings = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=torch.float64)
    for truth in rules:
        chance = (strings * truth + (1 - strings) * (1 - truth)).prod(1)
        losses = -(strings[None] * rules.log()[:, None] + (1 - strings[None]) * (1 - rules).log()[:, None]).sum(2)
        own = -chance.log()
        regret = float((chance * mixture_regret(losses, own)).sum())
        apart = (truth * (truth / rules).log() + (1 - truth) * ((1 - truth) / (1 - rules)).log()).mean(1)
        assert regret <= mass_bound(apart, 2)[0] + 1e-9


def test_a_network_that_does_not_feel_noise_has_all_the_mass_and_a_fragile_one_little():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=draw)
    flat, sharp = nn.Linear(5, 3), nn.Linear(5, 3)
    flat.weight.data = torch.zeros(3, 5)
    flat.bias.data = torch.zeros(3)
    sharp.weight.data = 200 * torch.randn(3, 5, generator=draw)
    easy, hard = (prior_mass(net, (x, torch.zeros(60)), scale=0.1) for net in (flat, sharp))
    assert easy.bound == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-9))
    assert easy.verdict == "ok"
    assert hard.bound[0] > 1
    assert float(hard.divergences[0]) >= 0
    by_scale = [float(prior_mass(sharp, (x, None), scale=scale).divergences.median()) for scale in (0.01, 0.1)]
    assert by_scale[0] < by_scale[1]


def test_bad_input_is_refused():
    net, x = nn.Linear(2, 2), torch.randn(4, 2)
    with pytest.raises(UsageError, match="cannot be measured"):
        prior_mass(net, (x, None), draws=3)
    with pytest.raises(UsageError, match="cannot be measured"):
        prior_mass(net, (x, None), scale=0.0)
    with pytest.raises(BadData, match="not finite"):
        prior_mass(net, (x * float("nan"), None))


def test_langevin_dynamics_samples_a_gaussian():
    """Without data the target is the standard normal prior: mean 0, covariance the identity."""

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.zeros(400, 2))

        def forward(self, x):
            if len(x) == 0:
                return torch.zeros(0, 2) + 0 * self.values.sum()
            return self.values

    model = Weights()
    empty = torch.zeros(0, 1)
    seen = []
    langevin(
        model, empty, torch.zeros(0, dtype=torch.long), torch.zeros(1, 1), steps=3000, temperature=1.0, size=0.05,
        draw=torch.Generator().manual_seed(0), tick=lambda *a: seen.append(model.values.detach().clone()),
    )  # fmt: skip
    rows = torch.cat(seen[3:])
    assert float(rows.mean(0).abs().max()) < 0.05
    covariance = rows.T.cov()
    assert float((covariance - torch.eye(2)).abs().max()) < 0.06
