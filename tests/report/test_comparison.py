import dataclasses
import math
import re

import pytest

from nervure.report import Board, case_tables, leaderboard_files, no_faster
from nervure.report.plots import kept_plot, share_plot, time_plot
from nervure.spec import Job, Measurement, Record, Status

COLUMNS = {"ms_64": "ms, batch 64", "nonzero_macs": "MACs, nonzero", "agreement": "agrees with dense"}


def record(arm, share, seed, *, status=Status.DONE, error=None, **metrics):
    job = Job(target="arena:prune", arm=arm, case=f"m|d|density={share:g}", seed=seed, params={"density": share})
    points = tuple(Measurement(arm=arm, metric=name, value=value) for name, value in metrics.items())
    return Record(job=job, status=status, measurements=points, error=error)


def records():
    found = []
    for seed in range(3):
        found.append(record("dense", 1.0, seed, accuracy=0.9 + seed / 100, ms_64=2.0, nonzero_macs=100.0))
        for share in (0.5, 0.1):
            macs = {"nonzero_macs": 100 * share, "kept: a.weight": share, "kept: <b>.weight": 0.0}
            found.append(record("masked", share, seed, accuracy=0.8 * share, ms_64=2.1, **macs))
            found.append(record("cut", share, seed, accuracy=0.7 * share, ms_64=2 * share, **macs))
    return found


def tables():
    return case_tables(records(), metric="accuracy", baseline="masked")


def test_what_keeps_everything_stands_in_every_table():
    made = tables()
    assert [table.share for table in made] == [0.5, 0.1]
    for table in made:
        assert table.levels == ["dense"]
        assert {row.arm for row in table.rows} == {"dense", "masked", "cut"}
        assert table.means["dense"]["accuracy"] == pytest.approx(0.91)
        assert table.means["cut"]["ms_64"] == pytest.approx(2 * table.share)


def test_arms_that_save_no_time_are_named():
    assert [no_faster(table) for table in tables()] == [["masked"], ["masked"]]
    untimed = dataclasses.replace(tables()[0], means={"dense": {"accuracy": 1.0}, "cut": {"accuracy": 1.0}})
    assert no_faster(untimed) == []


def test_a_failed_dense_network_is_a_problem_of_every_table():
    broken = [one for one in records() if one.job.arm != "dense"]
    broken += [record("dense", 1.0, 0, status=Status.FAILED, error="RuntimeError: no\nmore")]
    made = case_tables(broken, metric="accuracy", baseline="masked")
    assert [table.problems for table in made] == [{"dense": "RuntimeError: no"}] * 2


def test_plots_show_each_arm_and_an_emptied_layer():
    made = tables()
    assert share_plot(made, "accuracy").startswith("<svg")
    assert time_plot(made).startswith("<svg")
    assert kept_plot(made[0], "kept: ").startswith("<svg")
    assert kept_plot(made[0], "elsewhere: ") == ""


def test_the_page_tells_what_saves_nothing_and_escapes_names(tmp_path):
    board = Board(
        name="compare",
        title="<script>",
        metric="accuracy",
        protocol="equal steps",
        command="nervure compare prune",
        tables=tables(),
        records=records(),
        columns={**COLUMNS, "nobody_measured": "nothing"},
        layers="kept: ",
    )
    files = leaderboard_files(board, tmp_path)
    page = files[-1].read_text(encoding="utf-8")
    assert page.count("No faster than the dense network at batch 64 (less than 5% saved): masked.") == 2
    assert "ms, batch 64" in page
    assert "nothing</th>" not in page
    assert "agrees with dense</th>" not in page
    assert "<script>" not in page
    assert len(re.findall("<svg", page)) == 5


def test_without_other_metrics_the_page_is_the_leaderboard_alone(tmp_path):
    bare = [record("a", 0.5, seed, accuracy=0.5 + seed / 10) for seed in range(2)]
    made = case_tables(bare, metric="accuracy", baseline="a")
    board = Board(name="x", title="x", metric="accuracy", protocol="", command="", tables=made, records=bare)
    files = leaderboard_files(board, tmp_path)
    assert "Does it save time?" not in files[-1].read_text(encoding="utf-8")
    assert math.isclose(made[0].spread["a"][0], 0.55)
