import json
import os
import subprocess
import sys

import pytest

from nervure.cli.main import run
from nervure.spec import Verdict
from nervure.store import Store

CLAIM = "masks-signs-lrr/single-neuron"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("NERVURE_STORE", str(tmp_path / "store.db"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stored(folder):
    with Store.open(folder / "store.db") as store:
        return [str(record.status) for record in store.records(history=True)]


def test_find_show_and_list(capsys):
    assert run(["find", "catastrophic", "forgetting"]) == 0
    assert "ewc" in capsys.readouterr().out
    assert run(["find", "zzzzzz"]) == 1
    assert run(["show", "lottery-ticket"]) == 0
    assert "winning-ticket" in capsys.readouterr().out
    assert run(["show", "35", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["id"] == "lottery-ticket"
    assert run(["list", "--runnable", "--family", "compress"]) == 0
    assert "masks-signs-lrr" in capsys.readouterr().out
    assert run(["list"]) == 0
    assert "294 papers" in capsys.readouterr().out


WRONG = [
    "fnd",
    "show",
    "show lotery",
    "run no-such",
    f"run {CLAIM} --seeds x",
    f"run {CLAIM} --seeds 0",
    f"run {CLAIM} --data digits",
    f"run {CLAIM} --workers -1",
    f"run {CLAIM}x",
    "compare prune --data digits --density 2",
    "compare prune --model mpl",
]


@pytest.mark.parametrize("words", WRONG)
def test_wrong_usage_is_2(here, words, capsys):
    assert run(words.split()) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_names_every_command(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("find", "list", "show", "run", "compare", "export", "data"):
        assert name in text
    assert run(["run", "--help"]) == 0
    assert "--until-decided" in capsys.readouterr().out
    assert run(["compare", "prune", "--help"]) == 0
    assert "--entrant" in capsys.readouterr().out


def test_a_claim_runs_resumes_reports_and_exports(here, capsys):
    assert run(["run", CLAIM, "--seeds", "2", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    last = out.strip().splitlines()[-1]
    assert last == os.path.join("reports", "masks-signs-lrr.single-neuron.html")
    page = (here / last).read_text(encoding="utf-8")
    assert "<svg" in page
    assert "holds" in page
    assert 'src="http' not in page
    assert "<script" not in page
    before = stored(here)
    assert run(["run", CLAIM, "--seeds", "2", "--workers", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outcome"] == "holds"
    assert stored(here) == before == ["done", "done"]
    assert run(["export", CLAIM, "--to", "out"]) == 0
    files = sorted(path.suffix for path in (here / "out").iterdir())
    assert files == [".csv", ".html", ".json"]
    saved = json.loads((here / "out" / "masks-signs-lrr.single-neuron.json").read_text())
    assert saved["verdict"]["outcome"] == "holds"
    assert len(saved["records"]) == 2


def test_a_comparison_runs_on_the_users_model_and_data(here, capsys):
    import numpy as np

    (here / "mine.py").write_text(
        "from torch import nn\ndef net(scale=1.0):\n    w = max(1, int(16 * scale))\n"
        "    return nn.Sequential(nn.Linear(5, w), nn.ReLU(), nn.Linear(w, 3))\n"
    )
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 5)).astype(np.float32)
    np.savez(here / "mine.npz", x=x, y=(x[:, 0] > 0).astype(int) + (x[:, 1] > 0))
    words = ["compare", "prune", "--model", "mine.py:net", "--data", "mine.npz", "--seeds", "2", "--steps", "24"]
    words += ["--density", "0.5", "--density", "0.3", "--workers", "0"]
    words += [word for name in ("dense", "small-dense", "random", "snip") for word in ("--entrant", name)]
    assert run(words) == 0
    out = capsys.readouterr().out
    assert "small-dense" in out
    page = (here / "reports" / "compare-prune.html").read_text(encoding="utf-8")
    assert "mine.py:net" in page
    assert "<svg" in page
    assert run(["export", "compare-prune", "--to", "out"]) == 0
    tables = json.loads((here / "out" / "compare-prune.json").read_text())["tables"]
    assert [table["share"] for table in tables] == [0.5, 0.3]
    assert {row["arm"] for row in tables[0]["rows"]} == {"dense", "small-dense", "random", "snip"}


def test_exporting_nothing_says_how_to_measure(here, capsys):
    assert run(["export", CLAIM]) == 2
    assert f"nervure run {CLAIM}" in capsys.readouterr().err


BAD_INPUT = {
    "unimportable": ("import nothing_like_this\ndef net(): pass\n", "cannot be imported"),
    "raises": ("def net():\n    raise ValueError('boom')\n", "raised"),
    "no model": ("def net():\n    return 1\n", "returned no model"),
    "wrong shape": ("from torch import nn\ndef net():\n    return nn.Linear(3, 10)\n", "cannot take the data"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_models_are_3_with_one_paragraph(here, name, capsys):
    text, message = BAD_INPUT[name]
    (here / "bad.py").write_text(text)
    words = ["compare", "prune", "--model", "bad.py:net", "--data", "digits", "--quick", "--entrant", "snip"]
    assert run(words) == 3
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_model_whose_loss_is_nan_is_a_record_not_a_crash(here, capsys):
    (here / "nan.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(64, 10)\n        self.n = 0\n"
        "    def forward(self, x):\n        self.n += self.training\n"
        "        out = self.fc(x.flatten(1))\n        return out * float('nan') if self.n > 9 else out\n"
        "def net():\n    return Net()\n"
    )
    words = ["compare", "prune", "--model", "nan.py:net", "--data", "digits", "--seeds", "1", "--steps", "20"]
    assert run([*words, "--density", "0.5", "--entrant", "snip", "--workers", "0"]) == 3
    assert "loss became nan" in capsys.readouterr().err
    assert stored(here) == ["diverged"]


def test_a_store_that_is_none_is_3(here, capsys, monkeypatch):
    (here / "broken.db").write_bytes(b"this is no database at all" * 100)
    assert run(["run", CLAIM, "--seeds", "2", "--store", "broken.db", "--workers", "0"]) == 3
    err = capsys.readouterr().err
    assert "broken.db" in err
    assert "Try:" in err


def test_a_report_folder_that_cannot_be_made_is_3_and_loses_nothing(here, capsys):
    (here / "file").write_text("in the way")
    assert run(["run", CLAIM, "--seeds", "2", "--workers", "0", "--report", "file/reports"]) == 3
    assert "report cannot be written" in capsys.readouterr().err
    assert stored(here) == ["done", "done"]


def test_names_from_outside_are_escaped_in_the_page(here):
    from nervure.report import Board
    from nervure.report.export import render

    page = render(
        "leaderboard.html",
        {
            "title": "<script>alert(1)</script>",
            "board": Board(
                name="x",
                title="x",
                metric="accuracy",
                protocol="p",
                command="nervure --model '<img src=x>'",
                tables=[],
                records=[],
            ),
            "plot": "<svg></svg>",
            "time_plot": "",
            "cost_plot": "",
            "environment": {"<b>": "<i>"},
            "raw": "</pre><script>",
        },
    )
    assert "<script>" not in page
    assert "<img" not in page
    assert "<svg></svg>" in page


def test_spreadsheets_are_not_handed_formulas():
    from nervure.report.export import plain

    assert plain("=cmd()") == "'=cmd()"
    assert plain(-1.5) == -1.5


def test_the_exit_code_is_1_when_a_claim_does_not_hold(here, monkeypatch, capsys):
    from nervure.app import claims
    from nervure.spec import Outcome

    def refuted(claim, records, **options):
        return Verdict(claim_id=claim.id, statement="s", outcome=Outcome.DOES_NOT_HOLD, checks=())

    monkeypatch.setattr(claims, "verdict", refuted)
    assert run(["run", CLAIM, "--seeds", "2", "--workers", "0"]) == 1


def test_a_closed_pipe_is_no_error(here):
    out = subprocess.run(
        f"{sys.executable} -m nervure.cli list | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in out.stderr
    assert "Exception" not in out.stderr
