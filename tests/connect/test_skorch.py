import pickle

import pytest
import torch
from hooks_for_tests import KINDS, SIZE, STEPS, Decay, Early, Flip, Measured, in_order, loop, network, same
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNet, NeuralNetClassifier
from skorch.callbacks import Callback, GradientNormClipping
from torch import nn

from nervure._kit import Unsupported, UsageError
from nervure.connect import SkorchHooks


def fitted(hooks, kind=NeuralNet, callbacks=(), epochs=1, steps=STEPS, **options):
    net = kind(
        network,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.05,
        batch_size=SIZE,
        max_epochs=epochs,
        train_split=None,
        verbose=0,
        callbacks=[SkorchHooks(hooks, **options), *callbacks],
    )
    return net.fit(*in_order(steps))


def ours(net):
    return next(each for _, each in net.callbacks_ if isinstance(each, SkorchHooks))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_hook_gives_the_same_parameters(kind):
    expected = loop(KINDS[kind]).run(STEPS)
    net = fitted(KINDS[kind])
    assert same(net.module_, expected.model, 0)
    assert not same(net.module_, loop([]).run(STEPS).model, 1e-3)
    assert ours(net).carried_.step == expected.step
    assert ours(net).history == expected.history
    assert not net.module_._forward_hooks
    assert "train_step_single" not in net.__dict__
    assert "get_loss" not in net.__dict__


def test_gradients_come_before_clipping_and_a_stop_is_asked_every_step():
    early = Early()
    expected = loop([*KINDS["gradients"](None), early], clip=0.1).run(STEPS)
    net = fitted(lambda model: [*KINDS["gradients"](model), Early()], callbacks=[GradientNormClipping(0.1)])
    assert same(net.module_, expected.model, 0)
    assert len(early.losses) == early.last == len(net.history[-1]["batches"])


class Half(NeuralNet):
    """bfloat16 under autocast."""

    def infer(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return super().infer(*args, **kwargs)

    def get_loss(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return super().get_loss(*args, **kwargs)


def test_bf16():
    expected = loop(KINDS["all"], precision="bf16").run(STEPS)
    net = fitted(KINDS["all"], Half)
    assert same(net.module_, expected.model)
    assert not same(net.module_, loop(KINDS["all"]).run(STEPS).model, 1e-4)


class Own(NeuralNet):
    """Accumulates, or whatever it likes."""

    def train_step(self, batch, **fit_params):
        return super().train_step(batch, **fit_params)


def test_what_cannot_be_carried_is_refused_by_name():
    with pytest.raises(Unsupported, match=r"Decay\.loss: the net takes its steps in a way of its own"):
        fitted([Decay()], Own)
    with pytest.raises(UsageError, match="no hook.*found Linear"):
        fitted([nn.Linear(1, 1)])
    lbfgs = NeuralNet(network, nn.CrossEntropyLoss, optimizer=torch.optim.LBFGS, callbacks=[SkorchHooks([Flip()])])
    with pytest.raises(Unsupported, match=r"Flip\.batch: its optimizers compute"):
        lbfgs.fit(*in_order(2))


class Broken:
    def loss(self, loss, model):
        raise RuntimeError("broken hook")


class BrokenCallback(Callback):
    def on_batch_begin(self, net, **kwargs):
        raise RuntimeError("broken callback")


def test_a_failure_leaves_the_net_as_it_was():
    for hooks, more in (([Broken()], ()), ([Decay()], [BrokenCallback()])):
        net = NeuralNet(
            network, nn.CrossEntropyLoss, train_split=None, verbose=0, callbacks=[SkorchHooks(hooks), *more]
        )
        with pytest.raises(RuntimeError, match="broken"):
            net.fit(*in_order(2))
        assert not net.module_._forward_hooks
        assert "get_loss" not in net.__dict__
        net.set_params(callbacks=[SkorchHooks([Decay()])])
        net.fit(*in_order(2))
        assert "train_step_single" not in net.__dict__


def test_a_clone_has_hooks_of_its_own():
    net = fitted(KINDS["mask"])
    again = clone(net).fit(*in_order())
    assert same(net.module_, again.module_, 0)
    assert again.module_ is not net.module_
    assert (again.module_[0].weight == 0).sum() == 36


def test_a_run_is_resumed_at_its_step(tmp_path):
    x, y = in_order()
    half = 10 * SIZE
    files = {f"f_{name}": str(tmp_path / name) for name in ("params", "optimizer", "history")}

    def net(hooks, **options):
        callbacks = [SkorchHooks(hooks, **options)]
        options = {"lr": 0.05, "batch_size": SIZE, "max_epochs": 1, "train_split": None, "verbose": 0}
        return NeuralNet(
            network, nn.CrossEntropyLoss, optimizer=torch.optim.Adam, callbacks=callbacks, **options
        ).initialize()

    expected = loop(KINDS["schedule"]).run(STEPS)
    first = net(KINDS["schedule"]).partial_fit(x[:half], y[:half])
    first.save_params(**files)
    second = net(KINDS["schedule"])
    second.load_params(**files)
    second.partial_fit(x[half:], y[half:])
    assert ours(second).carried_.step == STEPS
    assert same(second.module_, expected.model, 0)
    stateful = net(lambda model: [Measured(model)])
    stateful.load_params(**files)
    with pytest.raises(Unsupported, match=r"Measured: the net is resumed at step 10.*step=10"):
        stateful.partial_fit(x[half:], y[half:])
    told = net(lambda model: [Measured(model)], step=10)
    told.load_params(**files)
    told.partial_fit(x[half:], y[half:])
    assert ours(told).history[0]["step"] == 11


def test_a_fitted_net_can_be_pickled():
    net = pickle.loads(pickle.dumps(fitted([Flip()])))
    assert ours(net).carried_.step == STEPS
    net.partial_fit(*in_order(3))
    assert ours(net).carried_.step == STEPS + 3


def test_a_grid_search_makes_hooks_for_every_net():
    x, y = in_order()
    net = NeuralNetClassifier(
        network, criterion=nn.CrossEntropyLoss, max_epochs=1, verbose=0, callbacks=[SkorchHooks(KINDS["mask"])]
    )
    search = GridSearchCV(net, {"lr": [0.1, 0.2]}, cv=2, scoring="accuracy").fit(x.numpy(), y.numpy())
    assert (search.best_estimator_.module_[0].weight == 0).sum() == 36
