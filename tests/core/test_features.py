import torch
from torch import nn

from nervure import zoo
from nervure.core.features import features, layers, samples, units


def test_units_are_columns_and_positions_are_samples():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(5, 1, 2, 2)
    seen = features(net, x, ["0", "3"])
    assert torch.equal(samples(seen["0"]), net[0](x).flatten(1))  # not what the in-place ReLU made of it
    expected = net[0](x).permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(units(seen["0"], net[0]), expected)
    assert torch.equal(units(seen["3"], net[3]), net(x.clone()))


def test_all_calls_of_a_module_and_all_layers_of_torch_attention_are_seen():
    case = zoo.case("twice-used")
    x = case.batch(4)[0]
    seen = features(case.model(), x, ["shared"])
    assert [tuple(one.shape) for one in seen["shared"]] == [(4, 24), (4, 24)]
    assert tuple(samples(seen["shared"]).shape) == (4, 48)
    case = zoo.case("encoder")
    assert "encoder.layers.1.linear2" in layers(case.model(), case.batch(4)[0])


def test_layers_come_in_the_order_they_are_called():
    assert layers(zoo.case("residual-conv").model(), torch.randn(2, 1, 8, 8))[:4] == [
        "stem", "bn", "blocks.0.conv1", "blocks.0.bn1",
    ]  # fmt: skip


def test_an_axis_as_long_as_the_batch_by_chance_is_not_one_of_samples():
    case = zoo.case("tied-lm")  # positions are looked up once for all samples, and there are eight
    assert "position" not in layers(case.model(), case.batch(8)[0])
    assert "embed" in layers(case.model(), case.batch(8)[0])
