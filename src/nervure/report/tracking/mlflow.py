"""Records as MLflow runs: one for the claim or comparison, below it one for every job."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nervure._kit import CouldNotRun, UsageError, require
from nervure.report.tables import arm_rows
from nervure.report.tracking._series import by_case, plain_names, seconds, series
from nervure.spec import Record, Status

_PARENT, _JOB, _RUN, _CONTENT = "mlflow.parentRunId", "nervure.job", "nervure.run", "nervure.content"
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,100}")
# What a tracking server takes at a time, and of one text.
_METRICS, _TEXTS, _TEXT = 1000, 100, 5000
_TOLD = 10


def to_mlflow(
    records: Sequence[Record],
    *,
    uri: str,
    key: str,
    name: str,
    tags: Mapping[str, str],
    files: Sequence[Path] = (),
    experiment: str = "nervure",
    say: Callable[[str], None] | None = None,
) -> str:
    """Write records to an MLflow tracking store.

    The run of the whole holds what the jobs share, the means over the seeds with their 95% intervals, the tags and
    the files; below it every job has a run with its parameters, curves and final values. Written again, what is
    there already is left alone: jobs are known by their ids, and one that was measured anew replaces its run.

    Args:
        records: Records of one claim or comparison, one a job.
        uri: The tracking address, such as ``sqlite:///mlflow.db`` or ``http://host:5000``.
        key: What names the whole, the same each time.
        name: The name it is shown by.
        tags: Tags of the whole, such as the verdict; strange characters of their names are replaced.
        files: Files to keep with it.
        experiment: The experiment; made if there is none.
        say: Told now and then how far it is.

    Returns:
        The MLflow id of the run of the whole.

    Raises:
        CouldNotRun: If the store cannot be reached or refuses.
        UsageError: If the key has strange characters.
    """
    if not _KEY.fullmatch(key):
        raise UsageError("runs cannot be found by this key", expected="letters, digits, _ . -", found=key)
    mlflow = require("mlflow", extra="mlflow")
    with _told(mlflow, uri):
        tracker = _Tracker(mlflow, uri, experiment)
        parent = tracker.one(_RUN, key) or tracker.begin(name, {_RUN: key}, _began(records))
        names = _names(records)
        done = {_mark(record): record for record in records}
        for run in tracker.below(parent):
            mark = run.data.tags.get(_CONTENT)
            if mark in done:
                del done[mark]
            elif run.data.tags.get(_JOB) in {record.job.id for record in records}:
                tracker.client.delete_run(run.info.run_id)  # half written, or measured anew since
        for count, (mark, record) in enumerate(done.items()):
            if say is not None and count % _TOLD == 0:
                say(f"MLflow: {count} of {len(done)} jobs written")
            _write_job(tracker, parent, record, mark, names)
        _write_whole(
            tracker, parent, records, names, {plain: tags[text] for text, plain in plain_names(tags).items()}, files
        )
    return parent


@contextmanager
def _told(mlflow: Any, uri: str) -> Iterator[None]:
    """Turn what MLflow raises into an error of ours.

    Raises:
        CouldNotRun: In its place.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError) as error:
        text = str(error).splitlines()[0][:500] if str(error) else type(error).__name__
        raise CouldNotRun(
            "MLflow did not take the run", expected="an address such as sqlite:///mlflow.db", found=f"{uri}: {text}"
        ) from error


class _Tracker:
    """Speak to one experiment in small enough pieces.

    Args:
        mlflow: The package.
        uri: The tracking address.
        experiment: The experiment's name.
    """

    def __init__(self, mlflow: Any, uri: str, experiment: str) -> None:
        self.entities = mlflow.entities
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        known = self.client.get_experiment_by_name(experiment)
        self.experiment = known.experiment_id if known else self.client.create_experiment(experiment)

    def search(self, tag: str, value: str) -> list[Any]:
        """Return the runs with a tag."""
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], f"tags.`{tag}` = '{value}'", max_results=1000, page_token=token
            )
            found.extend(page)
            token = page.token
            if not token:
                return found

    def one(self, tag: str, value: str) -> str | None:
        """Return the id of the run with a tag, or None."""
        found = self.search(tag, value)
        return found[0].info.run_id if found else None

    def below(self, parent: str) -> list[Any]:
        """Return the runs below another."""
        return self.search(_PARENT, parent)

    def begin(self, name: str, tags: Mapping[str, str], began: float) -> str:
        """Begin a run and return its id."""
        run = self.client.create_run(self.experiment, start_time=int(1000 * began), run_name=name, tags=_texts(tags))
        return str(run.info.run_id)

    def log(
        self, run: str, metrics: Sequence[tuple[str, float, int, float]], params: Mapping[str, Any] | None = None
    ) -> None:
        """Log metrics (name, value, step, seconds since 1970) and parameters."""
        points = [self.entities.Metric(name, value, int(1000 * at), step) for name, value, step, at in metrics]
        for start in range(0, len(points), _METRICS):
            self.client.log_batch(run, metrics=points[start : start + _METRICS])
        pairs = [self.entities.Param(name, value) for name, value in _texts(params or {}).items()]
        for start in range(0, len(pairs), _TEXTS):
            self.client.log_batch(run, params=pairs[start : start + _TEXTS])

    def tag(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        pairs = [self.entities.RunTag(name, value) for name, value in _texts(tags).items()]
        for start in range(0, len(pairs), _TEXTS):
            self.client.log_batch(run, tags=pairs[start : start + _TEXTS])


Names = tuple[dict[str, str], dict[str, str]]


def _write_job(tracker: _Tracker, parent: str, record: Record, mark: str, names: Names) -> None:
    job, (arms, metrics), began = record.job, names, seconds(record)
    label = " ".join(part for part in (job.arm if job.arm != "*" else "", job.case, f"seed {job.seed}") if part)
    run = tracker.begin(label, {_PARENT: parent, _JOB: job.id, "nervure.status": str(record.status)}, began)
    points = [
        (f"{arms[arm]}/{metrics[metric]}", value, step, began)
        for (arm, metric), curve in series(record).items()
        for step, value in curve
    ]
    for arm, values in record.values().items():
        # Final values do not continue a curve of their name.
        points += [(f"{arms[arm]}/final/{metrics[metric]}", value, 0, began) for metric, value in values.items()]
    points += [(f"cost/{plain}", record.cost[cost], 0, began) for cost, plain in plain_names(record.cost).items()]
    params = {"target": job.target, "arm": job.arm, "case": job.case, "seed": job.seed}
    params |= {f"params.{plain}": job.params[text] for text, plain in plain_names(job.params).items()}
    params |= {f"budget.{plain}": job.budget[text] for text, plain in plain_names(job.budget).items()}
    tracker.log(run, points, params)
    tags = {
        f"nervure.environment.{plain}": record.environment[t] for t, plain in plain_names(record.environment).items()
    }
    if record.error:
        tags["nervure.error"] = record.error
    # The mark comes last: a run without it is half written.
    tracker.tag(run, {**tags, _CONTENT: mark})
    ended = int(1000 * (began + record.cost.get("seconds", 0.0)))
    status = "FINISHED" if record.status is Status.DONE else "FAILED"
    tracker.client.set_terminated(run, status=status, end_time=ended)


def _write_whole(
    tracker: _Tracker,
    parent: str,
    records: Sequence[Record],
    names: Names,
    tags: Mapping[str, str],
    files: Sequence[Path],
) -> None:
    mark = hashlib.sha256(json.dumps([sorted(map(_mark, records)), sorted(tags.items())]).encode()).hexdigest()[:20]
    if tracker.client.get_run(parent).data.tags.get(_CONTENT) == mark:
        return
    (arms, metrics), groups, now = names, by_case(records), max(map(seconds, records), default=0.0)
    cases = plain_names(case for case in groups if case)
    points = []
    for case, found in groups.items():
        head = f"{cases[case]}/" if case else ""
        for row in arm_rows(found):
            place = f"{head}{arms[row.arm]}/{metrics[row.metric]}"
            ends = {"mean": row.mean, "low": row.low, "high": row.high}
            points += [(f"{place}/{end}", value, row.n, now) for end, value in ends.items() if math.isfinite(value)]
    tracker.log(parent, points)
    for path in files:
        tracker.client.log_artifact(parent, str(path), "report")
    tracker.tag(parent, {**tags, _CONTENT: mark})
    tracker.client.set_terminated(parent)


def _names(records: Sequence[Record]) -> Names:
    points = [point for record in records for point in record.measurements]
    return plain_names(point.arm for point in points), plain_names(point.metric for point in points)


def _mark(record: Record) -> str:
    """Return what tells one measurement of a job from another."""
    text = json.dumps(record.to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _began(records: Sequence[Record]) -> float:
    return min(map(seconds, records), default=0.0)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return values as texts of a length that is taken."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return {name: text if len(text) <= _TEXT else text[: _TEXT - 1] + "…" for name, text in texts.items()}
