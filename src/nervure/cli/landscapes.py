"""landscape: the loss around a network, between networks, or along a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from nervure.cli.display import number, progress

Json = Annotated[bool, Parameter(name="--json", negative="")]


def landscape(
    model: str,
    *,
    data: str,
    to: Annotated[list[str] | None, Parameter(negative="")] = None,
    path: Path | None = None,
    train: int = 0,
    rate: float = 1e-3,
    points: int = 21,
    extent: float = 1.0,
    samples: int = 512,
    statistics: Literal["kept", "recomputed"] = "recomputed",
    seed: int = 0,
    report: Path = Path("reports"),
    as_json: Json = False,
) -> int:
    """Draw the loss around your network, between networks, or along a training run.

    Args:
        model: path.py:factory of your network, or a zoo model.
        data: digits, fashion-mnist, wine, breast-cancer, an .npz, a .csv, a folder of images, or path.py:factory.
        to: path.py:factory of another network: one gives the line, two the plane through the three.
        path: Folder of checkpoints, drawn on the plane of their main directions.
        train: Optimizer steps to train the network first; the run is drawn on its plane.
        rate: Learning rate of Adam for that.
        points: Points along each axis.
        extent: How far to look, in units of the filters' own lengths.
        samples: Training samples the loss is measured on.
        statistics: Whether batch norms keep their statistics or estimate them anew.
        seed: Decides everything random.
        report: Folder for the report.
        as_json: Print JSON and nothing else.

    Returns:
        0.
    """
    from nervure import app

    with progress("landscape", silent=as_json) as on_event:
        found = app.landscape(
            model,
            data=data,
            to=to or (),
            path=path,
            train=train,
            rate=rate,
            points=points,
            extent=extent,
            samples=samples,
            statistics=statistics,
            seed=seed,
            report=report,
            on_event=on_event,
        )
    if as_json:
        print(found.files[0].read_text(encoding="utf-8"))
        return 0
    losses = found.surface.losses
    finite = losses[losses.isfinite()]
    print(
        f"loss from {number(float(finite.min()))} to {number(float(finite.max()))} on {found.samples} samples, "
        f"standard error {number(found.error)}"
    )
    barrier = getattr(found.surface, "barrier", None)
    if barrier is not None:
        print(f"barrier between the networks: {number(barrier)}")
    print(found.files[-1])
    return 0
