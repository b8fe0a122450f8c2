"""Recompute the table and the picture of ``accountants/README.md``: EW-Tune's settings under every accountant.

``python -m tests.bench.ewtune_table`` rewrites the text between the two markers of the README and the picture beside
it. Behnia et al. 2022 (arXiv 2210.15042): RoBERTa on four GLUE tasks, batch 2000, 20 epochs, epsilon 8.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import dp_accounting

import accountants
from accountants.answer import Direction
from accountants.calibration import calibrate_noise_multiplier
from accountants.events import dp_sgd_event
from accountants.methods.edgeworth import Aea1Accountant, Aea2Accountant, Aea3Accountant, EeaiAccountant
from accountants.methods.prv import PrvAccountant
from accountants.methods.tilted_edgeworth import TiltedEdgeworthAccountant
from accountants.numerics.roots import bracketed_root
from accountants.protocol import Accountant
from tests.accountants.laplace_reference import ContourAccountant

README = Path(accountants.__file__).with_name("README.md")
PICTURE = README.with_name("ewtune.png")
BEGIN, END = "<!-- ewtune table: begin -->", "<!-- ewtune table: end -->"

BATCH, EPOCHS = 2000, 20
#: Task -> (training examples, noise multiplier published for (8, 1e-5), for (8, 1e-6); None where none was).
TASKS = {
    "SST-2": (67_349, 0.7865, None),
    "QNLI": (104_743, 0.711, 0.7395),
    "QQP": (363_849, 0.5635, 0.580),
    "MNLI": (392_702, 0.557, 0.573),
}
ESTIMATES: dict[str, Accountant] = {
    "AEA 1": Aea1Accountant(Direction.REMOVE),
    "AEA 2": Aea2Accountant(Direction.REMOVE),
    "AEA 3": Aea3Accountant(Direction.REMOVE),
}
CERTIFIED = {"tilted": "tilted", "PLD": "pld", "RDP": "rdp"}
TARGET = 8.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of EW-Tune's experiments."""

    task: str
    delta: float
    sampling_prob: float
    num_steps: int
    published: float | None

    def event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """The run at a noise multiplier."""
        return dp_sgd_event(
            noise_multiplier=noise_multiplier, sampling_prob=self.sampling_prob, num_steps=self.num_steps
        )

    def truth(self, noise_multiplier: float) -> float:
        """The exact reference's epsilon."""
        return ContourAccountant().epsilon(self.event(noise_multiplier), self.delta).estimate


def settings() -> list[Setting]:
    """All eight settings."""
    rows: list[Setting] = []
    for delta, column in ((1e-5, 1), (1e-6, 2)):
        for task, values in TASKS.items():
            steps = EPOCHS * (values[0] // BATCH)
            rows.append(Setting(task, delta, BATCH / values[0], steps, values[column]))
    return rows


def noise_by_estimate(setting: Setting, accountant: Accountant) -> float:
    """The noise at which a point estimate crosses the target: for this table only, never for a run."""

    def gap(noise: float) -> float:
        return accountant.epsilon(setting.event(noise), setting.delta).estimate - TARGET

    return bracketed_root(gap, 0.4, 1.5, xtol=1e-6)


def noise_by_upper(setting: Setting, accountant: Accountant) -> float:
    """The noise at which an accountant's upper end meets the target."""

    def gap(noise: float) -> float:
        return accountant.epsilon(setting.event(noise), setting.delta).upper - TARGET

    return bracketed_root(gap, 0.5, 1.1, xtol=1e-5)


def noises(setting: Setting) -> dict[str, float]:
    """Noise multiplier by method."""
    row: dict[str, float] = {}
    for label, name in CERTIFIED.items():
        row[label] = calibrate_noise_multiplier(
            target_epsilon=TARGET,
            target_delta=setting.delta,
            sampling_prob=setting.sampling_prob,
            num_steps=setting.num_steps,
            accountant=name,
        )
    row["PRV"] = noise_by_upper(setting, PrvAccountant(eps_error=0.01))
    row["tilted expansion"] = noise_by_upper(setting, TiltedEdgeworthAccountant())
    row.update({label: noise_by_estimate(setting, accountant) for label, accountant in ESTIMATES.items()})
    if setting.published is not None:
        row["EW-Tune (published)"] = setting.published
    return row


COLUMNS = ("tilted", "PLD", "PRV", "tilted expansion", "RDP", "AEA 1", "AEA 2", "AEA 3", "EW-Tune (published)")


def table(rows: dict[Setting, dict[str, float]]) -> str:
    """Markdown: noise, and in brackets the epsilon that it really spends."""
    lines = [
        "| task, delta | " + " | ".join(COLUMNS) + " | EEAI |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for setting, row in rows.items():
        cells = [f"{row[c]:.4f} ({setting.truth(row[c]):.3f})" if c in row else "" for c in COLUMNS]
        interval = EeaiAccountant().epsilon(setting.event(row["tilted"]), setting.delta)
        cells.append("vacuous" if interval.note.startswith("vacuous") else f"{interval.upper:.3f}")
        lines.append(f"| {setting.task}, {setting.delta:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: dict[Setting, dict[str, float]]) -> None:
    """The epsilon that each method's noise really spends, against the eight that it claims."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    plt = cast(Any, pyplot)

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    labels = [f"{setting.task}\n{setting.delta:g}" for setting in rows]
    markers = dict(zip(COLUMNS, "ovPs^123*", strict=True))
    for column in COLUMNS:
        points = [(i, s.truth(row[column])) for i, (s, row) in enumerate(rows.items()) if column in row]
        axes.plot(*zip(*points, strict=True), markers[column], label=column, alpha=0.8)
    axes.axhline(TARGET, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("epsilon really spent (claimed: 8)")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(PICTURE, dpi=130)
    plt.close(figure)


def main() -> None:
    """Rewrite the README's table and picture."""
    rows = {setting: noises(setting) for setting in settings()}
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")
    draw(rows)


if __name__ == "__main__":
    main()
