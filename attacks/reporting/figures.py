"""The attack report's figures as ``<svg>`` elements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedFormatter, FixedLocator

from privtrain.files.svg import DASHED, MUTED, figure_style, finished, new_figure

HELD_IN_COLOR = "#b4532a"
HELD_OUT_COLOR = "#2b6a99"
CAP_COLOR = "#3d7a4e"
_SERIES_COLORS = (HELD_IN_COLOR, HELD_OUT_COLOR, CAP_COLOR, "#7a5c99", MUTED)


def roc_figure(result: Mapping[str, Any], claim: str | None) -> str:
    """Return the ROC on log-log axes with its confidence band, the line of guessing and what the claim allows.

    Args:
        result: an entry of ``results`` in ``attacks.json`` that has a ``roc``.
        claim: the guarantee in words, for the legend; None if it allows everything.
    """
    roc, counts = result["roc"], result["tpr_at_fpr"][0]
    num_held_in, num_held_out = counts["num_held_in"], counts["num_held_out"]
    # Log axes have no zero: the left and the lower edge stand for it, half a user below the first count.
    left, bottom = 0.5 / num_held_out, 0.5 / num_held_in
    fpr = [max(left, num_allowed / num_held_out) for num_allowed in roc["num_false_positives_allowed"]]
    with figure_style():
        figure, axes = new_figure()
        axes.fill_between(
            [*fpr, 1.0],
            [max(bottom, value) for value in [*roc["band_lower"], 1.0]],
            [max(bottom, value) for value in [*roc["band_upper"], 1.0]],
            step="post",
            color=HELD_IN_COLOR,
            alpha=0.16,
            linewidth=0.0,
            label="95 % band (pointwise)",
        )
        chance = [max(left, bottom), 1.0]
        axes.plot(chance, chance, color=MUTED, linewidth=1.0, linestyle=DASHED, label="guessing")
        if claim is not None and roc["tpr_cap"] is not None:
            allowed = [max(bottom, value) for value in [*roc["tpr_cap"], 1.0]]
            axes.step([*fpr, 1.0], allowed, where="post", color=CAP_COLOR, linewidth=1.4, label=f"allowed by {claim}")
        axes.step(
            [max(left, value) for value in roc["corners"]["fpr"]],
            [max(bottom, value) for value in roc["corners"]["tpr"]],
            where="post",
            color=HELD_IN_COLOR,
            linewidth=1.7,
            label="user inference",
        )
        axes.set(xscale="log", yscale="log", xlim=(left, 1.0), ylim=(bottom, 1.15))
        for axis, edge, first in ((axes.xaxis, left, 1.0 / num_held_out), (axes.yaxis, bottom, 1.0 / num_held_in)):
            _mark_zero(axis, edge, first)
        axes.set(xlabel="false positive rate (held-out users accused)", ylabel="true positive rate (held-in users)")
        return finished(figure, axes, "roc")


def histogram_figure(result: Mapping[str, Any], axis_label: str) -> str:
    """Return the histogram of a statistic over held-in and over held-out users; ``result`` has a ``histogram``."""
    histogram = result["histogram"]
    with figure_style():
        figure, axes = new_figure()
        for side, color, label in (
            ("held_in", HELD_IN_COLOR, "held-in users (trained on)"),
            ("held_out", HELD_OUT_COLOR, "held-out users"),
        ):
            total = sum(histogram[side])
            shares = [count / total for count in histogram[side]]
            axes.stairs(shares, histogram["edges"], color=color, fill=True, alpha=0.22)
            axes.stairs(shares, histogram["edges"], color=color, linewidth=1.6, label=label)
        axes.set(xlabel=axis_label, ylabel="share of the side's users")
        return finished(figure, axes, "histogram", grid="y")


def dependence_figure(points: Sequence[Mapping[str, Any]], labels: Sequence[str], axis_label: str, name: str) -> str:
    """Return the AUROC with its interval in each of several groups of users, one beside the other.

    Args:
        points: a group each, with ``auroc`` and ``interval``.
        labels: of the groups.
        axis_label: what the groups differ in.
        name: of the figure, for ids within the page.
    """
    with figure_style():
        figure, axes = new_figure(height=3.2)
        places = list(range(len(points)))
        areas = [point["auroc"] for point in points]
        below = [area - point["interval"][0] for area, point in zip(areas, points, strict=True)]
        above = [point["interval"][1] - area for area, point in zip(areas, points, strict=True)]
        axes.axhline(0.5, color=MUTED, linewidth=1.0, linestyle=DASHED, label="guessing")
        axes.errorbar(
            places, areas, yerr=[below, above], fmt="o", color=HELD_IN_COLOR, capsize=3, label="95 % interval"
        )
        axes.set(ylim=(0.0, 1.02), xlim=(-0.5, len(points) - 0.5), xlabel=axis_label, ylabel="AUROC")
        # On two lines, so that neighbours do not run into each other.
        axes.set_xticks(places, [label.replace(" to ", "\nto ") for label in labels])
        return finished(figure, axes, name, grid="y")


def sensitive_figure(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return bars of the mean negative log-likelihood: groups by kind of token and split, a bar for each model.

    ``cells`` are those of the panel of sensitive tokens, with ``tokens``, ``split``, ``model`` and ``nll``.
    """
    with figure_style():
        figure, axes = new_figure(height=3.4)
        groups = list(dict.fromkeys((cell["tokens"], cell["split"]) for cell in cells))
        for number, (model, color) in enumerate((("base", HELD_OUT_COLOR), ("tuned", HELD_IN_COLOR))):
            values = {(cell["tokens"], cell["split"]): cell["nll"] for cell in cells if cell["model"] == model}
            places = [place + 0.36 * (number - 0.5) for place in range(len(groups))]
            _bars(axes, places, [values[group] for group in groups], width=0.34, color=color, label=model)
        axes.set_xticks(range(len(groups)), [f"{tokens}\n{split}" for tokens, split in groups])
        axes.set(ylabel="nats per token")
        return finished(figure, axes, "sensitive", grid="y")


def _bars(
    axes: Axes, places: Sequence[float], heights: Sequence[float | None], *, width: float, color: str, label: str
) -> None:
    """Draw bars; a height of None is labelled "none", since a bar of height 0 would claim a measurement."""
    known = [0.0 if height is None else height for height in heights]
    axes.bar(places, known, width=width, color=color, alpha=0.75, label=label)
    for place, height in zip(places, heights, strict=True):
        if height is None:
            axes.annotate("none", (place, 0.0), ha="center", va="bottom", rotation=90, fontsize=7, color=MUTED)


def panel_figure(figure_facts: Mapping[str, Any], name: str) -> str:
    """Return the figure of a panel (:mod:`attacks.reporting.panels`): lines or bars."""
    series = figure_facts["series"]
    with figure_style():
        figure, axes = new_figure(height=3.4)
        for number, (item, color) in enumerate(zip(series, itertools.cycle(_SERIES_COLORS), strict=False)):
            if figure_facts["kind"] == "bar":
                width = 0.76 / len(series)  # of 1 between groups, so that groups stay apart
                # A bar for each series in every group, around the group's middle.
                places = [place + width * (number - (len(series) - 1) / 2.0) for place in range(len(item["x"]))]
                _bars(axes, places, item["y"], width=0.94 * width, color=color, label=item["label"])
            else:
                known = [(x, y) for x, y in zip(item["x"], item["y"], strict=True) if y is not None]
                if not known:
                    continue
                xs, ys = zip(*known, strict=True)
                axes.plot(xs, ys, color=color, linewidth=1.6, marker="o", ms=3, label=item["label"])
        if figure_facts["kind"] == "bar":
            axes.set_xticks(range(len(series[0]["x"])), [str(label) for label in series[0]["x"]])
        elif figure_facts.get("x_scale") == "log":
            axes.set_xscale("log")
        axes.set(xlabel=figure_facts.get("x_label", ""), ylabel=figure_facts.get("y_label", ""))
        return finished(figure, axes, name, grid="y")


def _mark_zero(axis: Axis, edge: float, first: float) -> None:
    """Label the edge of a logarithmic axis of rates as 0, and powers of ten in per cent from there on.

    Args:
        axis: the axis.
        edge: its lower end, which stands for 0.
        first: the smallest rate above 0 that a count of users can give.
    """
    powers = [10.0**power for power in range(math.floor(math.log10(first)), 1) if 10.0**power >= 1.5 * edge]
    axis.set_major_locator(FixedLocator([edge, *powers]))
    axis.set_major_formatter(FixedFormatter(["0", *(f"{100 * power:g} %" for power in powers)]))
