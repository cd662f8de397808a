"""Contests: their plans, one failing entrant beside others, tables, report and command."""

from __future__ import annotations

import json

import pytest
import torch

from nervure import app
from nervure._kit import NoEffect, UnknownId, UsageError
from nervure.arena import measure
from nervure.arena.contest import CONTESTS, Contest, Trial, contest
from nervure.arena.curvature import CONTEST, _truth
from nervure.cli.main import run
from nervure.report import contest_tables
from nervure.spec import Notes, Record, Status


def silent(share, text=""):
    return None


@pytest.mark.parametrize("name", CONTESTS)
def test_every_contest_is_described_whole(name):
    found = contest(name)
    assert found.name == name
    assert set(found.baselines) <= set(found.entrants)
    assert set(found.quick) <= set(found.cases)
    assert found.quick
    assert found.seeds >= 2
    assert all(found.entrants.values())
    assert found.better in ("higher", "lower")


def test_a_plan_holds_a_job_a_case_and_seed_and_refuses_unknown_names():
    jobs = CONTEST.plan(seeds=2, cases=["trace, tanh-mlp, 50 gradients"], entrants=["Hutch++"])
    assert [(job.case, job.seed) for job in jobs] == [
        ("trace, tanh-mlp, 50 gradients", 0),
        ("trace, tanh-mlp, 50 gradients", 1),
    ]
    assert set(jobs[0].params["entrants"]) == {"Hutch++", *CONTEST.baselines}
    assert {job.case for job in CONTEST.plan(quick=True)} == set(CONTEST.quick)
    with pytest.raises(UsageError, match="no entrant 'Hutch'"):
        CONTEST.plan(entrants=["Hutch"])
    with pytest.raises(UsageError, match="no case"):
        CONTEST.plan(cases=["all"])
    with pytest.raises(UsageError, match="nothing to compare"):
        CONTEST.plan(seeds=0)
    with pytest.raises(UnknownId, match="curvature"):
        contest("curvatur")


def test_an_entrant_that_cannot_does_not_stop_the_others():
    def enter(name):
        if name == "b":
            raise NoEffect("b has nothing to do")
        return None if name == "c" else {"score": float(len(name))}

    made = Contest(
        name="x", title="X", metric="score", better="higher", baselines=("a",), cases={"one": "it"}, quick=("one",),
        entrants=dict.fromkeys(("a", "b", "c", "dd"), "it"), protocol="Fair.", seeds=2,
        measure=lambda trial: trial.each(enter),
    )  # fmt: skip
    records = []
    for job in made.plan():
        notes = Notes()
        made.run(job, silent, notes)
        assert notes.warnings == ["b: b has nothing to do."]
        records.append(Record(job=job, status=Status.DONE, measurements=tuple(notes.measurements)))
    (table,) = contest_tables(records, metric="score", better="higher", baselines=made.baselines)
    assert [row.arm for row in table.rows] == ["dd", "a"]
    assert (table.baseline, table.heading) == ("a", "one")


def test_the_truth_of_curvature_is_the_exact_spectrum_and_lanczos_reaches_it():
    truth = _truth("tanh-mlp", 0)
    dense = truth.operator.dense()
    torch.testing.assert_close(truth.values, torch.linalg.eigvalsh(dense))
    assert truth.operator.size == 280
    notes = Notes()
    job = CONTEST.plan(cases=["eigenvalues, tanh-mlp, 200 gradients"], seeds=1)[0]
    measure(job, silent, notes)
    found = {(one.arm, one.metric): one.value for one in notes.measurements}
    assert found["block Lanczos", "error"] < 1e-6
    assert found["block Lanczos", "error"] < found["power iteration", "error"]
    for arm in ("block Lanczos", "power iteration", "subspace iteration"):
        assert found[arm, "gradients"] <= 200


@pytest.mark.parametrize("model", ["residual-conv", "encoder"])
def test_traces_and_densities_on_other_networks_stay_within_their_budget(model):
    for quantity in ("trace", "density"):
        notes = Notes()
        (job,) = CONTEST.plan(cases=[f"{quantity}, {model}, 50 gradients"], seeds=1)
        measure(job, silent, notes)
        found = {(one.arm, one.metric): one.value for one in notes.measurements}
        assert found
        assert not notes.warnings
        assert all(value <= 50 for (_, metric), value in found.items() if metric == "gradients")
        assert all(0 <= value < 2.1 for (_, metric), value in found.items() if metric == "error")


def test_command_report_and_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "curvature", "--quick", "--workers", "0", "--store", "s.db", "--json"]
    assert run(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {table["case"] for table in shown["tables"]} == set(CONTEST.quick)
    page = (tmp_path / "reports" / "compare-curvature.html").read_text()
    assert "better than power iteration?" in page
    assert "better than Hutchinson?" in page
    assert "nervure compare curvature --quick" in page
    files = app.export("compare-curvature", store="s.db", folder="again")
    assert [path.suffix for path in files] == [".json", ".csv", ".html"]
    with pytest.raises(UsageError, match="no record of|no such comparison"):
        app.export("compare-curvature", store="empty.db")


def test_a_trial_draws_seeds_of_its_own():
    one, other = (Trial("case", seed, (), False, silent, Notes()) for seed in (0, 1))
    assert one.seed_for("a") != other.seed_for("a")
    assert one.seed_for("a") == Trial("case", 0, (), False, silent, Notes()).seed_for("a")
