import pytest
import torch

from nervure import zoo
from nervure._kit import UnknownId, UsageError
from nervure.core import forward


@pytest.mark.parametrize("name", zoo.names())
def test_every_parameter_gets_a_finite_gradient(name):
    entry = zoo.case(name)
    model = entry.model()
    entry.loss(model, entry.batch(6)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("name", zoo.names())
def test_seeds_decide_weights_and_batches_and_nothing_else_changes(name):
    entry = zoo.case(name)
    before = torch.get_rng_state()
    one, same, other = (entry.model(seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(entry.batch(3, seed=4)[1], entry.batch(3, seed=4)[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_there_are_the_properties_that_break_naive_methods():
    tags = set().union(*(entry.tags for entry in zoo.cases()))
    wanted = {"residual", "batchnorm", "groupnorm", "grouped", "concat", "attention", "recurrent", "tied"}
    assert wanted | {"raw-parameter", "shared-module", "dict-input", "tuple-output", "graph", "in-place"} <= tags
    assert len(zoo.cases()) >= 14
    assert [entry.name for entry in zoo.cases("conv", "residual")] == ["residual-conv", "pre-activation"]


@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (13,), (5, 6)])
def test_models_are_sized_to_the_data_or_refused(name, shape):
    takes_images = (len(shape) == 3 and not zoo.case(name).tags.isdisjoint({"conv"})) or name == "vit"
    fits = {
        3: (takes_images and not (name == "lenet" and shape[1] < 12)) or name in ("mlp", "lenet-300-100"),
        2: name in ("mlp", "lenet-300-100", "lstm", "gru", "encoder"),
        1: name in ("mlp", "lenet-300-100", "raw-parameter", "twice-used"),
    }[len(shape)]
    if fits:
        model = zoo.build(name, shape=shape, classes=3)
        assert forward.predict(model, torch.randn(2, *shape)).shape == (2, 3)
    else:
        with pytest.raises(UsageError, match="cannot take samples"):
            zoo.build(name, shape=shape, classes=3)


def test_scaling_makes_models_smaller():
    for name in ("mlp", "lenet-300-100", "deep-conv", "u-net"):
        shape = (1, 28, 28)
        whole, half = (zoo.build(name, shape=shape, classes=10, scale=s) for s in (1.0, 0.5))
        assert sum(p.numel() for p in half.parameters()) < sum(p.numel() for p in whole.parameters())
    with pytest.raises(UsageError, match="cannot be scaled"):
        zoo.build("vit", shape=(1, 28, 28), classes=10, scale=0.5)


def test_unknown_names_are_suggested():
    with pytest.raises(UnknownId, match="lenet"):
        zoo.case("lennet")
