import importlib
import sys
from collections import namedtuple

import pytest
import torch
from hooks_for_tests import Decay, Early, Flip, Measured, network

from nervure._kit import MissingExtra, Unsupported, UsageError
from nervure.connect._carried import Carried

Pair = namedtuple("Pair", "x y")


def carried(*hooks):
    made = Carried(hooks, host="Host")
    made.bind(network())
    return made


@pytest.mark.parametrize("name", ["skorch", "lightning", "transformers"])
def test_a_package_that_is_missing_is_told(name, monkeypatch):
    monkeypatch.setitem(sys.modules, {"lightning": "lightning.pytorch"}.get(name, name), None)
    monkeypatch.delitem(sys.modules, f"nervure.connect.{name}", raising=False)
    with pytest.raises(MissingExtra, match=rf"pip install 'nervure\[{name}\]'"):
        importlib.import_module(f"nervure.connect.{name}")


def test_hooks_are_made_anew_for_another_model_only():
    made = []
    one = Carried(lambda model: made.append(model) or [Decay()], host="Host")
    first, second = network(), network()
    for model in (first, first, second):
        one.bind(model)
    assert made == [first, second]
    with pytest.raises(UsageError, match="may need its hooks again"):
        Carried((hook for hook in [Decay()]), host="Host")


def test_a_refusal_names_the_hook_and_the_event():
    one = carried(Decay(), Early())
    one.refuse("batch", why="no")
    with pytest.raises(Unsupported, match=r"Host does not support Early\.stop: because\. Try: that"):
        one.refuse("batch", "stop", why="because", try_="that")


def test_batches_keep_their_kind():
    x, y = torch.ones(4, 6), torch.zeros(4)
    for batch in ((x, y), [x, y], Pair(x, y)):
        found = carried(Flip()).pair(batch)
        assert type(found) is type(batch)
        assert found[0][0, 0] == -1
        assert carried(Decay()).pair(batch) is batch
    assert carried(Decay()).pair("anything") == "anything"
    with pytest.raises(Unsupported, match=r"Flip\.batch: the batch is no pair.*Tensor"):
        carried(Flip()).pair(x)


def test_a_gradient_that_a_hook_leaves_out_is_gone():
    class Some:
        def gradients(self, named):
            return {name: gradient for name, gradient in named.items() if name == "0.weight"}

    one = carried(Some())
    one.model(torch.ones(2, 6)).sum().backward()
    one.gradients()
    assert [name for name, p in one.model.named_parameters() if p.grad is not None] == ["0.weight"]


def test_states_go_round():
    one, other = (Carried(lambda model: [Decay(), Measured(model)], host="Host") for _ in range(2))
    for each in (one, other):
        each.bind(network())
    one.stepped(1, torch.tensor(2.0))
    other.load_state_dict(one.state_dict())
    assert (other.step, other.history, other.hooks[1].recorder.steps) == (1, [{"step": 1, "loss": 2.0}], [1])
