import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import NoEffect
from nervure.core import modules


@pytest.mark.parametrize("name", zoo.names())
def test_every_parameter_has_its_owners(name):
    model = zoo.case(name).model()
    table = modules.owners(model)
    assert set(table) == {key for key, _ in model.named_parameters()}
    for key, places in table.items():
        assert all(getattr(module, attribute) is model.get_parameter(key) for module, attribute in places)
    counted = sum(len(places) for places in table.values())
    everywhere = sum(p is not None for module in model.modules() for p in module._parameters.values())
    assert counted == everywhere


def test_a_tied_weight_has_two_owners_and_counts_once():
    model = zoo.case("tied-lm").model()
    assert len(modules.owners(model)["embed.weight"]) == 2
    assert "head.weight" not in modules.weights(model)
    assert modules.output_head(model) == "embed.weight"


def test_weights_are_connections_and_nothing_else():
    expected = {
        "raw-parameter": {"fc1.weight", "weight"},
        "twice-used": {"stem.weight", "shared.weight", "head.weight"},
        "lstm": {"cell.weight_ih_l0", "cell.weight_hh_l0", "head.weight"},
        "dict-tuple": {"left.weight", "right.weight", "head.weight"},
    }
    for name, found in expected.items():
        assert set(modules.weights(zoo.case(name).model())) == found
    vit = modules.weights(zoo.case("vit").model())
    assert "token" not in vit
    assert "position" not in vit
    assert "patch.weight" in vit


def test_a_single_output_still_counts_as_a_matrix():
    assert list(modules.weights(nn.Linear(5, 1))) == ["weight"]
    assert list(modules.weights(nn.Linear(1, 5))) == ["weight"]


def test_frozen_weights_are_left_out():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].weight.requires_grad_(False)
    assert list(modules.weights(net)) == ["1.weight"]


def test_swapping_a_shared_module_swaps_it_everywhere():
    shared = nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 3), shared, nn.Sequential(nn.Linear(3, 3), shared))
    names = modules.replace_modules(net, lambda name, module: nn.Tanh() if isinstance(module, nn.ReLU) else None)
    assert names == ["1"]
    assert isinstance(net[1], nn.Tanh)
    assert net[2][1] is net[1]


def test_the_optimizer_follows_a_swap():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(
        [{"params": net[0].parameters(), "lr": 0.5}, {"params": net[2].parameters(), "lr": 0.1}], momentum=0.9
    )
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    old = list(net[0].parameters())
    kept_state = optimizer.state[net[2].weight]
    modules.replace_modules(
        net, lambda name, module: nn.Linear(3, 4, bias=False) if name == "0" else None, optimizer=optimizer
    )
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(net[0].weight)]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[net[2].weight] is kept_state
    assert all(parameter not in optimizer.state for parameter in old)
    before = net[0].weight.detach().clone()
    optimizer.zero_grad()
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, before)


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(NoEffect, match="no module matched"):
        modules.replace_modules(nn.Sequential(nn.Linear(2, 2)), lambda name, module: None)
