"""The report's figures as SVG text: the same facts give the same bytes, and nothing refers outside the page."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator

INK = "#22303c"
MUTED = "#6b7a88"
GRID = "#e4e8ec"
HELD_IN_COLOR = "#b4532a"
HELD_OUT_COLOR = "#2b6a99"
CAP_COLOR = "#3d7a4e"
_SERIES_COLORS = (HELD_IN_COLOR, HELD_OUT_COLOR, CAP_COLOR, "#7a5c99", MUTED)

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "privtrain",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def roc_figure(result: Mapping[str, Any], claim: str | None) -> str:
    """Return the ROC on log-log axes with its band, the chance line and what the claim allows.

    Args:
        result: one entry of ``results`` in ``report/attacks.json``.
        claim: the guarantee in words for the legend, or None where it caps nothing.

    Returns:
        An ``<svg>`` element.
    """
    roc, counts = result["roc"], result["tpr_at_fpr"][0]
    num_held_in, num_held_out = counts["num_held_in"], counts["num_held_out"]
    # Log axes have no zero: the left and the lower edge stand for it, half a user below the first count.
    left, bottom = 0.5 / num_held_out, 0.5 / num_held_in
    fpr = [max(left, num_allowed / num_held_out) for num_allowed in roc["num_false_positives_allowed"]]
    with mpl.rc_context(_STYLE):
        figure, axes = _new_figure()
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
        axes.plot(chance, chance, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), label="guessing")
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
        axes.grid(color=GRID, linewidth=0.7)
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, handlelength=1.6)
        return _svg(figure, "roc")


def histogram_figure(result: Mapping[str, Any], axis_label: str) -> str:
    """Return how the statistic is distributed over the users of the two sides.

    Args:
        result: one entry of ``results`` in ``report/attacks.json``.
        axis_label: name and unit of the statistic.

    Returns:
        An ``<svg>`` element.
    """
    histogram = result["histogram"]
    with mpl.rc_context(_STYLE):
        figure, axes = _new_figure()
        for side, color, label in (
            ("held_in", HELD_IN_COLOR, "held-in users (trained on)"),
            ("held_out", HELD_OUT_COLOR, "held-out users"),
        ):
            total = sum(histogram[side])
            shares = [count / total for count in histogram[side]]
            axes.stairs(shares, histogram["edges"], color=color, fill=True, alpha=0.22)
            axes.stairs(shares, histogram["edges"], color=color, linewidth=1.6, label=label)
        axes.set(xlabel=axis_label, ylabel="share of the side's users")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, "histogram")


def dependence_figure(points: Sequence[Mapping[str, Any]], labels: Sequence[str], axis_label: str, name: str) -> str:
    """AUROC with its intervals at several places.

    Args:
        points: entries with ``auroc`` and ``interval``.
        labels: what each place is.
        axis_label: what they vary in.
        name: of the figure, unique in the page.

    Returns:
        An ``<svg>`` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new_figure(height=3.2)
        places = list(range(len(points)))
        areas = [point["auroc"] for point in points]
        below = [area - point["interval"][0] for area, point in zip(areas, points, strict=True)]
        above = [point["interval"][1] - area for area, point in zip(areas, points, strict=True)]
        axes.axhline(0.5, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), label="guessing")
        axes.errorbar(
            places, areas, yerr=[below, above], fmt="o", color=HELD_IN_COLOR, capsize=3, label="95 % interval"
        )
        axes.set(ylim=(0.0, 1.02), xlim=(-0.5, len(points) - 0.5), xlabel=axis_label, ylabel="AUROC")
        # On two lines, so that neighbours do not run into each other.
        axes.set_xticks(places, [label.replace(" to ", "\nto ") for label in labels])
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, name)


def sensitive_figure(cells: Sequence[Mapping[str, Any]]) -> str:
    """Negative log-likelihood by kind of token, split and model.

    Args:
        cells: of the panel in ``report/attacks.json``.

    Returns:
        An ``<svg>`` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new_figure(height=3.4)
        groups = list(dict.fromkeys((cell["tokens"], cell["split"]) for cell in cells))
        for number, (model, color) in enumerate((("base", HELD_OUT_COLOR), ("tuned", HELD_IN_COLOR))):
            values = {(cell["tokens"], cell["split"]): cell["nll"] or 0.0 for cell in cells if cell["model"] == model}
            places = [place + 0.36 * (number - 0.5) for place in range(len(groups))]
            axes.bar(places, [values[group] for group in groups], width=0.34, color=color, alpha=0.75, label=model)
        axes.set_xticks(range(len(groups)), [f"{tokens}\n{split}" for tokens, split in groups])
        axes.set(ylabel="nats per token")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, "sensitive")


def panel_figure(figure_facts: Mapping[str, Any], name: str) -> str:
    """Return the figure of a panel (:mod:`attacks.reporting.panels`): lines or bars.

    Args:
        figure_facts: its ``figure``.
        name: of the figure, unique in the page.

    Returns:
        An ``<svg>`` element.
    """
    series = figure_facts["series"]
    with mpl.rc_context(_STYLE):
        figure, axes = _new_figure(height=3.4)
        for number, (item, color) in enumerate(zip(series, itertools.cycle(_SERIES_COLORS), strict=False)):
            if figure_facts["kind"] == "bar":
                width = 0.76 / len(series)
                places = [place + width * (number - (len(series) - 1) / 2.0) for place in range(len(item["x"]))]
                heights = [0.0 if value is None else value for value in item["y"]]
                axes.bar(places, heights, width=0.94 * width, color=color, alpha=0.75, label=item["label"])
            else:
                points = [(x, y) for x, y in zip(item["x"], item["y"], strict=True) if y is not None]
                axes.plot(*zip(*points, strict=True), color=color, linewidth=1.6, marker="o", ms=3, label=item["label"])
        if figure_facts["kind"] == "bar":
            axes.set_xticks(range(len(series[0]["x"])), [str(label) for label in series[0]["x"]])
        elif figure_facts.get("x_scale") == "log":
            axes.set_xscale("log")
        axes.set(xlabel=figure_facts.get("x_label", ""), ylabel=figure_facts.get("y_label", ""))
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, name)


def _mark_zero(axis: Axis, edge: float, first: float) -> None:
    """Labels the edge of a logarithmic axis of rates 0, and powers of ten from the first count on."""
    powers = [10.0**power for power in range(math.floor(math.log10(first)), 1) if 10.0**power >= 1.5 * edge]
    axis.set_major_locator(FixedLocator([edge, *powers]))
    axis.set_major_formatter(FixedFormatter(["0", *(f"{100 * power:g} %" for power in powers)]))


def _new_figure(height: float = 4.4) -> tuple[Figure, Axes]:
    """Return a figure small enough that its text stays readable on a phone. No pyplot: no global state, no display."""
    figure = Figure(figsize=(5.0, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str) -> str:
    """Render to an element that can stand in a page beside others: no prologue, no metadata, ids of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)
