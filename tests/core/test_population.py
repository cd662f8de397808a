"""Populations against each member trained alone by torch's own optimizer."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import BadData, CouldNotRun, Unsupported, UsageError
from nervure.core import forward
from nervure.core.population import SGD, Adam, AdamW, Population, order

N, STEPS = 3, 4


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stack(values):
    first = values[0]
    if isinstance(first, dict):
        return {key: torch.stack([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(torch.stack(column) for column in zip(*values, strict=True))
    return torch.stack(values)


def double(values):
    return forward.tree_map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, values)


def alone(network, make, batches, *, seed, loss):
    """Train one network the plain way."""
    network = copy.deepcopy(network).train()
    optimizer = make(network.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            optimizer.zero_grad()
            loss(network, batch).backward()
            optimizer.step()
    return network


def gap(one, two):
    """Largest difference of weights and buffers."""
    theirs = two.state_dict()
    return max(float((value.double() - theirs[key].double()).abs().max()) for key, value in one.state_dict().items())


def plain_loss(network, batch):
    return F.cross_entropy(network(batch[0]), batch[1])


def mlp(*, p=0.0):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(p), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def mlp_batches(count=STEPS, members=N, size=8):
    draw = torch.Generator().manual_seed(5)
    return [
        [
            (torch.randn(size, 6, generator=draw).double(), torch.randint(4, (size,), generator=draw))
            for _ in range(count)
        ]
        for _ in range(members)
    ]


def run(crowd, batches):
    for column in zip(*batches, strict=True):
        crowd.step(stack([batch[0] for batch in column]), torch.stack([batch[1] for batch in column]))


EXPECTED = {"lstm": "sequential", "gru": "sequential", "vit": "vmap", "tied-lm": "vmap"}


@pytest.mark.parametrize("case", zoo.cases(), ids=lambda case: case.name)
def test_every_zoo_model_trains_as_if_alone(case):
    networks = [case.model(seed=seed).double() for seed in range(N)]
    batches = [[double(case.batch(6, seed=100 * i + k)) for k in range(STEPS)] for i in range(N)]
    rates = [0.01, 0.02, 0.05]
    crowds = {
        name: Population(networks, optimizer=SGD(rates, momentum=0.9, weight_decay=1e-3), backend=name)
        for name in ("sequential", EXPECTED.get(case.name, "batched"))
    }
    for crowd in crowds.values():
        run(crowd, batches)
        for i, network in enumerate(networks):
            make = lambda w, lr=rates[i]: torch.optim.SGD(w, lr=lr, momentum=0.9, weight_decay=1e-3)  # noqa: E731
            expected = alone(network, make, batches[i], seed=i, loss=case.loss)
            assert gap(network, expected) > 1e-4  # training moved the weights
            assert gap(crowd.member(i), expected) < 1e-8
            assert type(crowd.member(i)) is type(network)
            inputs = batches[i][0][0]
            want = forward.predict(expected, inputs)
            assert torch.allclose(crowd.predict(inputs)[i], want, atol=1e-7)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_auto_falls_back_with_a_reason(name):
    case = zoo.case(name)
    crowd = Population([case.model(seed=seed) for seed in range(2)], optimizer=SGD(0.1))
    batches = [case.batch(4, seed=seed) for seed in range(2)]
    crowd.step(stack([b[0] for b in batches]), torch.stack([b[1] for b in batches]))
    assert crowd.backend.name in ("vmap", "sequential")
    if EXPECTED[name] == "sequential":
        assert "Batching rule not implemented" in crowd.backend.why


OPTIMIZERS = {
    "sgd": (lambda **k: SGD(**k), lambda w, **k: torch.optim.SGD(w, **k), {}),
    "momentum": (
        lambda **k: SGD(momentum=[0.9, 0.5, 0.0], **k),
        lambda w, **k: torch.optim.SGD(w, **k),
        {"momentum": [0.9, 0.5, 0.0]},
    ),
    "nesterov": (
        lambda **k: SGD(momentum=[0.9, 0.5, 0.1], nesterov=True, **k),
        lambda w, **k: torch.optim.SGD(w, nesterov=True, **k),
        {"momentum": [0.9, 0.5, 0.1]},
    ),
    "adam": (lambda **k: Adam(**k), lambda w, **k: torch.optim.Adam(w, **k), {}),
    "adam-betas": (
        lambda **k: Adam(beta1=0.7, beta2=0.9, eps=1e-4, **k),
        lambda w, **k: torch.optim.Adam(w, betas=(0.7, 0.9), eps=1e-4, **k),
        {},
    ),
    "adamw": (lambda **k: AdamW(**k), lambda w, **k: torch.optim.AdamW(w, **k), {}),
}  # fmt: skip


@pytest.mark.parametrize("fused_from", [0, 10**9], ids=["rows", "stacked"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["batched", "vmap", "sequential"])
def test_optimizers_equal_torch(name, backend, fused_from, monkeypatch):
    monkeypatch.setattr("nervure.core.population.optim._FUSED_FROM", fused_from)
    make, theirs, columns = OPTIMIZERS[name]
    own = {"lr": [0.1, 0.01, 0.003], "weight_decay": [0.0, 0.1, 0.3]}
    torch.manual_seed(0)
    networks = [mlp().double() for _ in range(N)]
    networks[0][0].bias.requires_grad_(False)
    for network in networks[1:]:
        network[0].bias.requires_grad_(False)
    batches = mlp_batches(count=6)
    crowd = Population(networks, optimizer=make(**own), backend=backend)
    run(crowd, batches)
    for i, network in enumerate(networks):
        options = {key: values[i] for key, values in {**own, **columns}.items()}
        expected = alone(
            network, lambda w, o=options: theirs(w, foreach=False, **o), batches[i], seed=i, loss=plain_loss
        )
        assert gap(crowd.member(i), expected) < 1e-10


@pytest.mark.parametrize("backend", ["batched", "sequential"])
def test_dropout_draws_the_masks_of_each_member_alone(backend):
    torch.manual_seed(1)
    seeds = [7, 7, 11]
    networks = [mlp(p=0.4).double() for _ in range(N)]
    networks[1].load_state_dict(networks[0].state_dict())
    batches = mlp_batches()
    batches[1] = batches[0]
    state = torch.get_rng_state()
    crowd = Population(networks, optimizer=SGD(0.1), seeds=seeds, backend=backend)
    run(crowd, batches)
    assert torch.equal(torch.get_rng_state(), state)
    for i, network in enumerate(networks):
        expected = alone(network, lambda w: torch.optim.SGD(w, lr=0.1), batches[i], seed=seeds[i], loss=plain_loss)
        assert gap(crowd.member(i), expected) < 1e-12
    assert gap(crowd.member(0), crowd.member(1)) == 0  # same start, seed and data
    eval_only = alone(networks[2], lambda w: torch.optim.SGD(w, lr=0.1), batches[2], seed=12, loss=plain_loss)
    assert gap(crowd.member(2), eval_only) > 1e-3  # another seed gives other masks


def test_dropout_rates_by_member_and_channel_dropout():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop, self.head = nn.Conv2d(1, 4, 3), nn.Dropout2d(0.5), nn.Linear(64, 4)

        def forward(self, x):
            return self.head(F.dropout(self.drop(self.conv(x.view(-1, 1, 6, 6))).flatten(1), 0.25, self.training))

    torch.manual_seed(2)
    networks = [Net().double() for _ in range(N)]
    draw = torch.Generator().manual_seed(0)
    batches = [
        [(torch.randn(5, 36, generator=draw).double(), torch.randint(4, (5,), generator=draw)) for _ in range(STEPS)]
        for _ in range(N)
    ]
    crowd = Population(networks, optimizer=SGD(0.1), backend="batched")
    rates = [0.0, 0.3, 0.8]
    for i, rate in enumerate(rates):
        crowd.set_dropout(i, rate)
        networks[i].drop.p = rate
    run(crowd, batches)
    for i, network in enumerate(networks):
        expected = alone(network, lambda w: torch.optim.SGD(w, lr=0.1), batches[i], seed=i, loss=plain_loss)
        assert gap(crowd.member(i), expected) < 1e-12


class Encoder(nn.Module):
    """Attention from torch, whose dropout no rule of ours runs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.layer(x.unsqueeze(1)).mean(1))


def test_a_dropout_rate_that_is_switched_on_later_is_not_missed():
    networks = [Encoder().double() for _ in range(N)]
    batches = mlp_batches()
    crowd = Population(networks, optimizer=SGD(0.1))
    run(crowd, batches)
    for i in range(N):
        crowd.set_dropout(i, 0.5)
    middle = [crowd.member(i) for i in range(N)]
    run(crowd, batches)
    assert crowd.backend.name == "sequential"
    for i, network in enumerate(middle):
        network.layer.self_attn.dropout = networks[i].layer.self_attn.dropout
        expected = alone(network, lambda w: torch.optim.SGD(w, lr=0.1), batches[i], seed=i, loss=plain_loss)
        assert gap(crowd.member(i), expected) < 1e-12
        without = alone(networks[i], lambda w: torch.optim.SGD(w, lr=0.1), batches[i] * 2, seed=i, loss=plain_loss)
        assert gap(crowd.member(i), without) > 1e-3


@pytest.mark.parametrize(
    ("constant", "value", "why"),
    [("_HEAVY_SECONDS", 0.0, "no overhead"), ("_WORTH", 1e9, "batched: only .* times as fast")],
)
def test_auto_stays_sequential_where_batching_does_not_pay(constant, value, why, monkeypatch):
    monkeypatch.setattr(f"nervure.core.population.engine.{constant}", value)
    crowd = Population([mlp().double() for _ in range(N)], optimizer=SGD(0.1))
    run(crowd, mlp_batches())
    assert crowd.backend.name == "sequential"
    assert re.search(why, crowd.backend.why)


def test_vmap_refuses_randomness_and_auto_goes_on():
    networks = [nn.Sequential(nn.Linear(6, 8), nn.AlphaDropout(0.3), nn.Linear(8, 4)).double() for _ in range(N)]
    batches = mlp_batches()
    with pytest.raises(CouldNotRun, match="randomness"):
        run(Population(networks, optimizer=SGD(0.1), backend="batched"), batches)
    crowd = Population(networks, optimizer=SGD(0.1))
    run(crowd, batches)
    assert crowd.backend.name == "sequential"
    for i, network in enumerate(networks):
        expected = alone(network, lambda w: torch.optim.SGD(w, lr=0.1), batches[i], seed=i, loss=plain_loss)
        assert gap(crowd.member(i), expected) < 1e-12


class Replaces(nn.Module):
    """A buffer that is replaced instead of changed in place, and control flow that depends on the data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.count = self.count + x.abs().mean().detach()
        return self.layer(x) * (2 if float(x.sum()) > 0 else 1)


def test_data_dependent_control_flow_and_replaced_buffers():
    networks = [Replaces().double() for _ in range(N)]
    batches = mlp_batches()
    crowd = Population(networks, optimizer=Adam(0.1))
    run(crowd, batches)
    assert crowd.backend.name == "sequential"
    for i, network in enumerate(networks):
        expected = alone(network, lambda w: torch.optim.Adam(w, lr=0.1), batches[i], seed=i, loss=plain_loss)
        assert gap(crowd.member(i), expected) < 1e-12
        assert crowd.stack.buffers["count"][i] > 1


class Counts(nn.Module):
    """A schedule kept in a plain attribute, which a trace would freeze."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * (1 if self.calls <= 2 else 3)


def test_state_in_plain_attributes_is_kept_by_member():
    networks = [Counts().double() for _ in range(N)]
    batches = mlp_batches()
    with pytest.raises(CouldNotRun, match="forward sets calls"):
        run(Population(networks, optimizer=SGD(0.1), backend="vmap"), batches)
    crowd = Population(networks, optimizer=SGD(0.1))
    run(crowd, batches)
    assert crowd.backend.name == "sequential"
    assert crowd.member(0).calls == STEPS
    for i, network in enumerate(networks):
        expected = alone(network, lambda w: torch.optim.SGD(w, lr=0.1), batches[i], seed=i, loss=plain_loss)
        assert gap(crowd.member(i), expected) < 1e-12


class Gain(nn.Module):
    """A plain attribute that no parameter shows."""

    def __init__(self, gain):
        super().__init__()
        self.layer, self.gain = nn.Linear(6, 4), gain

    def forward(self, x):
        return self.gain * self.layer(x)


def test_members_that_differ_in_a_plain_attribute_are_never_batched_wrongly():
    networks = [Gain(gain).double() for gain in (1, 2, 3)]
    batches = mlp_batches()
    with pytest.raises(CouldNotRun, match="differs from sequential"):
        run(Population(networks, optimizer=SGD(0.1), backend="batched"), batches)
    crowd = Population(networks, optimizer=SGD(0.1))
    run(crowd, batches)
    for i, network in enumerate(networks):
        expected = alone(network, lambda w: torch.optim.SGD(w, lr=0.1), batches[i], seed=i, loss=plain_loss)
        assert gap(crowd.member(i), expected) < 1e-12


def test_hooks_are_called():
    networks, calls = [mlp().double() for _ in range(N)], []
    for network in networks:
        network[0].register_forward_hook(lambda *_: calls.append(1))
    crowd = Population(networks, optimizer=SGD(0.1))
    run(crowd, mlp_batches(count=1))
    assert crowd.backend.name == "sequential"
    assert len(calls) >= N


@pytest.mark.parametrize("case", ["mlp", "lenet", "residual-conv"])
def test_a_member_that_diverges_disturbs_nobody(case):
    case = zoo.case(case)
    networks = [case.model(seed=seed) for seed in range(N)]
    batches = [[case.batch(6, seed=10 * i + k) for k in range(6)] for i in range(N)]
    crowds = [Population(networks, optimizer=SGD([0.1, rate, 0.1]), backend="batched") for rate in (1e30, 0.1)]
    for crowd in crowds:
        run(crowd, batches)
    assert any(not value[1].isfinite().all() for value in crowds[0].stack.parameters.values())
    for i in (0, 2):
        assert gap(crowds[0].member(i), crowds[1].member(i)) == 0


@pytest.mark.parametrize("backend", ["batched", "sequential"])
def test_state_dict_resumes_exactly(backend):
    torch.manual_seed(3)
    networks = [mlp(p=0.3) for _ in range(N)]
    x, y = torch.randn(50, 6), torch.randint(4, (50,))
    make = lambda: Population(networks, optimizer=AdamW([0.1, 0.01, 0.02]), backend=backend)  # noqa: E731
    straight, first, second = make(), make(), make()
    losses = straight.fit(x, y, steps=9, batch_size=16)
    early = first.fit(x, y, steps=4, batch_size=16)
    state = first.state_dict()
    first.fit(x, y, steps=1, batch_size=16)  # the state is a copy
    second.load_state_dict(state)
    late = second.fit(x, y, steps=5, batch_size=16)
    assert torch.equal(torch.cat([early, late]), losses)
    assert all(gap(straight.member(i), second.member(i)) == 0 for i in range(N))


def test_fit_gives_each_member_its_own_order():
    torch.manual_seed(4)
    networks, seeds = [mlp().double() for _ in range(N)], [3, 4, 4]
    x, y = torch.randn(20, 6).double(), torch.randint(4, (20,))
    crowd = Population(networks, optimizer=SGD(0.2), seeds=seeds)
    crowd.fit(x, y, steps=5, batch_size=8)
    for i, network in enumerate(networks):
        index = torch.cat([order(seeds[i], epoch, 20)[:16] for epoch in range(3)]).view(-1, 8)[:5]
        batches = [(x[row], y[row]) for row in index]
        expected = alone(network, lambda w: torch.optim.SGD(w, lr=0.2), batches, seed=0, loss=plain_loss)
        assert gap(crowd.member(i), expected) < 1e-12


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_copy_member_takes_the_optimizer_state_along(optimizer):
    torch.manual_seed(5)
    networks = [
        nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4)).double() for _ in range(N)
    ]
    options = {"momentum": 0.9} if optimizer is SGD else {}
    batches = mlp_batches(count=6)
    crowd = Population(networks, optimizer=optimizer([0.1, 0.05, 0.02], **options), backend="batched")
    run(crowd, [column[:3] for column in batches])
    crowd.copy_member(0, 2)
    crowd.optimizer.set(2, lr=0.1)
    assert gap(crowd.member(0), crowd.member(2)) == 0
    run(crowd, [batches[0][3:], batches[1][3:], batches[0][3:]])
    assert gap(crowd.member(0), crowd.member(2)) < 1e-12
    theirs = torch.optim.SGD if optimizer is SGD else torch.optim.Adam
    expected = alone(networks[0], lambda w: theirs(w, lr=0.1, **options), batches[0], seed=0, loss=plain_loss)
    assert gap(crowd.member(2), expected) < 1e-10


def test_momentum_switched_on_starts_empty():
    network = mlp().double()
    for backend in ("batched", "sequential"):
        crowd = Population([network, network], optimizer=SGD(0.1, momentum=[0.0, 0.9]), backend=backend)
        batches = mlp_batches(count=3, members=2)
        run(crowd, batches)
        crowd.optimizer.set(0, momentum=0.5)
        run(crowd, batches)
        plain = alone(network, lambda w: torch.optim.SGD(w, lr=0.1), batches[0], seed=0, loss=plain_loss)
        expected = alone(plain, lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.5), batches[0], seed=0, loss=plain_loss)
        assert gap(crowd.member(0), expected) < 1e-12


def test_the_trial_leaves_no_trace_and_the_networks_are_left_alone():
    torch.manual_seed(6)
    networks = [nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4)) for _ in range(N)]
    networks[0].eval()
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    batches = [[(x.float(), y) for x, y in column] for column in mlp_batches()]
    state = torch.get_rng_state()
    auto, fixed = (
        Population(networks, optimizer=Adam(0.1)),
        Population(networks, optimizer=Adam(0.1), backend="batched"),
    )
    run(auto, batches)
    run(fixed, batches)
    assert all(gap(auto.member(i), fixed.member(i)) < 1e-5 for i in range(N))
    assert int(auto.member(0)[1].num_batches_tracked) == STEPS
    assert torch.equal(torch.get_rng_state(), state)
    assert not networks[0].training
    assert networks[1].training
    for network, old in zip(networks, before, strict=True):
        assert all(torch.equal(value, old[key]) for key, value in network.state_dict().items())
        assert all(value.grad is None for value in network.parameters())


def test_an_exception_gives_the_generators_back():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            raise RuntimeError(f"broken {float(torch.rand(()))}")

    crowd = Population([Breaks(), Breaks()], optimizer=SGD(0.1))
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        crowd.step(torch.randn(2, 3, 6, generator=torch.Generator()), torch.zeros(2, 3, dtype=torch.long))
    assert torch.equal(torch.get_rng_state(), state)


def test_own_loss_shared_batch_and_scores():
    torch.manual_seed(7)
    networks = [nn.Linear(6, 2).double() for _ in range(N)]
    x, y = torch.randn(12, 6).double(), torch.randn(12, 2).double()
    crowd = Population(networks, optimizer=SGD(0.1), loss=F.mse_loss, backend="batched")
    losses = crowd.step(x, y, shared=True)
    for i, network in enumerate(networks):
        assert losses[i].item() == pytest.approx(F.mse_loss(network(x), y).item(), abs=1e-12)
        make = lambda w: torch.optim.SGD(w, lr=0.1)  # noqa: E731
        expected = alone(network, make, [(x, y)], seed=0, loss=lambda net, b: F.mse_loss(net(b[0]), b[1]))
        assert gap(crowd.member(i), expected) < 1e-12
    scores = crowd.evaluate(x, y, batch=5)
    assert scores.accuracy is None
    assert scores.loss[1].item() == pytest.approx(F.mse_loss(crowd.member(1)(x), y).item(), abs=1e-12)
    labels = torch.randint(2, (12,))
    classifier = Population(networks, optimizer=SGD(0.1))
    scores = classifier.evaluate(x, labels)
    right = [(network(x).argmax(1) == labels).double().mean().item() for network in networks]
    assert scores.accuracy.tolist() == pytest.approx(right)


def test_build_depends_on_the_seeds_alone():
    state = torch.get_rng_state()
    one = Population.build(mlp, seeds=[3, 5], optimizer=SGD(0.1))
    two = Population.build(mlp, seeds=[5], optimizer=SGD(0.1))
    assert gap(one.member(1), two.member(0)) == 0
    assert gap(one.member(0), two.member(0)) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_is_refused():
    networks = [mlp(), mlp()]
    with pytest.raises(UsageError, match="one seed for each"):
        Population(networks, optimizer=SGD(0.1), seeds=[1])
    with pytest.raises(UsageError, match="wrong length"):
        Population(networks, optimizer=SGD([0.1, 0.2, 0.3]))
    with pytest.raises(UsageError, match="backend"):
        Population(networks, optimizer=SGD(0.1), backend="fast")
    with pytest.raises(Unsupported, match=r"member 1 differs from member 0 in 0\.weight"):
        Population([nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(5, 4))], optimizer=SGD(0.1))
    with pytest.raises(Unsupported, match="lazy"):
        Population([nn.LazyLinear(4)], optimizer=SGD(0.1))
    with pytest.raises(Unsupported, match="gradient"):
        Population([mlp().requires_grad_(False)], optimizer=SGD(0.1))
    crowd = Population(networks, optimizer=SGD(0.1))
    with pytest.raises(UsageError, match="another population"):
        Population(networks, optimizer=crowd.optimizer)
    with pytest.raises(BadData, match="no axis of members"):
        crowd.step(torch.randn(8, 6), torch.zeros(8, dtype=torch.long))
    with pytest.raises(BadData, match="fill one batch"):
        crowd.fit(torch.randn(8, 6), torch.zeros(8, dtype=torch.long), steps=1, batch_size=9)
    with pytest.raises(UsageError, match="first batch"):
        _ = crowd.backend
    with pytest.raises(UsageError, match="dropout"):
        crowd.set_dropout(0, 1.0)
    with pytest.raises(UsageError, match="beta1"):
        crowd.optimizer.set(0, beta1=0.5)
    assert math.isclose(crowd.optimizer.values(1)["lr"], 0.1)
