import itertools
import math
import re

import numpy as np
import pytest

from nervure.report.plots import cases_plot, checks_plot, cost_plot, curves_plot, landscape_plot, layers_plot, time_plot
from nervure.report.plots.style import COLOURS, Label, figure, name_lines, spread, svg
from nervure.report.tables import CaseTable
from nervure.spec import Check, CheckResult, Job, Measurement, Outcome, Record, Status, Verdict

# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as seen without one kind of cone.
BLINDNESS = {
    "no": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
PAPERS = ("#fdfdfb", "#141816")  # as in style.css


def linear(colour):
    parts = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    scaled = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def luminance(colour):
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_are_told_apart_with_any_colour_vision(kind):
    seen = [lab(np.array(BLINDNESS[kind]) @ linear(colour)) for colour in COLOURS]
    distances = {
        (COLOURS[a], COLOURS[b]): float(np.linalg.norm(seen[a] - seen[b]))
        for a, b in itertools.combinations(range(len(COLOURS)), 2)
    }
    assert min(distances.values()) > 20, min(distances, key=distances.get)


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_on_light_and_dark(colour):
    for paper in PAPERS:
        dark, light = sorted((luminance(colour), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 3


def test_ink_is_the_pages_and_a_figure_is_always_the_same_text():
    def draw():
        drawn = figure(2, 1)
        ax = drawn.subplots()
        ax.plot([0, 1], [0, 1], color="#000000")
        ax.text(0.5, 0.5, "black for good", color="#010101")
        ax.set_xlabel("steps")
        return svg(drawn)

    text = draw()
    assert text == draw()
    assert text.startswith('<svg fill="currentColor"')
    assert "#000000" not in text
    assert "#010101" in text
    assert "fill: #ffffff" not in text  # no white paper under it


def test_names_are_moved_apart_and_keep_their_order():
    found = spread([0.1, 0.11, 0.12, 0.9], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(found))
    assert math.isclose(sum(found[:3]) / 3, 0.11)
    assert found[3] == 0.9
    drawn = figure(3, 2)
    ax = drawn.subplots()
    ax.plot([0, 1], [1, 1])
    name_lines(
        ax, [Label(1, 1, "one", "#0072B2"), Label(1, 1, "two", "#D55E00"), Label(1, math.nan, "gone", "#808080")]
    )
    assert re.findall(r"<!-- (one|two|gone) -->", svg(drawn)) == ["one", "two"]


def record(seed):
    points = [Measurement(arm="ours", metric="loss", value=1 / (step + 1) + seed, step=step) for step in range(3)]
    job = Job(target="claim:a/b", arm="*", case="-", seed=seed)
    return Record(job=job, status=Status.DONE, measurements=tuple(points))


def test_every_plot_says_its_intervals_and_units():
    check = CheckResult(
        check=Check(name="better", method="ours", metric="loss"), outcome=Outcome.HOLDS, n=2, mean=0.2, low=0.1,
        high=0.3, differences={0: 0.1, 1: 0.3},
    )  # fmt: skip
    verdict = Verdict(claim_id="a/b", statement="", outcome=Outcome.HOLDS, checks=(check,))
    assert "<!-- better (loss, at least 0): holds -->" in checks_plot(verdict)
    curves = curves_plot([record(0), record(1)], "loss")
    assert "<!-- loss, mean and 95% interval -->" in curves
    assert "<!-- ours -->" in curves
    means = {"ours": {"accuracy": 0.9, "ms_64": 2.0, "nonzero_macs": 10.0}}
    ends = {"ours": {"accuracy": (0.8, 1.0), "ms_64": (1.5, 2.5)}}
    table = CaseTable("one", "", math.nan, [], {}, {}, [], means, "ours", ends)
    assert "<!-- measured ms, batch 64, 95% interval -->" in cost_plot([table], "accuracy")
    assert "<!-- measured ms, batch 64, 95% interval -->" in time_plot([table])
    assert "<!-- accuracy, 95% interval -->" in cases_plot([table], "accuracy")
    assert cost_plot([], "accuracy") == ""
    assert "<!-- share -->" in layers_plot({"a": 1.0, "b": math.nan}, "share")


def test_a_line_between_networks_has_the_samples_error():
    values = {
        "kind": "line",
        "shares": [0.0, 0.5, 1.0],
        "losses": [1.0, 2.0, None],
        "error": 0.1,
        "networks": ["a", "b"],
    }
    assert "<!-- mean loss, 95% interval of the samples -->" in landscape_plot(values)


def test_a_verdict_without_numbers_is_still_a_plot():
    assert checks_plot(Verdict(claim_id="a/b", statement="", outcome=Outcome.INCONCLUSIVE, checks=())).startswith(
        "<svg"
    )
