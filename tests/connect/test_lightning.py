import logging
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from hooks_for_tests import (
    KINDS,
    SIZE,
    STEPS,
    Decay,
    Early,
    Flip,
    Gradients,
    Measured,
    adam,
    in_order,
    loop,
    network,
    same,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nervure._kit import BadData, Unsupported
from nervure.connect import LightningHooks

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    def __init__(self, as_dict=False):
        super().__init__()
        self.net, self.as_dict = network(), as_dict

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return {"loss": loss, "more": 1} if self.as_dict else loss

    def configure_optimizers(self):
        return adam(self.net)


class ByHand(Module):
    automatic_optimization = False


class Renamed(Module):
    def __init__(self):
        super().__init__()
        self.network = self.net
        del self.net


def fit(hooks, module=None, size=SIZE, steps=STEPS, ckpt=None, data=None, **options):
    module = Module() if module is None else module
    callback = LightningHooks(hooks, model="net")
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(callbacks=[callback], enable_progress_bar=False, enable_model_summary=False, **options)
    samples = TensorDataset(*in_order(steps)) if data is None else data
    trainer.fit(module, DataLoader(samples, batch_size=size), ckpt_path=ckpt, weights_only=True)
    assert "training_step" not in trainer.strategy.__dict__
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    return module, callback, trainer


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_hook_gives_the_same_parameters(kind):
    expected = loop(KINDS[kind]).run(STEPS)
    module, callback, trainer = fit(KINDS[kind])
    assert same(module.net, expected.model, 0)
    assert trainer.global_step == expected.step
    assert callback.history == expected.history


def test_gradients_come_before_clipping_and_outputs_may_be_dicts():
    expected = loop([Gradients(), Decay()], clip=0.1).run(STEPS)
    module, *_ = fit([Gradients(), Decay()], Module(as_dict=True), gradient_clip_val=0.1)
    assert same(module.net, expected.model)


def test_accumulated_steps_are_whole_steps():
    def hooks(model):
        return [hook for hook in KINDS["all"](model) if not isinstance(hook, Flip)]

    expected = loop(hooks, accumulate=2).run(STEPS)
    module, callback, trainer = fit(hooks, size=SIZE // 2, accumulate_grad_batches=2)
    assert trainer.global_step == expected.step
    assert same(module.net, expected.model)
    for found, wanted in zip(callback.history, expected.history, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(Unsupported, match=r"Flip\.batch: it is for the batch of a whole step"):
        fit([Flip()], accumulate_grad_batches=2)


def test_bf16():
    expected = loop(KINDS["all"], precision="bf16").run(STEPS)
    module, *_ = fit(KINDS["all"], precision="bf16-mixed")
    assert same(module.net, expected.model)
    assert not same(module.net, loop(KINDS["all"]).run(STEPS).model, 1e-4)


def test_what_cannot_be_carried_is_refused_by_name():
    with pytest.raises(Unsupported, match=r"Decay\.loss: the module optimizes by hand"):
        fit([Decay()], ByHand())
    with pytest.raises(Unsupported, match=r"Early\.stop: the trainer has a least number"):
        fit([Early()], min_epochs=1)
    with pytest.raises(Unsupported, match="no part named 'net'"):
        fit([Decay()], Renamed())
    x, y = in_order(2)
    with pytest.raises(Unsupported, match=r"Flip\.batch: the batch is no pair"):
        fit([Flip()], data=[{"x": x, "y": y}])


def test_trainers_of_many_processes_or_scaled_losses_are_refused():
    module = Module()
    limits = SimpleNamespace(min_epochs=None, min_steps=None)
    for world, precision, why in (
        (2, SimpleNamespace(), "several processes"),
        (1, SimpleNamespace(scaler=object()), "scaled loss.*bf16-mixed"),
    ):
        trainer = SimpleNamespace(world_size=world, precision_plugin=precision, fit_loop=limits, global_step=0)
        with pytest.raises(Unsupported, match=rf"Gradients\.gradients: .*{why}"):
            LightningHooks([Gradients()], model="net").setup(trainer, module, "fit")


def test_a_trainer_used_again_begins_anew():
    module, callback, _ = fit([Early(3)])
    assert callback._carried.step == 3
    _, callback, _ = fit(lambda model: [Measured(model)], module, steps=2)
    assert [one["step"] for one in callback.history] == [1, 2]


class Broken:
    def gradients(self, named):
        raise RuntimeError("broken hook")


def test_a_failure_leaves_the_module_as_it_was():
    module = Module()
    callback = LightningHooks([Broken()], model="net")
    trainer = pl.Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="broken hook"):
        trainer.fit(module, DataLoader(TensorDataset(*in_order(2)), batch_size=SIZE))
    assert "training_step" not in trainer.strategy.__dict__
    assert not any(part._forward_hooks or part._backward_hooks for part in module.modules())
    again, *_ = fit([Decay()], module)
    assert again is module


def test_a_run_is_resumed_with_the_states_of_the_hooks(tmp_path):
    expected = loop(KINDS["all"]).run(STEPS)
    x, y = in_order()
    half = 10 * SIZE
    *_, trainer = fit(KINDS["all"], data=TensorDataset(x[:half], y[:half]))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module, callback, trainer = fit(
        KINDS["all"], data=TensorDataset(x[half:], y[half:]), ckpt=tmp_path / "half.ckpt", max_epochs=2
    )
    assert trainer.global_step == expected.step == 18
    assert same(module.net, expected.model, 0)
    assert callback.history == expected.history
    recorder = next(hook for hook in callback._carried.hooks if type(hook).__name__ == "Measured").recorder
    assert recorder.steps == [1, 4, 7, 10, 13, 16]
    with pytest.raises(BadData, match="hooks are not those of LightningHooks"):
        fit([Decay()], ckpt=tmp_path / "half.ckpt", max_epochs=2)
    assert torch.is_grad_enabled()
