import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure._kit import BadBudget, BadData, Diverged
from nervure.learn import Loop


def parts(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return Loop(model, optimizer, (x, y), batch_size=16, schedule=schedule, seed=5, **options)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_the_loop_is_the_hand_written_loop():
    loop = parts()
    loop.model[2].p = 0.0
    twin = copy.deepcopy(loop.model)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for step in range(7):
        x, y = loop.batch(step)
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
        schedule.step()
    loop._order = (-1, torch.empty(0))
    loop.run(7)
    assert torch.equal(flat(loop.model), flat(twin))


def test_resume_is_exact_with_dropout_and_schedule():
    whole = parts().run(20)
    first = parts().run(9)
    state = copy.deepcopy(first.state_dict())
    again = parts(seed=99)
    again.load_state_dict(state)
    again.run(11)
    assert again.step == 20
    assert torch.equal(flat(whole.model), flat(again.model))


def test_global_random_state_and_modes_are_left_alone():
    before = torch.get_rng_state()
    loop = parts()
    torch.set_rng_state(before)
    loop.model.eval()
    loop.run(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loop.model.training


@pytest.mark.parametrize("accumulate", [2, 3, 16])
def test_accumulation_equals_one_large_batch(accumulate):
    one, many = parts(), parts(accumulate=accumulate)
    for loop in (one, many):
        loop.model.double()
        loop.inputs = loop.inputs.double()
        loop.model[2].p = 0.0
        loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)
        loop.schedule = None
        loop.run(5)
    assert torch.allclose(flat(one.model), flat(many.model), atol=1e-12)


def test_every_epoch_sees_every_sample_once_in_a_new_order():
    loop = parts()
    loop.batch_size = 10
    seen = [torch.cat([loop.batch(step)[0] for step in range(4 * e, 4 * e + 4)]) for e in range(2)]
    assert all(torch.equal(one.sort(0).values, loop.inputs.sort(0).values) for one in seen)
    assert not torch.equal(seen[0], seen[1])


def test_the_six_hooks():
    class All:
        stepped = 0

        def batch(self, x, y):
            return x * 0, y

        def loss(self, loss, model):
            return loss + 0 * model[0].weight.sum()

        def gradients(self, named):
            return {name: gradient * 0 for name, gradient in named.items()}

        def after_step(self, step):
            self.stepped = step

        def metrics(self, step, loss):
            return {"loss": loss}

        def stop(self, step, loss):
            return step == 4

    hook = All()
    loop = parts(hooks=[hook])
    before = flat(loop.model)
    loop.run(10)
    assert loop.step == hook.stepped == 4
    assert torch.equal(flat(loop.model), before)
    assert [entry["step"] for entry in loop.history] == [1, 2, 3, 4]


def test_clipping_bounds_the_gradient():
    norms = []

    class Watch:
        def after_step(self, step):
            norms.append(float(torch.cat([p.grad.reshape(-1) for p in loop.model.parameters()]).norm()))

    loop = parts(clip=0.01, hooks=[Watch()])
    loop.run(3)
    assert all(norm <= 0.0101 for norm in norms)


def test_bf16_trains_and_keeps_float32_weights():
    loop = parts(precision="bf16").run(30)
    assert next(loop.model.parameters()).dtype == torch.float32
    x, y = loop.inputs, loop.targets
    loop.model.eval()
    assert F.cross_entropy(loop.model(x), y) < 1.1


def test_a_nan_loss_stops_with_the_last_finite_weights():
    loop = parts()
    loop.inputs[7] = float("nan")
    with pytest.raises(Diverged, match=r"loss became nan at step \d+.*learning rate") as caught:
        loop.run(50)
    assert torch.isfinite(flat(loop.model)).all()
    assert caught.value.step == loop.step
    assert all(p.grad is None for p in loop.model.parameters())


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_model_trains(name):
    entry = zoo.case(name)
    model, (x, y) = entry.model(), entry.batch(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = float(entry.loss(model, (x, y)).detach())
    Loop(model, optimizer, (x, y), batch_size=8).run(25)
    assert float(entry.loss(model, (x, y)).detach()) < before


def test_bad_sizes_are_refused():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(BadData, match="differ in length"):
        Loop(model, optimizer, (torch.ones(3, 2), torch.ones(2)))
    with pytest.raises(BadBudget, match="must be positive"):
        Loop(model, optimizer, (torch.ones(3, 2), torch.ones(3)), batch_size=0)
