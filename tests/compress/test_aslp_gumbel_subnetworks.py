"""ASLP against torch's Gumbel-softmax, exact probabilities, plain networks and brute-force ranking."""

import copy

import pytest
import torch
from scipy import stats
from torch import nn

from nervure import zoo
from nervure._kit import NoEffect, Unsupported, UsageError
from nervure.compress import (
    aslp_,
    edge_popup_,
    expected_density,
    parameter_groups,
    scaled_masks,
    stochastic_supermask_,
    supermask,
)
from nervure.core import forward

PUTS = [aslp_, stochastic_supermask_, edge_popup_]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)
    )


def spread_(model):
    """Give the scores values on both sides of zero."""
    with torch.no_grad():
        for index, (_, mask, scores) in enumerate(supermask.on(model)):
            scores.copy_(torch.randn(scores.shape, generator=torch.Generator().manual_seed(index)))
            mask.scale.fill_(1.5 + index)
    return model


@pytest.mark.parametrize("shift", [0.0, 3.0, -7.5])
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_samples_and_gradients_are_those_of_torchs_gumbel_softmax(shift, tau, monkeypatch):
    """Of the pair (a + shift, shift) with noise (g1, g0), whose difference is logistic."""
    odds = torch.randn(40, 30, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(40, 30, dtype=torch.float64)
    outer = torch.randn(40, 30, dtype=torch.float64)
    mine = scaled_masks._Gumbel.apply(odds, uniform, tau)
    mine.backward(outer)
    # g1 - g0 = logit(u): with exponential numbers e = exp(-g), e1 = (1 - u) c and e0 = u c for any c.
    exponential = torch.stack([1 - uniform, uniform]) * 0.7
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **_: self.copy_(exponential))
    theirs = odds.detach().clone().requires_grad_()
    pair = torch.stack([theirs + shift, torch.full_like(theirs, shift)])
    kept = nn.functional.gumbel_softmax(pair, tau=tau, hard=True, dim=0)[0]
    kept.backward(outer)
    torch.testing.assert_close(mine.detach(), kept.detach())
    torch.testing.assert_close(odds.grad, theirs.grad)


@pytest.mark.parametrize("put_on_", [aslp_, stochastic_supermask_])
def test_frequencies_are_the_exact_probabilities(put_on_):
    model = put_on_(nn.Linear(5, 2), seed=4)
    odds = torch.tensor([[-3.0, -1.0, 0.0, 0.5, 2.0], [0.0, 4.0, -0.2, 1.0, -2.0]])
    ((_, mask, scores),) = supermask.on(model)
    with torch.no_grad():
        scores.copy_(odds)
        seen = torch.stack([mask.topology(scores) for _ in range(20_000)]).double()
    kept, share = seen.sum(0), odds.double().sigmoid()
    statistic = ((kept - 20_000 * share) ** 2 / (20_000 * share * (1 - share))).sum()
    assert stats.chi2.sf(float(statistic), df=10) > 1e-3
    assert abs(float((seen[1:] * seen[:-1]).mean() - (share**2).mean())) < 5e-3  # draws do not repeat


def test_the_sigmoids_gradient_is_the_probabilitys():
    odds = torch.randn(30, requires_grad=True)
    outer = torch.randn(30)
    scaled_masks._Bernoulli.apply(odds, torch.rand(30), 0.7).backward(outer)
    twin = odds.detach().clone().requires_grad_()
    (twin / 0.7).sigmoid().backward(outer)
    torch.testing.assert_close(odds.grad, twin.grad)


def test_edge_popup_keeps_the_largest_magnitudes_and_raises_those_that_help():
    model = edge_popup_(nn.Linear(20, 10), density=0.3)
    ((_, mask, scores),) = supermask.on(model)
    order = scores.detach().abs().flatten().argsort(descending=True)
    expected = torch.zeros(200)
    expected[order[:60]] = 1
    kept = mask.topology(scores)
    assert torch.equal(kept.flatten(), expected)
    outer = torch.randn(10, 20)
    kept.backward(outer)
    torch.testing.assert_close(scores.grad, outer * scores.detach().sign())


def test_frozen_is_a_plain_network_with_the_thresholded_weights():
    start = net()
    model, x = spread_(aslp_(copy.deepcopy(start))).eval(), torch.randn(7, 6)
    plain = start.eval()
    with torch.no_grad():
        for (_, mask, scores), layer in zip(supermask.on(model), (plain[1], plain[5]), strict=True):
            layer.weight.mul_(torch.where(scores >= 0, mask.scale, 0.0))
            layer.bias.zero_()
    assert torch.equal(model(x), plain(x))
    frozen = supermask.freeze_(copy.deepcopy(model).train())  # also when it is called in the middle of a training
    assert torch.equal(frozen.eval()(x), plain(x))
    assert {name for name, _ in frozen.named_parameters()} == {name for name, _ in plain.named_parameters()}
    total = sum(layer.weight.numel() for layer in (plain[1], plain[5]))
    count = sum(int(layer.weight.count_nonzero()) for layer in (plain[1], plain[5]))
    assert supermask.density(model.train()) == count / total


@pytest.mark.parametrize("put_on_", PUTS)
def test_training_moves_scores_and_scales_only_and_leaves_the_global_generator(put_on_):
    model = put_on_(net())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    x = torch.linspace(-2, 2, 48).view(8, 6)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=5.0, scale_lr=0.1), momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    ends = {name.rpartition(".")[2] for name in moved if not name.startswith("3.")}  # 3 is the batch norm
    assert ends <= {"original", "scale", "draws"}
    assert {"original", "scale"} <= ends
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"original", "scale"}


def test_without_rescaling_the_scale_stays_one():
    model = aslp_(net(), rescale=False)
    assert [len(group["params"]) for group in parameter_groups(model)] == [2]
    assert all(not mask.scale.requires_grad and float(mask.scale) == 1 for _, mask, _ in supermask.on(model))


def test_draws_follow_the_seed_the_layer_and_the_state():
    x = torch.randn(5, 6)
    one, two, other = aslp_(net(), seed=1), aslp_(net(), seed=1), aslp_(net(), seed=2)
    first, second = one(x), one(x)
    assert not torch.equal(first, second)
    assert torch.equal(two(x), first)
    assert not torch.equal(other(x), first)
    late = aslp_(net(), seed=1)
    late.load_state_dict(two.state_dict())  # goes on with the second draw, as a copy does
    assert torch.equal(late(x), second)
    assert torch.equal(copy.deepcopy(two)(x), second)
    twins = aslp_(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)))
    (_, left, a), (_, right, b) = supermask.on(twins)
    assert not torch.equal(left.topology(a), right.topology(b))
    assert torch.equal(one.eval()(x), one(x))


def test_signs_keep_the_standard_deviation():
    start = net()
    model = aslp_(copy.deepcopy(start), weights="signs").eval()
    expected = start[5].weight.sign() * start[5].weight.std()
    assert torch.equal(model[5].weight.detach(), expected.detach())


def test_the_expected_density_is_that_of_samples():
    model = spread_(aslp_(net()))
    found = expected_density(model)
    found.backward()
    odds = torch.cat([scores.detach().flatten() for _, _, scores in supermask.on(model)])
    assert float(found.detach()) == pytest.approx(float(odds.sigmoid().mean()))
    assert all(bool((scores.grad > 0).all()) for _, _, scores in supermask.on(model))


@pytest.mark.parametrize("put_on_", PUTS)
@pytest.mark.parametrize("case", zoo.cases(), ids=lambda case: case.name)
def test_the_zoo_runs_or_is_refused_with_a_reason(case, put_on_):
    model, (inputs, _) = case.model(seed=0), case.batch(4, seed=0)
    if case.name in ("encoder", "lstm", "gru", "tied-lm", "raw-parameter"):
        with pytest.raises(Unsupported, match="belongs to no linear|is tied"):
            put_on_(model)
        return
    before = forward.outputs(case.model(seed=0).eval(), inputs).shape
    put_on_(model)
    case.loss(model, case.batch(4, seed=0)).backward()
    assert all(scores.grad is not None for _, _, scores in supermask.on(model))
    assert forward.outputs(supermask.freeze_(model).eval(), inputs).shape == before


def test_bad_arguments():
    with pytest.raises(UsageError, match="temperature"):
        aslp_(net(), temperature=0)
    with pytest.raises(UsageError, match="density"):
        edge_popup_(net(), density=0)
    with pytest.raises(NoEffect, match="no mask"):
        parameter_groups(net())
    with pytest.raises(NoEffect, match="no mask"):
        expected_density(net())
