"""Records as TensorBoard scalars."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nervure._kit import CouldNotRun, require
from nervure.report.tracking._series import by_case, plain_names, seconds, series
from nervure.spec import Record


def to_tensorboard(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write every measured number as a scalar, one TensorBoard run an arm and seed.

    Curves keep their steps; final values stand as ``final/<metric>`` at step 0. The file of a job is named by its id
    and replaced when it is written again, so that nothing is shown twice. TensorBoard keeps 32 bits of a number.

    Args:
        records: Records of one claim or comparison.
        folder: The log folder; runs are ``<case>/<arm>/seed-<seed>`` in it, without the case where there is one.

    Returns:
        The files.

    Raises:
        CouldNotRun: If the folder cannot be written to.
    """
    require("tensorboard", extra="tensorboard")
    writer = require("torch.utils.tensorboard", extra="tensorboard").SummaryWriter
    arms = plain_names(point.arm for record in records for point in record.measurements)
    metrics = plain_names(point.metric for record in records for point in record.measurements)
    groups = by_case(records)
    cases = plain_names(case for case in groups if case)
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for case, found in groups.items():
            for record in found:
                for arm in dict.fromkeys(point.arm for point in record.measurements):
                    run = folder / cases.get(case, "") / arms[arm] / f"seed-{record.job.seed}"
                    paths.append(_write(record, arm, metrics, run, writer))
    except OSError as error:
        raise CouldNotRun(f"TensorBoard's files cannot be written to {folder}", found=str(error)) from error
    return paths


def _write(record: Record, arm: str, metrics: dict[str, str], run: Path, writer: Any) -> Path:
    """Write one arm of one job as one file, whole or not at all."""
    run.mkdir(parents=True, exist_ok=True)
    began = seconds(record)
    with tempfile.TemporaryDirectory(dir=run, prefix=".partial-") as aside:
        with writer(aside) as log:
            for (owner, metric), points in series(record).items():
                for step, value in points if owner == arm else ():
                    log.add_scalar(metrics[metric], value, step, walltime=began + step / 1e3)
            for metric, value in record.values().get(arm, {}).items():
                log.add_scalar(f"final/{metrics[metric]}", value, 0, walltime=began)
        (made,) = Path(aside).iterdir()
        # TensorBoard reads whatever has tfevents in its name.
        return made.replace(run / f"events.out.tfevents.{record.job.id}")
