"""How figures of reports look, and their SVG text: the same facts give the same bytes; nothing refers outside the page.

Small enough that their text stays readable on a phone. No pyplot: no global state, no display.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID = "#22303c", "#6b7a88", "#e4e8ec"
DASHED: Any = (0, (4, 3))

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


def figure_style() -> contextlib.AbstractContextManager[None]:
    """Return a context manager with the reports' style; make, draw and finish a figure inside it."""
    return mpl.rc_context(_STYLE)


def new_figure(height: float = 4.2) -> tuple[Figure, Axes]:
    """Return a figure 5 inches wide with one pair of axes."""
    figure = Figure(figsize=(5.0, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def finished(figure: Figure, axes: Axes, name: str, grid: Literal["both", "y"] = "both") -> str:
    """Return the figure, with grid and legend, as an ``<svg>`` element that can stand in a page beside others.

    It has no prologue and no metadata, and ids of its own: ``name`` must be unique in the page.
    """
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, handlelength=1.8)
    buffer = io.StringIO()
    # Without a date, and with the fixed "svg.hashsalt" of the style, the same facts give the same bytes.
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Put the name before every id, and before every reference to one.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)
