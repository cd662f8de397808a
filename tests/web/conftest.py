"""A store and a report folder as a user would have them after a day of work, hostile names included."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nervure.app.library import Library
from nervure.audit import Audit, Finding, Remedy
from nervure.spec import Job, Measurement, Paper, Record, Status
from nervure.store import Store

CLAIM = "lottery-ticket/winning-ticket"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def claim_record(seed, *, quick=False, lift=0.05):
    values = {"ticket": 0.85 + lift, "reinit": 0.84, "shuffled": 0.83, "dense": 0.85, "signs flipped": 0.5}
    points = [Measurement(arm=arm, metric="accuracy", value=value + 0.002 * seed) for arm, value in values.items()]
    points += [Measurement(arm="ticket", metric="curve", value=0.1 * n, step=n) for n in range(4)]
    params = {"quick": True} if quick else {}
    job = Job(target=f"claim:{CLAIM}", arm="*", case="-", seed=seed, params=params)
    return Record(
        job=job,
        status=Status.DONE,
        measurements=tuple(points),
        cost={"seconds": 2.0},
        environment={"torch": "2.13.0", "cpu": EVIL},
        started=f"2026-11-20T10:0{seed}:00+00:00",
    )


def pruned_record(arm, share, seed):
    params = {"model": f"{EVIL}.py:net", "data": "digits", "steps": 100, "unit": "density", "density": share}
    kept = {"accuracy": 0.9 * share + 0.01 * seed, "ms_64": 1.0 + share, "nonzero_macs": 1000 * share}
    points = tuple(Measurement(arm=arm, metric=name, value=value) for name, value in kept.items())
    job = Job(target="arena:prune", arm=arm, case=f"density={share:g}", seed=seed, params=params)
    return Record(job=job, status=Status.DONE, measurements=points, started="2026-11-20T11:00:00+00:00")


def broken_record():
    job = Job(target=f"claim:{CLAIM}", arm="*", case="-", seed=0, params={"data": EVIL})
    return Record(job=job, status=Status.FAILED, error=f"RuntimeError: {EVIL}", started="2026-11-20T12:00:00+00:00")


def audit(model):
    findings = (
        Finding(check="weights", level="ok", measured="all", meaning="Nothing stands out."),
        Finding(
            check="units",
            level="warning",
            measured=EVIL,
            meaning="Units are dead.",
            remedy=Remedy("lsuv", "Start again.", f"nervure show {EVIL}"),
            layers={EVIL: 0.5, "two": 0.1},
            unit="share",
        ),
    )
    seconds = {"weights": 0.1, "units": 0.2}
    return Audit(model=model, data="digits", findings=findings, notes=(), seconds=seconds)


def surface():
    axis = [-1.0, 0.0, 1.0]
    losses = [[x * x + y * y for x in axis] for y in axis]
    return {
        "kind": "plane", "x": axis, "y": axis, "losses": losses, "path": [[0.0, 0.0, 0.0]], "units": [1.0, 1.0],
        "statistics": "kept", "explained": None, "error": 0.01, "samples": 10, "networks": [EVIL], "command": EVIL,
        "environment": {"torch": EVIL},
    }  # fmt: skip


def fill(folder):
    """Write a store and a report folder."""
    reports = folder / "reports"
    reports.mkdir()
    for name in ("one", "two"):
        text = {**dataclasses.asdict(audit(name if name == "one" else EVIL)), "command": EVIL, "environment": {}}
        (reports / f"audit-{name}.json").write_text(json.dumps(text))
    (reports / "landscape-net.json").write_text(json.dumps(surface()))
    (reports / "audit-secret of others.json").write_text("{}")
    (folder / "audit-outside.json").write_text("{}")
    with Store.open(folder / "store.db") as opened:
        for seed in range(3):
            opened.add(claim_record(seed))
            opened.add(claim_record(seed, quick=True, lift=-0.2))
        for arm in ("random", "snip"):
            for share in (0.5, 0.1):
                for seed in range(2):
                    opened.add(pruned_record(arm, share, seed))
        opened.add(broken_record())
        told = Paper(id="x:1", source="https://feed.example", title=EVIL, link="https://paper.example", family="train")
        opened.papers.add([told])
    return folder


@pytest.fixture(scope="session")
def filled():
    return fill


@pytest.fixture
def reports(tmp_path):
    return fill(tmp_path) / "reports"


@pytest.fixture
def store(reports):
    with Store.open(reports.parent / "store.db") as opened:
        yield opened


@pytest.fixture
def library(store, reports):
    return Library(store, reports=reports)


@pytest.fixture
def recorded():
    return claim_record
