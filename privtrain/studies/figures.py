"""Figures of the studies as ``<svg>`` elements."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from matplotlib.ticker import NullLocator

from privtrain.files.svg import DASHED, MUTED, figure_style, finished, new_figure
from privtrain.studies.results import Estimate

#: Told apart without colour by their markers.
COLORS = ("#b4532a", "#2b6a99", "#3d7a4e", "#8a5a9e", "#a8842c", "#4f6d7a", "#9d1c1c", "#1f7f86")
_MARKERS = "osD^vPX*"


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve: ``y[i]`` at ``x[i]``, with its interval where it has one."""

    label: str
    x: Sequence[float]
    y: Sequence[Estimate | float]

    @classmethod
    def through(cls, label: str, points: Iterable[tuple[float, Estimate | float | None]]) -> Series:
        """Return the curve through (x, y), without the points whose y is not known."""
        known = [(x, y) for x, y in points if y is not None]
        return cls(label, [x for x, _ in known], [y for _, y in known])


@dataclasses.dataclass(frozen=True)
class Level:
    """A horizontal line: what is there without the thing under study, e.g. the base model."""

    label: str
    y: float


@dataclasses.dataclass(frozen=True)
class AxisLabels:
    """Names, with units, and scales of the two axes."""

    x: str
    y: str
    x_scale: Literal["linear", "log"] = "linear"
    y_scale: Literal["linear", "log"] = "linear"


def curves_figure(name: str, series: Sequence[Series], labels: AxisLabels, levels: Sequence[Level] = ()) -> str:
    """Return curves with intervals, such as perplexity against ε or AUROC against documents, as ``<svg>``.

    Args:
        name: begins the ids inside the SVG, so that several fit on one page.
        series: the curves.
        labels: of the axes, with their scales.
        levels: horizontal lines to compare with.
    """
    with figure_style():
        figure, axes = new_figure()
        for index, one in enumerate(series):
            style = {"color": COLORS[index % len(COLORS)], "marker": _MARKERS[index % len(_MARKERS)], "capsize": 3}
            # Intervals at the same x stand side by side.
            shift = 0.012 * (index - (len(series) - 1) / 2)
            axes.errorbar(
                _shifted(one.x, shift, labels.x_scale == "log"),
                [_mean(value) for value in one.y],
                yerr=_error_bars(one.y),
                label=one.label,
                linewidth=1.5,
                markersize=5,
                **style,
            )
        for index, level in enumerate(levels):
            dash: Any = (0, (4, 2 + 2 * index))  # matplotlib's (offset, (ink, gap)): each level has gaps of its own
            axes.axhline(level.y, color=MUTED, linewidth=1.1, linestyle=dash, label=level.label)
        axes.set(xscale=labels.x_scale, yscale=labels.y_scale, xlabel=labels.x, ylabel=labels.y)
        ticks = sorted({x for one in series for x in one.x})
        if len(ticks) <= 8:  # few enough to name the values that were measured
            axes.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        return finished(figure, axes, name)


def places_figure(
    name: str, places: Sequence[str], series: Sequence[Series], labels: AxisLabels, levels: Sequence[Level] = ()
) -> str:
    """Return points at named places of the horizontal axis, such as σ against accountant, as ``<svg>``.

    Args:
        name: begins the ids inside the SVG.
        places: names along the horizontal axis.
        series: the points; ``x`` holds indices of ``places``.
        labels: of the axes; the horizontal one has no scale.
        levels: horizontal lines to compare with.
    """
    with figure_style():
        figure, axes = new_figure()
        for index, one in enumerate(series):
            shift = 0.16 * (index - (len(series) - 1) / 2)
            axes.errorbar(
                [x + shift for x in one.x],
                [_mean(value) for value in one.y],
                yerr=_error_bars(one.y),
                label=one.label,
                fmt=_MARKERS[index % len(_MARKERS)],
                color=COLORS[index % len(COLORS)],
                capsize=3,
            )
        for level in levels:
            axes.axhline(level.y, color=MUTED, linewidth=1.1, linestyle=DASHED, label=level.label)
        axes.set(yscale=labels.y_scale, xlabel=labels.x, ylabel=labels.y, xlim=(-0.5, len(places) - 0.5))
        axes.set_xticks(range(len(places)), places, rotation=35, ha="right", rotation_mode="anchor")
        return finished(figure, axes, name)


def roc_figure(name: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], num_held_out: int) -> str:
    """Return ROC curves on log-log axes, with the line of guessing, as ``<svg>``.

    Args:
        name: begins the ids inside the SVG.
        curves: (label, false positive rates, true positive rates) of each.
        num_held_out: users that were not trained on: no false positive rate but 0 is below one of them.
    """
    edge = 0.5 / num_held_out  # stands for 0, which a log axis lacks
    with figure_style():
        figure, axes = new_figure()
        axes.plot([edge, 1.0], [edge, 1.0], color=MUTED, linewidth=1.0, linestyle=DASHED, label="guessing")
        for index, (label, fpr, tpr) in enumerate(curves):
            axes.step(
                [max(edge, x) for x in fpr],
                [max(edge, y) for y in tpr],
                where="post",
                color=COLORS[index % len(COLORS)],
                linewidth=1.6,
                label=label,
            )
        axes.set(xscale="log", yscale="log", xlim=(edge, 1.0), ylim=(edge, 1.15))
        axes.set(xlabel="false positive rate (held-out users accused)", ylabel="true positive rate (held-in users)")
        return finished(figure, axes, name)


def _mean(value: Estimate | float) -> float:
    return value.mean if isinstance(value, Estimate) else value


def _error_bars(values: Sequence[Estimate | float]) -> list[list[float]] | None:
    """Return matplotlib's ``yerr``: lengths below the points, and above them; ``None`` if no point has an interval."""
    below, above = [], []
    for value in values:
        interval = value.interval if isinstance(value, Estimate) else None
        low, high = (_mean(value), _mean(value)) if interval is None else interval  # no interval: bars of length 0
        below.append(_mean(value) - low)
        above.append(high - _mean(value))
    return [below, above] if any(below) or any(above) else None


def _shifted(xs: Sequence[float], shift: float, is_log: bool) -> list[float]:
    """Return positions moved along the axis by a share of its length, or by powers of ten on a log axis."""
    if is_log:
        return [x * 10**shift for x in xs]
    width = (max(xs) - min(xs)) if len(xs) > 1 else 1.0
    return [x + shift * width for x in xs]
