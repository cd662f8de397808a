import copy
import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")

import pytest
import torch
import transformers
from hooks_for_tests import SIZE, STEPS, Decay, Early, Gradients, Heat, Mask, Measured, Norm, same
from torch.nn import functional as F
from torch.utils.data import SequentialSampler

from nervure._kit import BadData, Unsupported, UsageError
from nervure.connect import TransformersHooks
from nervure.connect._state_file import read_state, write_state
from nervure.learn import Loop

transformers.utils.logging.set_verbosity_error()
CONFIG = transformers.BertConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


class Swap:
    """Turn half of the sequences round."""

    def batch(self, inputs, targets):
        ids = inputs["input_ids"].clone()
        ids[::2] = ids[::2].flip(1)
        return {**inputs, "input_ids": ids}, targets


KINDS = {
    "mask": lambda model: [Mask(model)],
    "constraint": lambda model: [Norm(model, 0.05)],
    "gradients": lambda model: [Gradients()],
    "penalty": lambda model: [Decay()],
    "augmentation": lambda model: [Swap()],
    "stop": lambda model: [Early()],
    "schedule": lambda model: [Heat(model)],
    "all": lambda model: [Swap(), Decay(), Gradients(), Mask(model), Heat(model), Measured(model), Early(18)],
}


def network(kind=transformers.BertForSequenceClassification):
    torch.manual_seed(0)
    return kind(CONFIG)


def optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def samples():
    ids = torch.randint(30, (96, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 0] % 3


def loop(hooks, **options):
    model = network()
    found = hooks(model) if callable(hooks) else hooks
    return Loop(model, optimizer(model), samples(), batch_size=SIZE, hooks=found, seed=4, **options)


def rows(steps=STEPS):
    drawn = [loop([]).batch(step) for step in range(steps)]
    return [
        {"input_ids": inputs["input_ids"][at], "attention_mask": inputs["attention_mask"][at], "labels": labels[at]}
        for inputs, labels in drawn
        for at in range(SIZE)
    ]


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def trainer(folder, model=None, steps=STEPS, kind=InOrder, data=None, **options):
    model = network() if model is None else model
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": SIZE, "num_train_epochs": 1, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_strategy": "no", "dataloader_pin_memory": False, **options,
    }  # fmt: skip
    return kind(
        model,
        transformers.TrainingArguments(**options),
        train_dataset=rows(steps) if data is None else data,
        optimizers=(optimizer(model), None),
    )


def fit(folder, hooks, resume=None, **options):
    made = trainer(folder, **options)
    carried = TransformersHooks(hooks).attach(made)
    made.train(resume_from_checkpoint=resume)
    assert "compute_loss" not in made.__dict__
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in made.model.modules())
    return made, carried


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_hook_gives_the_same_parameters(kind, tmp_path):
    expected = loop(KINDS[kind]).run(STEPS)
    made, carried = fit(tmp_path, KINDS[kind])
    assert made.state.global_step == expected.step
    assert same(made.model, expected.model)
    assert not same(made.model, loop([]).run(STEPS).model, 1e-4)
    for found, wanted in zip(carried.history, expected.history, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)


class Own(InOrder):
    """A loss of one's own, the mean of a part."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits, labels)


def test_a_loss_of_ones_own_and_clipping(tmp_path):
    expected = loop([Gradients(), Decay()], clip=0.1).run(STEPS)
    made, _ = fit(tmp_path, [Gradients(), Decay()], kind=Own, max_grad_norm=0.1)
    assert same(made.model, expected.model)


def test_accumulated_steps_are_whole_steps(tmp_path):
    def hooks(model):
        return [Decay(), Gradients(), Mask(model), Measured(model), Early(18)]

    half = {"per_device_train_batch_size": SIZE // 2, "gradient_accumulation_steps": 2}
    expected = loop(hooks, accumulate=2).run(STEPS)
    made, carried = fit(tmp_path, hooks, kind=Own, **half)
    assert made.state.global_step == expected.step
    assert same(made.model, expected.model)
    assert [round(one["loss"], 4) for one in carried.history] == [round(one["loss"], 4) for one in expected.history]
    with pytest.raises(Unsupported, match=r"Swap\.batch: it is for the batch of a whole step"):
        fit(tmp_path, [Swap()], **half)


def test_a_penalty_is_not_counted_once_for_every_part_of_a_step(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(4)]
    half = {"per_device_train_batch_size": SIZE // 2, "gradient_accumulation_steps": 2}

    def run(hooks, **options):
        torch.manual_seed(0)
        return fit(tmp_path, hooks, model=transformers.LlamaForCausalLM(config), data=data, **options)

    with pytest.raises(Unsupported, match=r"Decay\.loss: steps are accumulated and the loss is divided"):
        run([Decay()], **half)
    plain, decayed = run([Gradients()])[0], run([Gradients(), Decay()])[0]
    assert not same(plain.model, decayed.model, 1e-4)
    # Without a penalty the parts of a step, divided by its tokens, are the step.
    (whole, kept), (parts, shares) = (run(lambda model: [Gradients(), Measured(model)], **how) for how in ({}, half))
    assert same(whole.model, parts.model)
    assert [one["loss"] for one in kept.history] == pytest.approx([one["loss"] for one in shares.history])


def test_bf16(tmp_path):
    expected = loop(KINDS["all"], precision="bf16").run(STEPS)
    made, _ = fit(tmp_path, KINDS["all"], bf16=True)
    assert same(made.model, expected.model, 1e-5)
    assert not same(made.model, loop(KINDS["all"]).run(STEPS).model, 1e-4)


def test_a_run_is_resumed_with_the_states_of_the_hooks(tmp_path):
    expected = loop(KINDS["all"]).run(STEPS)
    made, _ = fit(tmp_path, KINDS["all"], max_steps=10, save_strategy="steps", save_steps=10)
    made, carried = fit(tmp_path, KINDS["all"], resume=str(tmp_path / "checkpoint-10"))
    assert made.state.global_step == expected.step == 18
    assert same(made.model, expected.model)
    assert [one["step"] for one in carried.history] == list(range(1, 19))
    recorder = next(hook for hook in carried._carried.hooks if isinstance(hook, Measured)).recorder
    assert recorder.steps == [1, 4, 7, 10, 13, 16]
    with pytest.raises(BadData, match="hooks are not those of TransformersHooks"):
        fit(tmp_path, [Decay()], resume=str(tmp_path / "checkpoint-10"))
    (tmp_path / "checkpoint-10" / "nervure-hooks.safetensors").unlink()
    with pytest.raises(Unsupported, match="Measured: the run is resumed at step 10.*resume_from"):
        fit(tmp_path, KINDS["all"], resume=str(tmp_path / "checkpoint-10"))


def test_it_must_be_attached_and_only_once(tmp_path):
    made = trainer(tmp_path, steps=2)
    made.add_callback(TransformersHooks([Decay()]))
    with pytest.raises(UsageError, match="neither batch nor loss.*attach"):
        made.train()
    made = trainer(tmp_path, steps=2)
    carried = TransformersHooks([Decay()]).attach(made)
    with pytest.raises(UsageError, match="attached already"):
        TransformersHooks([Decay()]).attach(made)
    carried.detach()
    assert "training_step" not in made.__dict__
    before = copy.deepcopy(made.model)
    made.train()
    assert not same(made.model, before)


def test_what_cannot_be_carried_is_refused_by_name(tmp_path):
    made = trainer(tmp_path, steps=2)
    TransformersHooks([Decay()]).attach(made)
    made.accelerator.scaler = object()
    with pytest.raises(Unsupported, match=r"Decay\.loss: steps with a scaled loss.*bf16"):
        made.train()
    made = trainer(tmp_path, steps=2)
    TransformersHooks([Swap()]).attach(made)
    made.label_names = ["start", "end"]
    with pytest.raises(Unsupported, match=r"Swap\.batch: the labels are \['start', 'end'\]"):
        made.train()
    made.label_names = ["start"]
    with pytest.raises(Unsupported, match=r"Swap\.batch: the batch has no 'start'"):
        made.train()


class Broken:
    def loss(self, loss, model):
        raise RuntimeError("broken hook")


def test_a_failure_leaves_the_trainer_as_it_was(tmp_path):
    made = trainer(tmp_path, steps=2)
    carried = TransformersHooks([Broken()]).attach(made)
    with pytest.raises(RuntimeError, match="broken hook"):
        made.train()
    carried.detach()
    assert not {"compute_loss", "training_step"} & set(made.__dict__)
    assert not any(part._forward_hooks for part in made.model.modules())
    made.train()


def test_states_come_back_from_their_file(tmp_path):
    state = {"a": [1, 2.5, None, "x", True], 3: {"t": torch.arange(4), "same": torch.arange(4)[1:]}}
    write_state(state, tmp_path / "s.safetensors")
    found = read_state(tmp_path / "s.safetensors")
    assert found["a"] == state["a"]
    assert torch.equal(found[3]["t"], state[3]["t"])
    assert torch.equal(found[3]["same"], state[3]["same"])
    with pytest.raises(Unsupported, match="states hold dicts"):
        write_state({"a": object()}, tmp_path / "t.safetensors")
    (tmp_path / "u.safetensors").write_bytes(b"no such file")
    with pytest.raises(BadData, match="holds no state of hooks"):
        read_state(tmp_path / "u.safetensors")
