"""A network and data as the users of transformers have them: token numbers in, a ModelOutput out."""

import json

import pytest
import torch

from nervure.cli.main import run
from nervure.data import load

FILE = """
import torch
from transformers import BertConfig, BertForSequenceClassification


def net():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, num_labels=3))


def data():
    x = torch.randint(0, 60, (400, 12), generator=torch.Generator().manual_seed(1))
    return x, x[:, 0] % 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "hf.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_tokens_are_not_scaled(here):
    splits = load("hf.py:data")
    assert splits.train_x.dtype == torch.int64
    assert set(splits.train_x.unique().tolist()) == set(range(60))


def test_an_audit_says_what_it_can(here, capsys):
    only = [word for name in ("modes", "parameters", "accuracy", "dead units", "price") for word in ("--only", name)]
    assert run(["audit", "hf.py:net", "--data", "hf.py:data", "--budget", "20", *only, "--json"]) in (0, 1)
    found = {one["check"]: one["level"] for one in json.loads(capsys.readouterr().out)["findings"]}
    assert set(found) == {"modes", "parameters", "accuracy", "dead units", "price"}


def test_heads_and_channels_are_cut_and_come_back_from_the_file(here, capsys):
    words = ["prune", "hf.py:net", "--data", "hf.py:data", "--target", "macs=60%", "--steps", "5", "--train", "5"]
    assert run(words) == 0
    told = capsys.readouterr().out
    assert "saved, loaded again: largest relative difference 0.0e+00" in told
