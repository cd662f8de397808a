"""audit: what is the state of my network, and which methods would help?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from nervure.cli.display import progress

if TYPE_CHECKING:
    from nervure.audit import Finding

Json = Annotated[bool, Parameter(name="--json", negative="")]
Level = Literal["note", "warning", "problem"]
_COLOURS = {"problem": "bold red", "warning": "yellow", "note": "blue", "ok": "green", "cannot tell": "dim"}


def audit(
    model: str,
    *,
    data: str | None = None,
    rate: float | None = None,
    train: int = 0,
    budget: float = 100.0,
    only: Annotated[list[str] | None, Parameter(negative="")] = None,
    against: str | None = None,
    fail_on: Level = "problem",
    report: Path = Path("reports"),
    seed: int = 0,
    as_json: Json = False,
) -> int:
    """Examine your network: what was measured, what it means, and which method would help.

    Args:
        model: path.py:factory of your trained network, or a zoo model (then give --train).
        data: digits, fashion-mnist, wine, breast-cancer, an .npz, a .csv, a folder of images, or path.py:factory.
            Without it only the weights are looked at.
        rate: The learning rate your network is trained with, to compare with the curvature.
        train: Optimizer steps to train the network first.
        budget: Seconds for all checks; samples are as many as that pays for.
        only: Make these checks alone.
        against: path.py:factory of another network: answers, layers and the line between the two.
        fail_on: Exit with 1 on findings of this level or worse.
        report: Folder for the report.
        seed: Decides everything random.
        as_json: Print JSON and nothing else.

    Returns:
        0, or 1 on findings of the level to fail on or worse.
    """
    from nervure import app

    with progress("audit", silent=as_json) as on_event:
        found = app.audit(
            model,
            data=data,
            rate=rate,
            train=train,
            budget=budget,
            only=only or (),
            against=against,
            seed=seed,
            report=report,
            on_event=on_event,
        )
    code = 1 if found.audit.at_least(fail_on) else 0
    if as_json:
        print(json.dumps({**found.audit.to_json(), "files": [str(path) for path in found.files]}))
        return code
    console = Console()
    for finding in found.audit.findings:
        _show(console, finding)
    for note in found.audit.notes:
        console.print(note, markup=False, highlight=False)
    print(found.files[-1])
    return code


def _show(console: Console, finding: Finding) -> None:
    said = f"  {finding.meaning}" if finding.level == "ok" else ""
    console.print(Text.assemble((f"{finding.level:>11}  ", _COLOURS[finding.level]), (finding.check, "bold"), said))
    if finding.level == "ok":
        return
    lines = [finding.meaning, finding.measured]
    if finding.remedy is not None:
        lines += [finding.remedy.advice, f"$ {finding.remedy.command}" if finding.remedy.command else ""]
    text = Text("\n".join(line for line in lines if line))
    console.print(Padding(text, (0, 0, 0, 13)))
