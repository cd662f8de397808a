"""Plots as SVG text, in one visual language for pages, reports and docs."""

from nervure.report.plots.boards import cases_plot, cost_plot, kept_plot, share_plot, time_plot
from nervure.report.plots.claims import arms_plot, checks_plot, curves_plot
from nervure.report.plots.networks import landscape_plot, layers_plot
from nervure.report.plots.style import svg

__all__ = [
    "arms_plot",
    "cases_plot",
    "checks_plot",
    "cost_plot",
    "curves_plot",
    "kept_plot",
    "landscape_plot",
    "layers_plot",
    "share_plot",
    "svg",
    "time_plot",
]
