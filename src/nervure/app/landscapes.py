"""Draw the loss around a network, between networks, or along a training run."""

from __future__ import annotations

import copy
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from nervure._kit import BadModel, UsageError
from nervure.app.jobs import OnEvent
from nervure.arena import prune as arena
from nervure.arena.tasks import PruneTask
from nervure.core.connectivity import Line, line
from nervure.core.forward import mode, outputs
from nervure.core.landscape import Frame, Plane, plane, plane_through, principal_plane, random_plane
from nervure.core.line_curvature import mean_loss
from nervure.core.persample import sample_losses
from nervure.learn.loop import cross_entropy
from nervure.report.landscape_page import landscape_files
from nervure.run import Event
from nervure.run.attempt import environment

Statistics = Literal["kept", "recomputed"]
STOPS = 20


@dataclass(frozen=True)
class Landscape:
    """Hold what was measured.

    Args:
        surface: The losses on a plane, or on a line.
        path: (x, y, distance) of the networks of a training run on the plane, in order.
        error: Standard error of the loss at the network itself, over the samples.
        samples: How many samples the loss is of.
        files: The report's files: JSON, CSV, HTML.
    """

    surface: Plane | Line
    path: tuple[tuple[float, float, float], ...]
    error: float
    samples: int
    files: list[Path]


def landscape(
    model: str,
    *,
    data: str,
    to: Sequence[str] = (),
    path: str | Path | None = None,
    train: int = 0,
    rate: float = 1e-3,
    points: int = 21,
    extent: float = 1.0,
    samples: int = 512,
    statistics: Statistics = "recomputed",
    seed: int = 0,
    report: str | Path = "reports",
    on_event: OnEvent = lambda event: None,
) -> Landscape:
    """Measure the loss on a line or plane and write it.

    With a training run (`path`, or `train` on a fresh network) the plane is that of its two main directions; with one
    other network it is the line, with two the plane through the three; otherwise two random filter-normalised
    directions.

    Args:
        model: ``path.py:factory`` of a network, or a zoo model.
        data: As in `nervure.data.load`.
        to: Factories of one or two other networks of the same shape.
        path: A folder of checkpoints, .safetensors or .pt, in the order of their names.
        train: Optimizer steps to train the network first.
        rate: Learning rate of Adam for that.
        points: Points along each axis, at least 3.
        extent: Largest coordinate of a random plane, in units of the filters' own lengths; the margin around a path.
        samples: Training samples the loss is measured on.
        statistics: Whether batch norms keep their statistics off the networks or estimate them anew.
        seed: Decides everything random.
        report: Folder for the report.
        on_event: Called with progress.

    Returns:
        The landscape and its files.

    Raises:
        UsageError: If an argument is out of range or two kinds of plane are asked for.
    """
    if points < 3 or extent <= 0 or samples < 2 or train < 0 or rate <= 0 or len(to) > 2 or (to and path is not None):
        raise UsageError(
            "there is no such landscape",
            expected="points >= 3, extent > 0, samples >= 2, train >= 0, rate > 0, and either at most two --to or "
            "--path",
            found=f"{points=}, {extent=}, {samples=}, {train=}, {rate=}, {len(to)} networks, {path=}",
        )
    splits = arena.load_data(data, seed=seed)
    network = arena.build(model, splits, seed=seed)
    arena.check(network, splits, name=model)
    run = _trained(network, splits, steps=train, rate=rate, seed=seed)
    if path is not None:
        run = _checkpoints(Path(path), network)
    others = [arena.build(other, splits, seed=seed) for other in to]
    batch = (splits.train_x[:samples], splits.train_y[:samples])
    measure = mean_loss([batch], cross_entropy)
    tick = _progress(on_event)
    given = [batch[0]]
    surface: Plane | Line
    if len(others) == 1:
        places = [round(-0.5 + 2 * n / (points - 1), 10) for n in range(points)]
        shares = sorted({*places, 0.0, 1.0})
        surface = line(network, others[0], measure, shares=shares, statistics=statistics, batches=given)
        walked: tuple[Any, ...] = ()
    else:
        frame, marked, extents = _frame(network, others, run, extent, seed)
        surface = plane(
            frame, measure, extent=extents, points=points, networks=marked, statistics=statistics, batches=given,
            progress=tick,
        )  # fmt: skip
        walked = surface.networks
    error = _error(run[-1] if run else network, batch)
    words = ["nervure", "landscape", model, "--data", data, *(w for other in to for w in ("--to", other))]
    words += ["--path", str(path)] if path is not None else []
    words += ["--train", str(train), "--rate", f"{rate:g}"] if train else []
    words += ["--points", str(points), "--extent", f"{extent:g}", "--samples", str(len(batch[1])), "--seed", str(seed)]
    files = landscape_files(
        surface,
        Path(report),
        name=model,
        path=walked,
        error=error,
        samples=len(batch[1]),
        names=[model, *to],
        command=shlex.join([*words, "--statistics", statistics]),
        environment=environment(),
    )
    return Landscape(surface, walked, error, len(batch[1]), files)


def _frame(
    network: nn.Module, others: Sequence[nn.Module], run: Sequence[nn.Module], extent: float, seed: int
) -> tuple[Frame, Sequence[nn.Module], float | tuple[float, float, float, float]]:
    """Return the plane, the networks to mark on it, and how far it is looked at."""
    if others:
        frame, marked = plane_through(network, *others), [network, *others]
    elif len(run) >= 3:
        frame, marked = principal_plane(run), list(run)
    else:
        return random_plane(network, seed=seed), [network], extent
    places = [frame.coordinates(one)[:2] for one in marked]
    sides = []
    for axis in (0, 1):
        low, high = min(place[axis] for place in places), max(place[axis] for place in places)
        margin = 0.25 * extent * max(high - low, 1e-6)
        sides += [low - margin, high + margin]
    return frame, marked, (sides[0], sides[1], sides[2], sides[3])


def _trained(network: nn.Module, splits: Any, *, steps: int, rate: float, seed: int) -> list[nn.Module]:
    """Train in place and return copies of the network at about twenty steps on the way, first and last included."""
    if not steps:
        return []
    run, done = [copy.deepcopy(network)], 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done % max(1, steps // STOPS) == 0 or done == steps:
            run.append(copy.deepcopy(network))

    PruneTask(splits, rate=rate, seed=seed, tick=tick).train(network, steps=steps)
    return [*run[:-1], copy.deepcopy(network)]


def _checkpoints(folder: Path, like: nn.Module) -> list[nn.Module]:
    files = sorted(one for one in folder.glob("*") if one.suffix in (".safetensors", ".pt", ".pth"))
    if len(files) < 3:
        expected = "a folder of three or more .safetensors, .pt or .pth files"
        raise UsageError(f"{folder} holds no training run", expected=expected, found=len(files))
    return [_filled(file, copy.deepcopy(like)) for file in files]


def _filled(file: Path, model: nn.Module) -> nn.Module:
    try:
        if file.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model", "model_state_dict"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        model.load_state_dict(state)
    except Exception as error:  # a foreign file may fail in any way, and the error says which and how
        told = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise BadModel(f"{file} does not fit the network", expected="its state_dict", found=told) from error
    return model


def _progress(on_event: OnEvent) -> Callable[[int, int], None]:
    began = time.monotonic()

    def tick(done: int, total: int) -> None:
        left = (time.monotonic() - began) / done * (total - done)
        on_event(Event(kind="progress", share=done / total, seconds_left=left))

    return tick


def _error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Return the standard error of the mean loss over the samples."""
    with torch.no_grad(), mode(model, train=False):
        losses = sample_losses(cross_entropy, outputs(model, batch[0]), batch[1])
    return float(losses.double().std() / len(losses) ** 0.5)
