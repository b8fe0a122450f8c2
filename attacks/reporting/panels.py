"""Report panels: results that are not one score per user, as a table with words, perhaps a figure and a verdict.

A panel is a plain mapping, so that ``attacks.json`` holds it as it is:

* ``title``: a few words. ``summary``: one or two sentences that give the finding first.
* ``columns``: in order, a key of the rows, or a mapping with ``key`` and ``label``.
* ``rows``: flat mappings; values are text, numbers, booleans or None, and a key may be missing.
* ``notes``: sentences. Optional.
* ``figure``: optional; ``kind`` is ``line`` or ``bar``, with ``x_label``, ``y_label``, ``caption`` and ``series``, each
  with ``label``, ``x`` and ``y`` (bars: ``x`` are the names of the groups, the same for every series).
* ``verdict``, ``verdict_reason``: optional; one of :class:`attacks.analysis.verdict.Verdict`. The policy file heeds it.

Public: nothing about a single user may stand in a panel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_REQUIRED = ("title", "summary", "columns", "rows")
_NONE = "–"  # noqa: RUF001


def check(name: str, panel: Mapping[str, Any]) -> None:
    """Refuse a panel that the report could not show, which is a mistake in the code that made it.

    Raises:
        ValueError: naming the panel and what it lacks.
    """
    missing = [key for key in _REQUIRED if key not in panel]
    if missing:
        raise ValueError(f"panel {name!r} lacks {', '.join(missing)}")
    for row in panel["rows"]:
        nested = [key for key, value in row.items() if isinstance(value, (Mapping, list, tuple))]
        if nested:
            raise ValueError(f"panel {name!r} has nested values under {', '.join(nested)}; expected flat rows")


def columns(panel: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (key, heading) of each column."""
    cells = []
    for column in panel["columns"]:
        if isinstance(column, str):
            cells.append((column, column.replace("_", " ")))
        else:
            cells.append((column["key"], column.get("label", column["key"].replace("_", " "))))
    return cells


def cell(value: object) -> str:
    """Return a value as the text of a table cell: four significant digits, "yes" or "no", a dash for None."""
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        if value == 0.0 or 1e-3 <= abs(value) < 1e6:
            return f"{value:.4g}"
        return scientific(value)
    return str(value)


def scientific(value: float) -> str:
    """Return a number with its power of ten, such as ``"1e-4"``; plain from 0.01 to a million."""
    if value == 0.0 or 0.01 <= abs(value) < 1e6:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def table(panel: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return ``headings`` and ``rows`` of the panel as text, one cell a column."""
    keys = columns(panel)
    return {
        "headings": [label for _, label in keys],
        "rows": [[cell(row.get(key)) for key, _ in keys] for row in panel["rows"]],
    }
