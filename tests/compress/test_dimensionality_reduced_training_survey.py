import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import BadBudget, Unsupported
from nervure.compress import Compressor, RandomSubspace
from nervure.core import forward, masks, modules
from nervure.spec import Budget
from nervure.testing import toy_task


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).double()


@pytest.mark.parametrize("carrier", ["zero", "init"])
def test_a_masked_network_trains_as_theta0_plus_s_c(carrier):
    model, task = net(), toy_task()
    x, y = task.inputs.double(), task.targets
    task.inputs = x
    result = Compressor(selector="sensitivity", carrier=carrier).fit(model, task, Budget(target=0.2, steps=0), seed=0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = [(name, int(i)) for name, mask in result.masks.items() for i in mask.reshape(-1).nonzero()]
    c = torch.zeros(len(chosen), dtype=torch.float64, requires_grad=True)
    free = {name: start[name].clone().requires_grad_() for name in start if name not in result.masks}

    def theta():
        values = dict(free)
        for name, mask in result.masks.items():
            base = start[name] if carrier == "init" else start[name] * mask
            flat = base.reshape(-1).clone()
            places = [k for k, (owner, _) in enumerate(chosen) if owner == name]
            spots = torch.tensor([chosen[k][1] for k in places])
            values[name] = flat.index_add(0, spots, c[places]).reshape(mask.shape)
        return values

    mine = torch.optim.SGD(result.model.parameters(), lr=0.3)
    other = torch.optim.SGD([c, *free.values()], lr=0.3)
    for _ in range(20):
        mine.zero_grad()
        F.cross_entropy(result.model(x), y).backward()
        mine.step()
        other.zero_grad()
        F.cross_entropy(functional_call(model, theta(), (x,)), y).backward()
        other.step()
    for name, value in theta().items():
        assert torch.allclose(result.model.get_parameter(name), value, atol=1e-12)


def test_the_random_subspace_is_the_dense_product():
    model = net()
    wrapped = RandomSubspace(model, dimension=5, seed=3)
    with torch.no_grad():
        wrapped.c.copy_(torch.randn(5))
    wrapped.double()
    p = torch.cat([getattr(wrapped, f"block{i}") for i in range(4)])
    theta0 = torch.cat([parameter.reshape(-1) for parameter in model.parameters()])
    flat = torch.cat([value.reshape(-1) for value in wrapped.weights().values()])
    assert torch.allclose(flat, theta0 + p @ wrapped.c, atol=1e-12)
    x = torch.randn(6, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(wrapped(x).square().sum(), wrapped.c)
    values = {name: v.detach().requires_grad_() for name, v in wrapped.weights().items()}
    pieces = torch.autograd.grad(functional_call(model, values, (x,)).square().sum(), list(values.values()))
    assert torch.allclose(gradient, p.T @ torch.cat([piece.reshape(-1) for piece in pieces]), atol=1e-10)
    assert float(p.square().sum(0).mean()) == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("name", zoo.names())
def test_the_random_subspace_runs_on_the_zoo(name):
    entry = zoo.case(name)
    model, batch = entry.model().eval(), entry.batch(4)
    wrapped = RandomSubspace(model, dimension=3, seed=0).eval()
    assert torch.allclose(forward.outputs(wrapped, batch[0]), forward.outputs(model, batch[0]), atol=1e-6)
    (gradient,) = torch.autograd.grad(entry.loss(wrapped, batch), wrapped.c)
    assert gradient.abs().sum() > 0


def test_subspaces_that_cannot_be_are_refused():
    with pytest.raises(BadBudget, match="1 to"):
        RandomSubspace(net(), dimension=10_000, seed=0)
    with pytest.raises(Unsupported, match="no trainable parameter"):
        RandomSubspace(nn.ReLU(), dimension=1, seed=0)


@pytest.mark.parametrize("selector", ["magnitude", "random", "sensitivity", "iterative-magnitude"])
@pytest.mark.parametrize("carrier", ["zero", "init"])
def test_every_member_keeps_its_budget(selector, carrier):
    result = Compressor(selector=selector, carrier=carrier).fit(
        net().float(), toy_task(), Budget(target=0.3, steps=24), seed=1
    )
    total = sum(weight.numel() for weight in modules.weights(result.model).values())
    assert sum(int(mask.sum()) for mask in result.masks.values()) == round(0.3 * total)
    assert masks.density(masks.read(result.model)) == pytest.approx(0.3, abs=1 / total)
