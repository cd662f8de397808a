"""What the store and the report folder hold, as values a page or a script can show. Reads only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nervure._kit import UnknownId
from nervure.app.comparisons import prune_board
from nervure.app.contests import contest_board
from nervure.arena import find_claim, prune
from nervure.arena.contest import CONTESTS, contest
from nervure.catalogue import Entry, entries
from nervure.feed import matches
from nervure.report import Board
from nervure.spec import Job, Paper, Record, Status, Verdict, canonical_json
from nervure.stats import verdict
from nervure.stats.table import newest
from nervure.store import Store

Kind = Literal["claim", "comparison", "other"]
_PAGE_NAME = re.compile(r"(audit|landscape)-[A-Za-z0-9._-]+\Z")


@dataclass(frozen=True)
class Setting:
    """Name what belongs together in the store: one claim or comparison with everything that changes its result.

    Args:
        target: As in a job.
        params: As in a job, without the share of one case.
    """

    target: str
    params: str

    @classmethod
    def of(cls, job: Job) -> Setting:
        """Return the setting a job belongs to."""
        apart = ("density", "share") if job.target == f"arena:{prune.NAME}" else ()
        return cls(job.target, canonical_json({k: v for k, v in job.params.items() if k not in apart}))

    @property
    def id(self) -> str:
        """Return twelve hexadecimal digits that name it."""
        return hashlib.sha256(f"{self.target} {self.params}".encode()).hexdigest()[:12]


@dataclass
class Run:
    """Sum up the records of one setting.

    Args:
        setting: The setting.
        headers: The newest record of each job, without measurements.
    """

    setting: Setting
    headers: dict[str, Record] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Return the id of the setting."""
        return self.setting.id

    @property
    def kind(self) -> Kind:
        """Return what it is; ``"other"`` is what this version knows no claim or comparison for."""
        head, _, name = self.setting.target.partition(":")
        entry = entries().get(name.partition("/")[0])
        if head == "claim" and entry is not None and name in [f"{entry.id}/{one['name']}" for one in entry.claims]:
            return "claim"
        return "comparison" if head == "arena" and (name == prune.NAME or name in CONTESTS) else "other"

    @property
    def name(self) -> str:
        """Return the claim's id or the comparison's name."""
        return self.setting.target.partition(":")[2]

    @property
    def params(self) -> dict[str, Any]:
        """Return what distinguishes it from other runs of the same target."""
        return dict(json.loads(self.setting.params))

    @property
    def quick(self) -> bool:
        """Return whether it is a rehearsal."""
        return bool(self.params.get("quick"))

    @property
    def as_claimed(self) -> bool:
        """Return whether it is a claim in full, on the data it was set up for."""
        return self.kind == "claim" and not self.params

    @property
    def started(self) -> str:
        """Return when its last job began, ISO 8601 in UTC."""
        return max(record.started for record in self.headers.values())

    @property
    def seeds(self) -> list[int]:
        """Return the seeds."""
        return sorted({record.job.seed for record in self.headers.values()})

    @property
    def failed(self) -> int:
        """Return how many jobs did not end well."""
        return sum(record.status is not Status.DONE for record in self.headers.values())

    @property
    def seconds(self) -> float:
        """Return what all its jobs took together."""
        return sum(record.cost.get("seconds", 0.0) for record in self.headers.values())


class Library:
    """Read a store and a folder of reports, and follow both as they grow. Threads may share one.

    Args:
        store: The store.
        reports: The folder audits and landscapes are written to, or None.

    Examples:
        >>> import tempfile
        >>> from nervure.spec import Job, Record, Status
        >>> with tempfile.TemporaryDirectory() as folder, Store.open(f"{folder}/store.db") as store:
        ...     job = Job(target="claim:lottery-ticket/winning-ticket", arm="*", case="-", seed=0)
        ...     _ = store.add(Record(job=job, status=Status.DONE, started="2026-01-01T00:00:00"))
        ...     [(run.kind, run.name, run.seeds) for run in Library(store).runs()]
        [('claim', 'lottery-ticket/winning-ticket', [0])]
    """

    def __init__(self, store: Store, *, reports: Path | None = None) -> None:
        self._store, self._reports = store, reports
        self._lock = threading.Lock()
        self._runs: dict[Setting, Run] = {}
        self._last = self._count = 0
        self._verdicts: dict[str, tuple[int, Verdict]] = {}

    @property
    def store(self) -> Store:
        """Return the store."""
        return self._store

    def refresh(self) -> int:
        """Take in what was written since the last look.

        Returns:
            How many records there are: a number that grows when anything changes.
        """
        with self._lock:
            for number, record in self._store.headers(after=self._last):
                self._last, self._count = number, self._count + 1
                self._take(record)
            return self._count

    def _take(self, record: Record) -> None:
        setting = Setting.of(record.job)
        run = self._runs.get(setting, Run(setting))
        before = run.headers.get(record.job.id)
        if before is None or before.status is not Status.DONE or record.status is Status.DONE:
            # A new object, so that a reader of the old one never sees it change.
            self._runs[setting] = dataclasses.replace(run, headers={**run.headers, record.job.id: record})

    def runs(self) -> list[Run]:
        """Return all runs, the newest first."""
        self.refresh()
        return sorted(self._known(), key=lambda run: run.started, reverse=True)

    def _known(self) -> list[Run]:
        with self._lock:
            return list(self._runs.values())

    def run(self, name: str) -> Run:
        """Return a run by its id.

        Args:
            name: As in `Run.id`.

        Returns:
            The run.

        Raises:
            UnknownId: If the store has none of that id.
        """
        for run in self.runs():
            if run.id == name:
                return run
        raise UnknownId(f"the store has no run {name!r}", try_="the list of runs")

    def latest(self, target: str) -> Run:
        """Return the run of a target that was measured last.

        Args:
            target: As in a job.

        Returns:
            The run.

        Raises:
            UnknownId: If the store has none.
        """
        for run in self.runs():
            if run.setting.target == target:
                return run
        raise UnknownId(f"the store has no record of {target.partition(':')[2]}")

    def records(self, run: Run) -> list[Record]:
        """Return a run's records with their measurements, one a job."""
        found = newest(self._store.records(job_ids=run.headers))
        return sorted(found, key=lambda record: (record.started, record.job.seed))

    def verdict(self, run: Run) -> Verdict:
        """Judge a claim's run by what is stored now.

        Args:
            run: A run of kind ``"claim"``.

        Returns:
            The verdict.
        """
        known = self._verdicts.get(run.id)
        if known is None or known[0] != len(run.headers):
            known = len(run.headers), verdict(find_claim(run.name), self.records(run), quick=run.quick)
            self._verdicts[run.id] = known
        return known[1]

    def board(self, run: Run) -> Board:
        """Return the leaderboards of a comparison's run.

        Args:
            run: A run of kind ``"comparison"``.

        Returns:
            The leaderboards.
        """
        if run.name == prune.NAME:
            return prune_board(self.records(run))
        return contest_board(contest(run.name), self.records(run))

    def outcomes(self, entry: Entry) -> dict[str, str]:
        """Return what the claims of a paper came to here, in full and on their own data.

        Args:
            entry: The paper.

        Returns:
            Claim's name -> outcome.
        """
        found: dict[str, str] = {}
        names = {f"claim:{entry.id}/{claim['name']}": claim["name"] for claim in entry.claims}
        for run in self._known():
            if run.setting.target in names and run.as_claimed:
                found[names[run.setting.target]] = str(self.verdict(run).outcome)
        return found

    def papers(self, *, query: str = "", family: str | None = None, limit: int | None = None) -> list[Paper]:
        """Return the papers that feeds told of, the best first.

        Args:
            query: Words that must all be in a paper; each may end anywhere.
            family: Only those of this family.
            limit: How many at most.

        Returns:
            The papers.
        """
        return self._store.papers.ranked(limit=limit, family=family, keep=lambda paper: matches(query, paper))

    def pages(self, kind: Literal["audit", "landscape"]) -> list[str]:
        """Return the names of the audits or landscapes in the report folder, the newest first.

        Args:
            kind: What to look for.

        Returns:
            Stems of their files.
        """
        if self._reports is None or not self._reports.is_dir():
            return []
        files = [one for one in self._reports.glob(f"{kind}-*.json") if _PAGE_NAME.match(one.stem) and one.is_file()]
        return [one.stem for one in sorted(files, key=lambda one: one.stat().st_mtime, reverse=True)]

    def page(self, name: str) -> Mapping[str, Any]:
        """Return the values of an audit or landscape.

        Args:
            name: One of `pages`.

        Returns:
            What its JSON file holds.

        Raises:
            UnknownId: If there is no such file, or it cannot be read.
        """
        kind: Literal["audit", "landscape"] = "audit" if name.startswith("audit-") else "landscape"
        if self._reports is None or name not in self.pages(kind):
            raise UnknownId(f"the report folder has no {name!r}", try_=f"the list of {kind}s")
        try:
            return dict(json.loads((self._reports / f"{name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UnknownId(f"{name}.json cannot be read", found=str(error)) from error


def repeat(run: Run, board: Board | None = None) -> str:
    """Return the command that repeats a run.

    Args:
        run: The run.
        board: Its leaderboards, for a comparison.

    Returns:
        One line for a shell.
    """
    if board is not None:
        return board.command
    from nervure.app.claims import repeat as repeat_claim

    jobs: Sequence[Job] = [record.job for record in run.headers.values()]
    return repeat_claim(run.name, jobs, quick=run.quick, data=run.params.get("data"), until_decided=False)
