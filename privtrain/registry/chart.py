"""A budget over time as inline SVG: a rising line of spent ε under the dashed line of the budget."""

from __future__ import annotations

import datetime

import markupsafe

from privtrain.registry.views import BudgetView

_WIDTH, _HEIGHT = 380, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 14, 28


def budget_chart(view: BudgetView) -> markupsafe.Markup:
    """Return the picture; without runs, only its frame. Colours come from the page's style sheet.

    Time runs from left to right and ends now; ε runs upwards. ``view.history`` holds (time in seconds, ε spent) after
    each run.
    """
    end = view.as_of
    begin = min([end - 86400, *(time for time, _ in view.history)])  # at least a day
    highest = max([view.epsilon, *(spent for _, spent in view.history if spent < float("inf"))])
    top = 1.15 * highest  # some room above

    def x(seconds: float) -> float:
        return _LEFT + (seconds - begin) / (end - begin) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (1 - min(value, top) / top) * (_HEIGHT - _TOP - _BOTTOM)

    # A staircase: along to the time of a run (H), up to what was spent after it (V).
    path = [f"M{x(begin):.1f} {y(0):.1f}"]
    for seconds, value in view.history:
        path.append(f"H{x(seconds):.1f}V{y(value):.1f}")
    path.append(f"H{x(end):.1f}")
    area = [*path, f"V{y(0):.1f}Z"]
    limit = y(view.epsilon)
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="ε spent over time: {view.spent:.3g} of {view.epsilon:g}">',
        f'<path class="axis" d="M{_LEFT} {_TOP}V{y(0):.1f}H{_WIDTH - _RIGHT}"/>',
        f'<path class="spent-area" d="{"".join(area)}"/>' if view.history else "",
        f'<path class="spent" d="{"".join(path)}"/>' if view.history else "",
        f'<path class="limit" d="M{_LEFT} {limit:.1f}H{_WIDTH - _RIGHT}"/>',
        f'<text x="{_LEFT - 6}" y="{limit + 4:.1f}" text-anchor="end">{view.epsilon:g}</text>',
        f'<text x="{_LEFT - 6}" y="{y(0) + 4:.1f}" text-anchor="end">0</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{_day(begin)}</text>',
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{_day(end)}</text>',
        "</svg>",
    ]
    # Safe to mark as HTML: built from numbers and dates alone.
    return markupsafe.Markup("".join(parts))


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d")
