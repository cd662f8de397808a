"""Landscapes as a user draws them: around a network, between networks, along a run, from checkpoints."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from nervure import app, zoo
from nervure._kit import BadModel, UsageError
from nervure.cli.main import run
from nervure.core.line_curvature import mean_loss
from nervure.data import load
from nervure.learn.loop import cross_entropy

MODEL = """
import torch
def net():
    torch.manual_seed({seed})
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(),
                               torch.nn.Linear(8, 10))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for seed in (1, 2, 3):
        (tmp_path / f"n{seed}.py").write_text(MODEL.format(seed=seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_around_a_network_its_own_loss_is_in_the_middle(folder):
    found = app.landscape("n1.py:net", data="digits", points=5, samples=64, statistics="kept")
    assert found.surface.losses.shape == (5, 5)
    data = json.loads(found.files[0].read_text())
    assert data["kind"] == "plane"
    assert data["samples"] == 64
    assert found.surface.losses[2, 2] == pytest.approx(data["losses"][2][2])
    page = found.files[2].read_text()
    assert "<svg" in page
    assert "nervure landscape n1.py:net --data digits" in page
    assert "Batch-norm statistics were kept" in page
    assert len(found.files[1].read_text().splitlines()) == 26


def test_between_networks_a_line_and_a_plane(folder):
    found = app.landscape("n1.py:net", data="digits", to=["n2.py:net"], points=5, samples=64)
    assert {0.0, 1.0} <= set(found.surface.shares.tolist())
    assert found.surface.barrier >= 0
    assert "barrier above the chord" in found.files[2].read_text()
    found = app.landscape("n1.py:net", data="digits", to=["n2.py:net", "n3.py:net"], points=3, samples=64)
    assert len(found.path) == 3
    assert max(place[2] for place in found.path) < 1e-4


def test_a_training_run_ends_at_the_origin_and_its_loss_falls(folder):
    found = app.landscape("n1.py:net", data="digits", train=40, points=3, samples=64)
    assert len(found.path) >= 10
    assert found.path[-1] == pytest.approx((0, 0, 0), abs=1e-6)
    assert 0 < found.surface.explained <= 1
    assert "no proof that the run is flat" in found.files[2].read_text()


def test_checkpoints_of_both_kinds_are_read_and_foreign_files_refused(folder):
    model = zoo.build("mlp", shape=(1, 8, 8), classes=10, seed=0)
    (folder / "run").mkdir()
    for step in range(4):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(step)))
        if step % 2:
            torch.save({"state_dict": model.state_dict()}, folder / "run" / f"{step}.pt")
        else:
            safetensors.torch.save_file(model.state_dict(), folder / "run" / f"{step}.safetensors")
    found = app.landscape("mlp", data="digits", path=folder / "run", points=3, samples=64)
    assert len(found.path) == 4
    splits = load("digits", seed=0)
    assert found.samples == 64
    assert mean_loss([(splits.train_x[:64], splits.train_y[:64])], cross_entropy)(model) > 0
    torch.save({"other": torch.zeros(2)}, folder / "run" / "9.pt")
    with pytest.raises(BadModel, match=r"9.pt does not fit"):
        app.landscape("mlp", data="digits", path=folder / "run", points=3, samples=64)
    (folder / "run" / "9.pt").write_bytes(b"garbage")
    with pytest.raises(BadModel, match=r"9.pt does not fit"):
        app.landscape("mlp", data="digits", path=folder / "run", points=3, samples=64)
    (folder / "few").mkdir()
    with pytest.raises(UsageError, match="holds no training run"):
        app.landscape("mlp", data="digits", path=folder / "few")


def test_a_pickle_is_not_unpickled(folder):
    import os

    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    (folder / "run").mkdir()
    for name in ("a", "b", "c"):
        torch.save({"x": Bad()}, folder / "run" / f"{name}.pt")
    with pytest.raises(BadModel, match="does not fit"):
        app.landscape("mlp", data="digits", path=folder / "run")
    assert not (folder / "owned").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"points": 2},
        {"extent": 0.0},
        {"samples": 1},
        {"to": ["a", "b", "c"]},
        {"to": ["a"], "path": "x"},
        {"train": -1},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(UsageError, match="no such landscape"):
        app.landscape("mlp", data="digits", **options)


def test_the_command(folder, capsys):
    words = ["landscape", "n1.py:net", "--data", "digits", "--points", "3", "--samples", "64"]
    assert run(words) == 0
    out = capsys.readouterr().out
    assert "standard error" in out
    assert out.strip().endswith("landscape-n1.py-net.html")
    assert run([*words, "--to", "n2.py:net", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "line"
    assert run([*words, "--points", "1"]) == 2
