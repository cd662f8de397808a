"""Every page as a function of the library: the same HTML for the server and for a folder of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nervure._kit import UsageError, seconds_text
from nervure.app.library import Library, Run, repeat
from nervure.arena.contest import CONTESTS
from nervure.audit import Audit
from nervure.catalogue import Entry, entries, get, nearest, published, search
from nervure.report import board_parts, environment_of, verdict_parts
from nervure.report.audit_page import counts, layer_plots
from nervure.report.export import templates
from nervure.report.landscape_page import landscape_told
from nervure.report.plots import landscape_plot
from nervure.spec import FAMILIES, Verdict
from nervure.web.links import Links

STATES = ("works", "partly", "not yet")
OUTCOMES = ("holds", "does not hold", "inconclusive", "void")
SHOWN_RUNS = 500
SHOWN_PAPERS = 200


@dataclass(frozen=True)
class Row:
    """Hold one paper of the catalogue as the list shows it.

    Args:
        entry: The paper.
        state: ``"works"``; ``"partly"`` where a claim was not measured in full yet; ``"not yet"``.
        ours: Claim -> what its makers' full run came to.
        here: Claim -> what it came to in this store, in full and on its own data.
    """

    entry: Entry
    state: str
    ours: Mapping[str, str]
    here: Mapping[str, str]

    @property
    def outcomes(self) -> set[str]:
        """Return every outcome a claim of it had, here or with us."""
        return {*self.ours.values(), *self.here.values()}

    @property
    def text(self) -> str:
        """Return the words it is found by."""
        card = self.entry.card
        return " ".join([card["title"], card["id"], card["summary"], *card["tags"], *card["provides"]]).lower()


class Pages:
    """Render pages.

    Args:
        library: What there is to show.
        links: Where the pages lie.
        secret: Token that forms carry, so that no other site can send them; empty where there are no forms.
    """

    def __init__(self, library: Library, *, links: Links | None = None, secret: str = "") -> None:
        self.library, self.links, self._secret = library, links or Links(), secret

    def render(self, template: str, **values: Any) -> str:
        """Return a page.

        Args:
            template: The template's file.
            **values: What it names.

        Returns:
            HTML.
        """
        shared = {"links": self.links, "secret": self._secret, "seconds_text": seconds_text}
        return templates("nervure.web").get_template(template).render(**shared, **values)

    def catalogue(self, *, query: str = "", family: str = "", state: str = "", outcome: str = "") -> str:
        """Return the list of papers.

        Args:
            query: Words to search for.
            family: Only this family.
            state: Only papers of this state.
            outcome: Only papers with a claim that came to this.

        Returns:
            HTML.

        Raises:
            UsageError: If a filter has no such value.
        """
        for given, known in ((family, FAMILIES), (state, STATES), (outcome, OUTCOMES)):
            if given and given not in known:
                raise UsageError("there is no such filter", expected=", ".join(known), found=given[:60])
        self.library.refresh()
        found = search(query[:400], limit=len(entries())) if query.strip() else list(entries().values())
        rows = [self._row(entry) for entry in found]
        shown = [
            row
            for row in rows
            if family in ("", row.entry.card["family"])
            and state in ("", row.state)
            and (not outcome or outcome in row.outcomes)
        ]
        return self.render(
            "catalogue.html",
            title="Papers",
            rows=shown,
            total=len(entries()),
            runnable=sum(entry.runnable for entry in entries().values()),
            given={"q": query, "family": family, "state": state, "outcome": outcome},
            choices={"family": FAMILIES, "state": STATES, "outcome": OUTCOMES},
        )

    def _row(self, entry: Entry) -> Row:
        ours = {
            claim["name"]: published()[f"{entry.id}/{claim['name']}"]["verdict"]["outcome"]
            for claim in entry.claims
            if f"{entry.id}/{claim['name']}" in published()
        }
        state = "not yet" if not entry.runnable else "works" if len(ours) == len(entry.claims) else "partly"
        return Row(entry, state, ours, self.library.outcomes(entry))

    def paper(self, name: str) -> str:
        """Return the page of a paper.

        Args:
            name: Its id.

        Returns:
            HTML.
        """
        entry = get(name)
        runs = [run for run in self.library.runs() if run.kind == "claim" and run.name.startswith(f"{entry.id}/")]
        claims = []
        for claim in entry.claims:
            claim_id = f"{entry.id}/{claim['name']}"
            ours = published().get(claim_id)
            told = Verdict.from_json(ours["verdict"]) if ours is not None else None
            mine = next((run for run in runs if run.name == claim_id and run.as_claimed), None)
            here = self.library.verdict(mine) if mine is not None else None
            shown = here or told
            plot = verdict_parts(shown, [])["plots"]["checks"] if shown is not None else ""
            measured = {"ours": ours, "told": told, "run": mine, "here": here, "shown": shown, "plot": plot}
            claims.append({"id": claim_id, **claim, **measured})
        words = f"{entry.card['title']} {entry.card['summary']} {' '.join(entry.card['tags'])}"
        return self.render(
            "paper.html",
            title=entry.card["title"],
            entry=entry,
            card=entry.card,
            row=self._row(entry),
            claims=claims,
            runs=runs,
            package=".".join(str(entry.module).split(".")[:2]),
            related=[other for other, _ in nearest(words, limit=7) if other.id != entry.id][:6],
        )

    def runs(self) -> str:
        """Return the list of runs."""
        runs = self.library.runs()
        verdicts = {run.id: self.library.verdict(run) for run in runs[:SHOWN_RUNS] if run.kind == "claim"}
        return self.render(
            "runs.html",
            title="Runs",
            runs=runs[:SHOWN_RUNS],
            total=len(runs),
            verdicts=verdicts,
            contests=list(CONTESTS),
        )

    def run(self, name: str) -> str:
        """Return the page of a run.

        Args:
            name: Its id.

        Returns:
            HTML.
        """
        run = self.library.run(name)
        return self.render("run.html", **self._run(run), part=False)

    def run_part(self, name: str) -> str:
        """Return what changes on a run's page while it is running.

        Args:
            name: Its id.

        Returns:
            HTML without head and navigation.
        """
        return self.render("run_part.html", **self._run(self.library.run(name)))

    def _run(self, run: Run) -> dict[str, Any]:
        records = self.library.records(run)
        values: dict[str, Any] = {"title": run.name, "run": run, "verdict": None, "board": None}
        if run.kind == "claim":
            found = self.library.verdict(run)
            values |= {"verdict": found, "card": get(run.name.split("/")[0]).card, "command": repeat(run)}
            values |= verdict_parts(found, records)
        elif run.kind == "comparison":
            board = self.library.board(run)
            values |= {"board": board, "title": board.title, "command": repeat(run, board), **board_parts(board)}
        return values | {"records": records, "environment": environment_of(records)}

    def leaderboards(self) -> str:
        """Return the list of comparisons."""
        runs = [run for run in self.library.runs() if run.kind == "comparison"]
        boards = [(run, self.library.board(run)) for run in runs[:SHOWN_RUNS]]
        return self.render("leaderboards.html", title="Leaderboards", boards=boards, contests=list(CONTESTS))

    def audits(self) -> str:
        """Return the list of audits and landscapes."""
        found = [(name, Audit.from_json(self.library.page(name))) for name in self.library.pages("audit")]
        return self.render(
            "audits.html",
            title="Networks",
            audits=[(name, audit, counts(audit)) for name, audit in found],
            landscapes=[(name, self.library.page(name)) for name in self.library.pages("landscape")],
        )

    def network(self, name: str) -> str:
        """Return the page of an audit or landscape.

        Args:
            name: Stem of its file.

        Returns:
            HTML.
        """
        values = self.library.page(name)
        shared = {"name": name, "command": values.get("command", ""), "environment": values.get("environment", {})}
        if name.startswith("landscape-"):
            surface = {key: values[key] for key in ("x", "y", "losses")} if values.get("kind") == "plane" else {}
            shown = {
                "values": values,
                "surface": surface,
                "plot": landscape_plot(values),
                "told": landscape_told(values),
            }
            return self.render("landscape.html", title="Landscape", **shown, **shared)
        audit = Audit.from_json(values)
        drawn = layer_plots(audit)
        title = f"Audit of {audit.model}"
        return self.render("audit_page.html", title=title, audit=audit, counts=counts(audit), plots=drawn, **shared)

    def feed(self, *, query: str = "", family: str = "") -> str:
        """Return the papers that public feeds told of, the best first.

        Args:
            query: Words that must all be in a paper.
            family: Only this family.

        Returns:
            HTML.

        Raises:
            UsageError: If there is no such family.
        """
        if family and family not in FAMILIES:
            raise UsageError("there is no such family", expected=", ".join(FAMILIES), found=family[:60])
        papers = self.library.papers(query=query[:200], family=family or None, limit=SHOWN_PAPERS)
        return self.render(
            "feed.html", title="Feed", papers=papers, given={"q": query, "family": family}, families=FAMILIES
        )

    def side(self, names: Sequence[str]) -> str:
        """Return two runs, or two audits, side by side.

        Args:
            names: Two ids of runs, or two names of audits.

        Returns:
            HTML.

        Raises:
            UsageError: If there are not two of one kind.
        """
        if len(names) != 2:
            raise UsageError("two are laid side by side", expected="two ticks", found=len(names))
        if all(name.startswith("audit-") for name in names):
            left, right = (Audit.from_json(self.library.page(name)) for name in names)
            found = [{one.check: one for one in audit.findings} for audit in (left, right)]
            checks = list(dict.fromkeys([*found[0], *found[1]]))
            return self.render(
                "side_audits.html", title="Two networks", audits=(left, right), found=found, checks=checks
            )
        runs = [self.library.run(name) for name in names]
        pages = [self._run(run) for run in runs]
        if any(page["verdict"] is None for page in pages):
            raise UsageError("two runs of claims are laid side by side", found=" and ".join(run.name for run in runs))
        metrics = _metrics(pages)
        return self.render("side.html", title="Two runs", pages=pages, metrics=metrics)

    def problem(self, what: str, *, advice: str = "") -> str:
        """Return the page of an error.

        Args:
            what: What went wrong.
            advice: What to do.

        Returns:
            HTML.
        """
        return self.render("problem.html", title="That did not work", what=what, advice=advice)


def _metrics(pages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return (arm, metric) with the means of both runs, those both have first."""
    tables = [{(row.arm, row.metric): row for row in page["rows"]} for page in pages]
    keys = sorted({**tables[0], **tables[1]}, key=lambda key: not all(key in table for table in tables))
    return [{"arm": arm, "metric": metric, "rows": [t.get((arm, metric)) for t in tables]} for arm, metric in keys]
