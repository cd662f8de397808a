"""Recorders on curves with known crossings, and restricted means against Kaplan-Meier areas written out."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure import zoo
from nervure._kit import BadData, UsageError
from nervure.core.recorder import Event, Recorder, accuracy_of, losses_of, restricted_mean


def run(curve, steps, **options):
    now = [0]
    recorder = Recorder({"value": lambda: curve(now[0])}, **options)
    for now[0] in steps:
        recorder.step(now[0])
    return recorder


def test_log_spacing_grows_by_a_constant_factor():
    recorder = run(float, range(10_001), per_decade=10)
    steps = np.array(recorder.steps)
    assert steps[:4].tolist() == [0, 1, 2, 3]
    ratios = steps[20:] / steps[19:-1]
    assert ratios.min() >= 10**0.1 * (1 - 1e-9)
    assert ratios.max() <= 10**0.1 + 0.02
    assert recorder.curve("value").tolist() == recorder.steps


def test_spacing_by_a_number_of_steps_and_a_forced_last_record():
    recorder = run(float, range(10), every=4)
    assert recorder.steps == [0, 4, 8]
    assert recorder.step(9, always=True)
    assert not recorder.step(9, always=True)
    assert recorder.steps == [0, 4, 8, 9]


@pytest.mark.parametrize("crossing", [1, 37, 400])
def test_first_crossing_is_bracketed(crossing):
    recorder = run(lambda t: float(t >= crossing), range(1001))
    event = recorder.first("value", at_least=0.5)
    assert event.observed
    assert event.after < crossing <= event.time
    assert event.time <= crossing * 1.13 + 1
    assert recorder.first("value", at_most=0.5) == Event(0, observed=True)


def test_what_never_happens_is_censored_at_the_last_record():
    recorder = run(lambda t: 0.0, range(0, 101, 10), every=1)
    assert recorder.first("value", at_least=0.5) == Event(100, observed=False, after=100)
    assert recorder.first("value", at_least=-1, lasting=50) == Event(100, observed=False, after=100)


def test_a_flash_does_not_last():
    recorder = run(lambda t: float(t == 3 or t >= 6), range(10), every=1)
    assert recorder.first("value", at_least=1).time == 3
    assert recorder.first("value", at_least=1, lasting=2) == Event(6, observed=True, after=5)


def test_samples_have_their_own_times_and_their_mean_another():
    recorder = run(lambda t: torch.tensor([t, 2.0 * t]), range(11), every=1)
    assert [event.time for event in recorder.first_each("value", at_least=10)] == [10, 5]
    assert recorder.first("value", at_least=7.5).time == 5
    assert recorder.last("value") == 15


def test_measures_leave_the_random_stream_and_the_model_alone():
    case = zoo.case("vit")
    model, (x, y) = case.model(), case.batch(6)
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    recorder = Recorder({"noise": lambda: torch.rand(()), "accuracy": accuracy_of(model, x, y)})
    recorder.step(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_losses_are_those_of_samples_alone():
    case = zoo.case("residual-conv")
    model, (x, y) = case.model().double(), case.batch(5)
    found = losses_of(model, x.double(), y, F.cross_entropy)()
    with torch.no_grad():
        model.eval()
        alone = torch.stack([F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=0)


def test_a_measure_that_fails_leaves_no_half_record():
    def fails():
        raise ValueError("no")

    recorder = Recorder({"good": lambda: 1.0, "bad": fails})
    with pytest.raises(ValueError, match="no"):
        recorder.step(0)
    assert recorder.steps == []


def test_resumed_records_equal_those_of_one_run():
    first, second = run(float, range(50)), run(float, range(1))
    second.load_state_dict(first.state_dict())
    for t in range(50, 200):
        second.measures["value"] = lambda t=t: float(t)
        second.step(t)
    whole = run(float, range(200))
    assert second.steps == whole.steps
    assert torch.equal(second.curve("value"), whole.curve("value"))


def area_by_hand(events, horizon):
    """Area under the Kaplan-Meier curve in exact fractions, unit step by unit step."""
    alive, total = Fraction(1), Fraction(0)
    for t in range(int(horizon)):
        at_risk = sum(event.time >= t for event in events)
        died = sum(event.observed and event.time == t for event in events)
        if died:
            alive *= 1 - Fraction(died, at_risk)
        total += alive
    return float(total)


def test_restricted_mean_is_the_area_under_the_kaplan_meier_curve():
    source = np.random.default_rng(0)
    for _ in range(30):
        events = [
            Event(int(t), bool(seen)) for t, seen in zip(source.integers(1, 40, 8), source.random(8) < 0.7, strict=True)
        ]
        events.append(Event(40, observed=False))
        horizon = int(source.integers(5, 41))
        assert restricted_mean(events, horizon).value == pytest.approx(area_by_hand(events, horizon), abs=1e-10)


def test_restricted_mean_without_early_censoring_is_the_plain_mean_and_its_error():
    times = [3, 8, 8, 15, 20]
    events = [Event(t, observed=t < 20) for t in times]
    found = restricted_mean(events, 20)
    assert found.value == pytest.approx(np.mean(times))
    # Greenwood's formula then is the plain standard error with 1 / n.
    assert found.error == pytest.approx(np.std(times) / math.sqrt(5))
    assert found.observed == 4


def test_wrong_use_is_told():
    with pytest.raises(UsageError, match="nothing can be recorded"):
        Recorder({})
    with pytest.raises(UsageError, match="nothing can be recorded"):
        Recorder({"a": lambda: 0.0}, every=0)
    recorder = run(float, range(5))
    with pytest.raises(UsageError, match="backwards"):
        recorder.step(2)
    with pytest.raises(UsageError, match="no such event"):
        recorder.first("value")
    with pytest.raises(UsageError, match="nothing is recorded"):
        recorder.curve("other")
    with pytest.raises(UsageError, match="measures differ"):
        recorder.load_state_dict({"steps": [], "values": {"other": []}})
    with pytest.raises(BadData, match="no mean"):
        restricted_mean([Event(5, observed=False)], 10)
    with pytest.raises(BadData, match="no mean"):
        restricted_mean([], 10)
    with pytest.raises(BadData, match="differ in shape"):
        accuracy_of(nn.Linear(2, 3), torch.zeros(4, 2), torch.zeros(5))()
