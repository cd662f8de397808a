"""Every task of the bench under every optimizer and regulariser, a few steps each."""

from __future__ import annotations

import pytest
import torch

from nervure._kit import UnknownId
from nervure.core import forward, rng
from nervure.inspect._delayed_tasks import OPTIMIZERS, REGULARISERS, TASKS, delayed


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_task_learns_under_every_optimizer(task, optimizer):
    times = delayed(task, optimizer=optimizer, steps=25)
    with rng.scope("delayed init", ("weights", 0)):
        start = times.task.build()
    inputs, targets = times.task.train
    before, after = (float(times.task.loss(forward.predict(each, inputs), targets)) for each in (start, times.model))
    if task == "streaming-parity":  # it waits on a plateau first
        assert abs(after - before) < 0.1 < 0.6 < before
        assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), times.model.parameters(), strict=True))
    else:
        assert after < before
    assert times.recorder.steps[-1] == times.horizon == 25


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_regularisers_make_the_weights_smaller(regulariser):
    plain, found = (delayed("s4", regulariser=name, steps=30).model for name in ("none", regulariser))
    sizes = [float(sum(value.detach().square().sum() for value in model.parameters())) for model in (plain, found)]
    assert sizes[1] <= sizes[0]
    assert (sizes[1] < sizes[0]) == (regulariser != "none")


def test_data_depend_on_the_seed_alone():
    one, two = (delayed("addition", optimizer=name, seed=1, steps=1).task for name in ("adamw", "sgd"))
    other = delayed("addition", seed=2, steps=1).task
    assert torch.equal(one.train[0], two.train[0])
    assert not torch.equal(one.train[0], other.train[0])
    with pytest.raises(UnknownId, match="nothing called"):
        delayed("chess", steps=1)
