"""Two networks side by side: known permutations, equal and different networks, two shapes, and the command."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure._kit import UsageError
from nervure.audit import audit
from nervure.cli.main import run
from nervure.core.permutation import PermutationGraph, permuted
from nervure.learn.loop import cross_entropy


def _data(n, seed):
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))
    y = torch.randint(4, (n,), generator=draw)
    return centres[y] + 0.6 * torch.randn(n, 12, generator=draw), y


TRAIN, TEST = _data(500, 0), _data(300, 1)


def _trained(seed, *, width=32, steps=150):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(TRAIN[0]), TRAIN[1]).backward()
            optimizer.step()
    return net


@pytest.fixture(scope="module")
def trained():
    return _trained(0)


def against(net, other, **options):
    found = audit(
        net, loss=cross_entropy, train=TRAIN, test=TEST, only=("accuracy",), other=("o.py:o", other), **options
    )
    return {one.check: one for one in found.findings}


def test_a_copy_with_its_units_in_another_order_is_the_same_network(trained):
    graph = PermutationGraph.of(trained, TRAIN[0][:4])
    other = permuted(trained, graph, graph.random(seed=3))
    found = against(trained, other)
    assert found["answers"].values["same"] == 1
    assert found["answers"].values["p"] == 1
    assert found["barrier"].level == "ok"
    assert found["barrier"].values["after"] == pytest.approx(0, abs=1e-6)
    assert found["barrier"].values["before"] > 0.05
    assert "once their units are matched" in found["barrier"].meaning
    assert min(found["similarity"].layers.values()) > 0.999


def test_itself_has_no_barrier_and_an_untrained_network_is_worse(trained):
    found = against(trained, copy.deepcopy(trained))
    assert found["barrier"].values["before"] == 0
    found = against(trained, _trained(1, steps=0))
    assert found["answers"].values["only_first"] > found["answers"].values["only_other"]
    assert "the first is more accurate" in found["answers"].meaning
    assert found["similarity"].layers["0"] < 0.999


def test_two_shapes_have_layers_and_no_line(trained):
    found = against(trained, _trained(2, width=16))
    assert found["barrier"].level == "cannot tell"
    assert "two shapes" in found["barrier"].measured
    assert len(found["similarity"].layers) == 3


def test_without_data_networks_are_not_compared(trained):
    with pytest.raises(UsageError, match="compared on data"):
        audit(trained, loss=cross_entropy, other=("x", trained))


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(),"
        " torch.nn.Linear(16, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    call = ["audit", "net.py:net", "--against", "net.py:net", "--budget", "20"]
    assert run([*call, "--data", "digits", "--only", "weights"]) == 0
    told = capsys.readouterr().out
    assert "McNemar" in told
    assert "--against net.py:net" in (tmp_path / told.strip().splitlines()[-1]).read_text()
    assert run(call) == 2
    assert "--data" in capsys.readouterr().err
