import math
import os
import re

os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", MLFLOW_TRACKING_URI="")

import warnings

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nervure import app
from nervure._kit import CouldNotRun, UsageError
from nervure.arena import find_claim
from nervure.cli.main import run as command
from nervure.report.tracking import to_mlflow, to_tensorboard
from nervure.report.tracking._series import plain_names, series
from nervure.spec import Job, Measurement, Record, Status
from nervure.store import Store

CLAIM = "masks-signs-lrr/single-neuron"


@pytest.fixture(autouse=True)
def _aside(tmp_path, monkeypatch):
    """MLflow writes artifacts below the working folder, and its tables use what SQLAlchemy warns of."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy")
        warnings.filterwarnings("ignore", category=ResourceWarning)
        yield


def record(seed, *, target="claim:card/claim", arm="*", case="-", status=Status.DONE, add=0.0, more=()):
    points = [
        Measurement(arm=name, metric="test accuracy", value=level + seed / 100 + add)
        for name, level in (("ours (new)", 0.9), ("plain", 0.7))
    ]
    points += [Measurement(arm="plain", metric="loss", value=1 / step, step=step) for step in (1, 10, 100)]
    return Record(
        job=Job(target=target, arm=arm, case=case, seed=seed, params={"data": "digits"}, budget={"seconds": 60}),
        status=status,
        measurements=(*points, *more),
        cost={"seconds": 2.5},
        environment={"torch": "2.13", "cpu": "a <fast> one"},
        error="it broke" if status is Status.FAILED else None,
        started="2026-01-02T03:04:05+00:00",
    )


def scalars(folder):
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_back_every_arm_and_seed(tmp_path):
    records = [record(seed) for seed in range(2)]
    for _ in range(2):  # the second time replaces the first
        paths = to_tensorboard(records, tmp_path / "logs")
    assert len(paths) == 4
    assert sorted(str(one.parent.relative_to(tmp_path / "logs")) for one in paths) == [
        "ours _new_/seed-0", "ours _new_/seed-1", "plain/seed-0", "plain/seed-1",
    ]  # fmt: skip
    assert sorted(tmp_path.rglob("*tfevents*")) == sorted(paths)
    found = scalars(tmp_path / "logs" / "plain" / "seed-1")
    assert found["loss"] == [(1, 1.0), (10, pytest.approx(0.1)), (100, pytest.approx(0.01))]
    assert found["final/test accuracy"] == [(0, pytest.approx(0.71))]
    assert set(scalars(tmp_path / "logs" / "ours _new_" / "seed-0")) == {"final/test accuracy"}


def test_tensorboard_keeps_cases_apart(tmp_path):
    to_tensorboard([record(0, case="a|b"), record(0, case="../c")], tmp_path / "logs")
    assert sorted(one.name for one in (tmp_path / "logs").iterdir()) == ["_c", "a_b"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CouldNotRun, match="cannot be written"):
        to_tensorboard([record(0)], tmp_path / "file")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One database: making its tables takes longer than a test."""
    return tmp_path_factory.mktemp("base")


def client(base):
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{base}/m.db")


def runs(base, parent):
    one = client(base)
    number = one.get_run(parent).info.experiment_id
    found = one.search_runs([number], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {run.data.tags["nervure.job"]: run for run in found}


def send(base, records, **options):
    options = {"key": "k1", "name": "card/claim", "tags": {"nervure.verdict": "holds"}, **options}
    return to_mlflow(records, uri=f"sqlite:///{base}/m.db", **options)


def test_mlflow_holds_a_run_a_job_below_one_for_all(base, tmp_path):
    (tmp_path / "report.html").write_text("<p>report</p>")
    strange = [Measurement(arm="plain", metric="worst", value=math.nan), Measurement(arm="a:b", metric="%", value=1.0)]
    records = [record(0), record(1), record(2, status=Status.FAILED, more=strange)]
    parent = send(base, records, files=[tmp_path / "report.html"], tags={"nervure.check.a > b?": "holds"})
    whole, below = client(base).get_run(parent), runs(base, parent)
    assert whole.info.run_name == "card/claim"
    assert whole.info.status == "FINISHED"
    assert whole.data.tags["nervure.check.a _ b_"] == "holds"
    assert whole.data.metrics["ours _new_/test accuracy/mean"] == pytest.approx(0.91)
    assert whole.data.metrics["plain/test accuracy/low"] < 0.71 < whole.data.metrics["plain/test accuracy/high"]
    assert [one.path for one in client(base).list_artifacts(parent, "report")] == ["report/report.html"]
    assert set(below) == {one.job.id for one in records}
    one = below[records[1].job.id]
    assert one.data.params == {
        "target": "claim:card/claim", "arm": "*", "case": "-", "seed": "1", "params.data": "digits",
        "budget.seconds": "60",
    }  # fmt: skip
    assert one.data.metrics["plain/final/test accuracy"] == pytest.approx(0.71)
    assert one.data.metrics["cost/seconds"] == 2.5
    assert one.data.tags["nervure.environment.cpu"] == "a <fast> one"
    assert one.info.end_time - one.info.start_time == 2500
    curve = client(base).get_metric_history(one.info.run_id, "plain/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 1.0), (10, 0.1), (100, 0.01)]
    failed = below[records[2].job.id]
    assert (failed.info.status, failed.data.tags["nervure.error"]) == ("FAILED", "it broke")
    assert math.isnan(failed.data.metrics["plain/final/worst"])
    assert sum(value == 1.0 for name, value in failed.data.metrics.items() if name.startswith("a_b/final/_-")) == 1


def test_mlflow_is_written_once(base):
    records = [record(0), record(1)]
    parent = send(base, records, key="once")
    before = runs(base, parent)
    history = client(base).get_metric_history(parent, "plain/test accuracy/mean")
    assert send(base, records, key="once") == parent
    after = runs(base, parent)
    assert {job: run.info.run_id for job, run in after.items()} == {job: run.info.run_id for job, run in before.items()}
    assert client(base).get_metric_history(parent, "plain/test accuracy/mean") == history
    # A job measured anew takes the place of its run, a job that was half written too, and a new one joins.
    torn, again = records[1].job.id, record(0, add=0.05)
    client(base).set_tag(before[torn].info.run_id, "nervure.content", "")
    assert send(base, [again, records[1], record(2)], key="once") == parent
    last = runs(base, parent)
    assert len(last) == 3
    assert last[again.job.id].data.metrics["plain/final/test accuracy"] == pytest.approx(0.75)
    assert not {run.info.run_id for run in last.values()} & {run.info.run_id for run in before.values()}
    mean = client(base).get_run(parent).data.metrics["plain/test accuracy/mean"]
    assert mean == pytest.approx((0.75 + 0.71 + 0.72) / 3)
    assert send(base, records, key="twice") != parent


def test_mlflow_refusals_are_told(base, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="cannot be found by this key"):
        send(base, [record(0)], key="x' OR '1")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")
    with pytest.raises(CouldNotRun, match="MLflow did not take the run.*maintenance mode"):
        to_mlflow([record(0)], uri=f"file:{tmp_path}/runs", key="k", name="n", tags={})
    with pytest.raises(CouldNotRun, match="MLflow did not take the run.*nowhere:"):
        to_mlflow([record(0)], uri="nowhere://x", key="k", name="n", tags={})


def test_mlflow_s_file_store_where_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path}/runs"
    parent = to_mlflow([record(0)], uri=uri, key="k", name="n", tags={})
    assert to_mlflow([record(0)], uri=uri, key="k", name="n", tags={}) == parent
    assert "plain/test accuracy/mean" in mlflow.MlflowClient(tracking_uri=uri).get_run(parent).data.metrics


def test_more_points_than_go_at_a_time(base):
    many = [Measurement(arm="plain", metric="long", value=step, step=step) for step in range(2500)]
    parent = send(base, [record(0, more=many)], key="many")
    (one,) = runs(base, parent).values()
    assert len(client(base).get_metric_history(one.info.run_id, "plain/long")) == 2500


def test_names_and_steps():
    alike = plain_names(["A_B", "a_b", "a/b"])
    assert all(re.fullmatch(r"a_b-[0-9a-f]{6}", name, re.IGNORECASE) for name in alike.values())
    assert len({name.casefold() for name in alike.values()}) == 3
    assert plain_names(["a b", "a_b", "a/b"])["a_b"] == "a_b"
    long = plain_names(["x" * 200, "x" * 201])
    assert len(set(long.values())) == 2
    assert max(map(len, long.values())) <= 60
    halves = tuple(Measurement(arm="a", metric="m", value=step, step=step) for step in (0.5, 1.0, 1.5))
    assert series(record(0).replace(measurements=halves)) == {("a", "m"): [(0, 0.5), (1, 1.0), (2, 1.5)]}


def stored(folder):
    """Keep what a rehearsal of a claim might have measured."""
    checks = find_claim(CLAIM).checks
    pairs = [(check.method, check.metric, 0.9) for check in checks]
    pairs += [(check.control, check.metric, 0.5) for check in checks if check.control is not None]
    with Store.open(folder / "store.db") as store:
        for seed in range(3):
            points = tuple(
                Measurement(arm=arm, metric=metric, value=level + seed / 1000) for arm, metric, level in pairs
            )
            job = Job(target=f"claim:{CLAIM}", arm="*", case="-", seed=seed, params={"quick": True})
            store.add(record(seed).replace(job=job, measurements=points))


def test_a_stored_claim_goes_to_both(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NERVURE_STORE", str(tmp_path / "store.db"))
    stored(tmp_path)
    words = ["export", CLAIM, "--mlflow", f"sqlite:///{base}/m.db", "--tensorboard", str(tmp_path / "logs")]
    assert command(words) == 0
    said, told = (text.splitlines() for text in capsys.readouterr())
    assert len(said) == 2
    assert "MLflow: 0 of 3 jobs written" in told
    assert "TensorBoard files" in said[0]
    parent = said[1].rpartition(" ")[2]
    whole = client(base).get_run(parent)
    assert whole.data.tags["nervure.verdict"] in {"holds", "does not hold", "inconclusive", "void"}
    assert whole.data.tags["nervure.rehearsal"] == "true"
    endings = {one.path.rpartition(".")[2] for one in client(base).list_artifacts(parent, "report")}
    assert endings == {"json", "csv", "html"}
    assert len(runs(base, parent)) == 3
    assert command(words) == 0
    assert capsys.readouterr().out.splitlines() == said
    assert not (tmp_path / "reports").exists()
    assert command(["export", "site", str(tmp_path), "--tensorboard", "x"]) == 2
    assert command(["export", "lottery-ticket", "--tensorboard", "x"]) == 2
    with Store.open(tmp_path / "store.db"), pytest.raises(UsageError, match="nowhere to write"):
        app.export_tracking(CLAIM)
