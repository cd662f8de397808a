"""Weights of a seed: exact numbers, exact files, clear refusals."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadData, BadModel, UsageError
from nervure.core import masks, modules, rng, seeded


def net():
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 4))


def frozen(seed=5, share=0.3):
    model = seeded.draw_(net(), seed=seed)
    carriers = {name: weight.detach().clone() for name, weight in modules.weights(model).items()}
    kept = {name: torch.rand_like(weight) < share for name, weight in carriers.items()}
    masks.attach(model, kept, carriers=carriers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        model[2].running_mean.normal_()
    masks.enforce(model)
    return model


def test_the_numbers_are_integers_times_a_constant():
    """The definition written out with Python's own arithmetic in double precision, rounded once."""
    model = seeded.draw_(net(), seed=5)
    whole = torch.randint(-(2**24) + 1, 2**24, (9, 7), generator=rng.generator("seeded", 5, "0.weight")).tolist()
    step = torch.tensor(math.sqrt(6 / 7) / 2**24, dtype=torch.float32).item()
    expected = torch.tensor([[step * number for number in row] for row in whole], dtype=torch.float32)
    assert torch.equal(model[0].weight, expected)


def test_variance_and_range_are_hes():
    weight = seeded.draw_(nn.Linear(500, 400), seed=0).weight.detach()
    assert float(weight.var()) == pytest.approx(2 / 500, rel=0.02)
    assert float(weight.abs().max()) <= math.sqrt(6 / 500)


@pytest.mark.parametrize("case", zoo.cases(), ids=lambda case: case.name)
def test_a_file_gives_back_every_bit(case, tmp_path):
    model = seeded.draw_(case.model(seed=0), seed=9)
    carriers = {name: weight.detach().clone() for name, weight in modules.weights(model).items()}
    draw = torch.Generator().manual_seed(0)
    masks.attach(model, {n: torch.rand(w.shape, generator=draw) < 0.1 for n, w in carriers.items()}, carriers=carriers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw))
    masks.enforce(model)
    path = seeded.save(model, tmp_path / "net.safetensors", seed=9)
    again = seeded.load(case.model(seed=1), path)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_another_process_gives_the_same_bits(tmp_path):
    model = frozen()
    path = seeded.save(model, tmp_path / "net.safetensors", seed=5)
    code = (
        "import sys, torch; from torch import nn; from nervure.core import seeded;"
        "net = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 4)).eval();"
        "seeded.load(net, sys.argv[1]); print(net(torch.ones(2, 7)).detach().numpy().tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == model.eval()(torch.ones(2, 7)).detach().numpy().tobytes().hex()


def test_the_file_is_small(tmp_path):
    model = seeded.draw_(nn.Linear(400, 400), seed=1)
    kept = torch.zeros(400, 400, dtype=torch.bool)
    kept[:4] = True
    masks.attach(model, {"weight": kept}, carriers={"weight": model.weight.detach().clone()})
    size = seeded.save(model, tmp_path / "net.safetensors", seed=1).stat().st_size
    assert size < 1600 * 8 + 400 * 4 + 1000


def test_another_seed_gives_another_network(tmp_path):
    path = seeded.save(frozen(), tmp_path / "net.safetensors", seed=5)
    assert not torch.equal(seeded.load(net(), path, seed=6)[0].weight, seeded.load(net(), path)[0].weight)


def test_what_cannot_be_saved_or_loaded_says_so(tmp_path):
    model = frozen()
    with pytest.raises(UsageError, match="safetensors"):
        seeded.save(model, tmp_path / "net.pt", seed=5)
    with pytest.raises(BadModel, match="not that of seed 6"):
        seeded.save(model, tmp_path / "net.safetensors", seed=6)
    with pytest.raises(BadModel, match="no masks"):
        seeded.save(net(), tmp_path / "net.safetensors", seed=5)
    with pytest.raises(UsageError, match="32-bit"):
        seeded.draw_(net(), seed=2**32)
    path = seeded.save(model, tmp_path / "net.safetensors", seed=5)
    with pytest.raises(BadModel, match="does not fit"):
        seeded.load(nn.Sequential(nn.Linear(3, 2)), path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(BadData, match="cannot be read"):
        seeded.load(net(), path)
