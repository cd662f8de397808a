"""Examine a user's network and write what was found."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nervure._kit import UsageError
from nervure.app.jobs import OnEvent
from nervure.arena import prune as arena
from nervure.arena.tasks import PruneTask
from nervure.audit import Audit
from nervure.audit import audit as examine
from nervure.core import factory
from nervure.learn.loop import cross_entropy
from nervure.report import audit_files
from nervure.run import Event
from nervure.run.attempt import environment


@dataclass(frozen=True)
class Examination:
    """Hold what came of an audit.

    Args:
        audit: The findings.
        files: The report's files: JSON, CSV, HTML.
    """

    audit: Audit
    files: list[Path]


def audit(
    model: str,
    *,
    data: str | None = None,
    rate: float | None = None,
    train: int = 0,
    budget: float = 100.0,
    only: Sequence[str] = (),
    against: str | None = None,
    seed: int = 0,
    report: str | Path = "reports",
    on_event: OnEvent = lambda event: None,
) -> Examination:
    """Examine a network.

    Args:
        model: ``path.py:factory`` of a trained network, or a zoo model (then give `train` and data).
        data: As in `nervure.data.load`; without, only the weights are looked at.
        rate: The learning rate the network is trained with.
        train: Optimizer steps to train the network first, with Adam.
        budget: Seconds for all checks.
        only: Names of the checks to make; all when empty.
        against: ``path.py:factory`` of another network to compare it with.
        seed: Decides everything random.
        report: Folder for the report.
        on_event: Called with progress.

    Returns:
        The findings and the report's files.

    Raises:
        UsageError: If an argument is out of range, or a zoo model is wanted without data.
    """
    if train < 0 or budget < 1 or (rate is not None and rate <= 0):
        raise UsageError(
            "an argument is out of range",
            expected="train >= 0, rate > 0, a budget of a second or more",
            found=f"{train=}, {rate=}, {budget=}",
        )
    if data is None and (train or ":" not in model):
        raise UsageError("a network is trained on data", expected="--data", found=f"{model}, --train {train}")
    began = time.monotonic()

    def progress(share: float, text: str) -> None:
        spent = time.monotonic() - began
        left = spent / share * (1 - share) if share > 0 else None
        on_event(Event(kind="progress", share=share, seconds_left=left, text=text))

    parts = {}
    if data is None:
        network = factory.build_model(model)
    else:
        splits = arena.load_data(data, seed=seed)
        network = arena.build(model, splits, seed=seed)
        arena.check(network, splits, name=model)
        PruneTask(splits, rate=rate or 1e-3, seed=seed, tick=lambda: None).train(network, steps=train)
        parts = {"train": (splits.train_x, splits.train_y), "test": (splits.test_x, splits.test_y)}
    other = None
    if against is not None:
        if data is None:
            raise UsageError("two networks are compared on data", expected="--data", found="none")
        other = (against, arena.build(against, splits, seed=seed + 1))
        arena.check(other[1], splits, name=against)
    found = examine(
        network,
        loss=cross_entropy,
        name=model,
        data=data or "",
        rate=rate,
        seconds=budget,
        only=tuple(only),
        other=other,
        seed=seed,
        progress=progress,
        **parts,
    )
    words = ["nervure", "audit", model, *(["--data", data] if data else []), "--budget", f"{budget:g}"]
    words += ["--against", against] if against is not None else []
    words += ["--rate", f"{rate:g}"] if rate is not None else []
    words += ["--train", str(train)] if train else []
    words += [word for name in only for word in ("--only", name)] + ["--seed", str(seed)] * bool(seed)
    files = audit_files(found, Path(report), command=shlex.join(words), environment=environment())
    return Examination(found, files)
