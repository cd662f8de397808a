"""A cut network in another process: built by its factory, shaped by the recipe, filled from the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import larger_models
import pytest
import torch
from torch import nn

from nervure._kit import BadModel
from nervure.core import state
from nervure.core.channels import ChannelGraph, rebuild, recipe

ELSEWHERE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, larger_models
from nervure.core import forward, state
from nervure.core.channels import rebuild
make, inputs = larger_models.MODELS[sys.argv[2]]
torch.manual_seed(5)
model = rebuild(make(), json.load(open(sys.argv[3] + "/recipe.json")))
model = state.load(sys.argv[3] + "/model.safetensors", model=model).eval()
inputs, wanted = torch.load(sys.argv[3] + "/example.pt", weights_only=True)
torch.testing.assert_close(forward.outputs(model, inputs), wanted, rtol=0, atol=1e-6)
"""


@pytest.mark.parametrize("name", ["vit-fused", "resnext", "gpt"])
def test_a_cut_network_lives_on_in_another_process(name, tmp_path):
    make, inputs = larger_models.MODELS[name]
    model = make().eval()
    graph = ChannelGraph.of(model, inputs)
    small = graph.cut(model, {group.id: range((group.size + 1) // 2) for group in graph.groups})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(model, small)))
    state.save(small, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.save((inputs, small(inputs)), tmp_path / "example.pt")
    arguments = [sys.executable, "-c", ELSEWHERE, str(Path(__file__).parent), name, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", larger_models.MODELS)
def test_a_rebuilt_shape_is_the_cut_shape(name):
    make, inputs = larger_models.MODELS[name]
    model = make().eval()
    graph = ChannelGraph.of(model, inputs)
    small = graph.cut(model, {group.id: range((group.size + 1) // 2) for group in graph.groups})
    again = rebuild(model, json.loads(json.dumps(recipe(model, small))))
    again.load_state_dict(small.state_dict())
    assert recipe(small, again) == {"shapes": {}, "attributes": {}}
    assert repr(again) == repr(small)
    assert recipe(model, model) == {"shapes": {}, "attributes": {}}


def test_a_recipe_of_another_model_is_refused():
    made = recipe(nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 1)))
    with pytest.raises(BadModel, match="0.weight"):
        rebuild(nn.Linear(2, 3), made)
