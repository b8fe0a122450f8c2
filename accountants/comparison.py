"""All accountants on one event, and the curves of one accountant, as data, tables and pictures."""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import dp_accounting
import numpy as np

from accountants.answer import PrivacyAnswer
from accountants.events import dp_sgd_event
from accountants.registry import get_accountant
from accountants.tradeoff import privacy_curve


@dataclasses.dataclass(frozen=True)
class Row:
    """One accountant's answer, or ``None`` with its ``refusal`` in words, and the seconds that it took."""

    name: str
    answer: PrivacyAnswer | None
    refusal: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of JSON scalars."""
        answer = None if self.answer is None else self.answer.to_json()
        return {"name": self.name, "answer": answer, "refusal": self.refusal, "seconds": self.seconds}


def compare(
    event: dp_accounting.DpEvent,
    delta: float,
    names: Sequence[str],
    relation: dp_accounting.NeighboringRelation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> list[Row]:
    """Ask every named accountant for epsilon at ``delta``, and time it; a ``ValueError`` is its refusal."""
    rows: list[Row] = []
    for name in names:
        accountant = get_accountant(name)
        start = time.perf_counter()
        answer, refusal = None, ""
        try:
            answer = accountant.epsilon(event, delta, relation)
        except ValueError as error:
            refusal = str(error)
        rows.append(Row(name, answer, refusal, time.perf_counter() - start))
    return rows


def print_table(rows: Sequence[Row]) -> None:
    """Print rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="epsilon")
    for heading in ("accountant", "lower", "estimate", "upper", "kind", "ms", "note"):
        table.add_column(heading, justify="left" if heading in ("accountant", "kind", "note") else "right")
    for row in rows:
        milliseconds = f"{row.seconds * 1e3:.0f}"
        if row.answer is None:
            table.add_row(row.name, "", "", "", "refused", milliseconds, row.refusal)
        else:
            values = [f"{value:.6g}" for value in (row.answer.lower, row.answer.estimate, row.answer.upper)]
            table.add_row(row.name, *values, row.answer.kind.value, milliseconds, row.answer.note)
    Console().print(table)


def draw_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the answers as a picture: certified intervals as bars, estimates as open circles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    plt = cast(Any, pyplot)
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(rows) + 1), layout="constrained")
    for place, row in enumerate(rows):
        answer = row.answer
        if answer is None or math.isinf(answer.estimate):
            continue
        if answer.kind == "certified_upper" and math.isfinite(answer.upper):
            axes.plot([answer.lower, answer.upper], [place, place], "|-", color="C0")
        else:
            axes.plot([answer.estimate], [place], "o", mfc="none", color="C1")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("epsilon (bars: certified from lower to upper end; circles: estimates)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(
    *, noise_multiplier: float, sampling_prob: float, num_steps: int, delta: float, accountant: str, points: int
) -> dict[str, Any]:
    """Return three curves of one DP-SGD run as JSON values, by one accountant, for :func:`draw`.

    Args:
        noise_multiplier: noise standard deviation over clipping norm.
        sampling_prob: Poisson sampling probability per unit and step.
        num_steps: steps of the whole run.
        delta: at which epsilon is taken.
        accountant: its name.
        points: of each curve, about.

    Returns:
        ``epsilon_over_steps`` (at ``delta``), ``delta_over_epsilon`` (after all steps) and ``attack_cap``: the most
        true-positive rate at a false-positive rate, and the most advantage. ``certified`` says whether all are bounds.
    """
    method = get_accountant(accountant)
    steps = sorted({round(x) for x in np.geomspace(1, max(num_steps, 1), points)})
    events = [
        dp_sgd_event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, num_steps=count) for count in steps
    ]
    answers = [method.epsilon(event, delta) for event in events]
    certified = all(answer.is_certified for answer in answers)
    epsilons = [answer.upper if certified else answer.estimate for answer in answers]
    curve = privacy_curve(events[-1], method, largest_epsilon=max(1.5 * epsilons[-1], 0.1), points=points)
    rates = np.concatenate([[0.0], np.geomspace(1e-6, 1.0, 4 * points)])
    return {
        "accountant": accountant,
        "certified": certified and curve.certified,
        "delta": delta,
        "epsilon_over_steps": {"num_steps": steps, "epsilon": epsilons},
        "delta_over_epsilon": {"epsilon": curve.epsilons.tolist(), "delta": curve.deltas.tolist()},
        "attack_cap": {
            "false_positive_rate": rates.tolist(),
            "true_positive_rate": [curve.true_positive_cap(float(rate)) for rate in rates],
            "advantage": curve.advantage(),
        },
    }


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the three curves of :func:`curves` as one picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    plt = cast(Any, pyplot)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    left.plot(data["epsilon_over_steps"]["num_steps"], data["epsilon_over_steps"]["epsilon"])
    left.set(xscale="log", xlabel="steps", ylabel=f"epsilon at delta = {data['delta']:g}")
    middle.plot(data["delta_over_epsilon"]["epsilon"], data["delta_over_epsilon"]["delta"])
    middle.set(yscale="log", xlabel="epsilon", ylabel="delta")
    cap = data["attack_cap"]
    right.plot(cap["false_positive_rate"][1:], cap["true_positive_rate"][1:], label="no attack lies above")
    right.plot([1e-6, 1], [1e-6, 1], linestyle=":", color="grey", label="guessing")
    right.set(xscale="log", yscale="log", xlabel="false-positive rate", ylabel="true-positive rate")
    right.legend()
    word = "certified" if data["certified"] else "estimate"
    figure.suptitle(f"{data['accountant']} ({word})")
    figure.savefig(path, dpi=130)
    plt.close(figure)
