"""How much of a fine-tuning's gain survives noise, and which learning rate gets it: a law fitted to small trainings.

**What was measured.** ``noise_law.csv`` beside this file, written by ``python -m tests.bench.noise_law`` and never by
hand: LoRA of a small Llama on synthetic customers with the product's own trainer, over steps, noise, rank, records of a
user, and learning rate. Nothing here looks at private data.

**Variables**, as in McKenna et al. 2025 (arXiv 2501.18914), where loss depends on steps and the noise-batch ratio: T,
the steps; N, the norm of the noise in the trained weights over the largest signal, all users agreeing
(:meth:`~privtrain.privacy.plan.PrivacyPlan.noise_of_run` times the root of the number of trained weights), one number
for independent and for correlated noise; κ, how much of the steps' noise correlation leaves in the run
(:meth:`~privtrain.privacy.plan.PrivacyPlan.noise_kept`; 1 for independent noise); r, the rank of LoRA; k, the records
of a user in a step.

**Gain**, what training takes off the loss, relative to other plans of the same model and data:

    gain ~ 1 / (1 + (T₀ / T)^a + (N / (N₀ κ^w r^h k^b))^p)

Few steps and much noise add up: noise harms little where steps are what is missing. Noise that correlation takes out of
the weights in the end was in them on the way, where gradients are taken: so the same N is worse with a small κ. A
larger rank has more weights and so more noise, of which more goes where it does no harm; k records make a user's
gradient steadier. The batch counts through N alone: 8, 64 and 256 users at the same T and N gained the same.

**Learning rate** of AdamW (decaying to zero), at which that gain is had: the weights may move the less, the longer and
the noisier the run is. It hardly depends on the noise of one step, by whose norm AdamW divides; noise that cancels
makes that norm larger and moves the weights less, so the rate may be larger:

    rate = c r^g / (T^t (1 + (N / N₁)^u) κ^v)

Both rank plans of one kind of model and data; elsewhere they are a start that no private data were needed for.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize

#: Purposes of trainings that the law is judged by, and never fitted to.
JUDGES = ("grid", "choice", "other-grid", "other-choice", "last-grid", "last-choice")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one training of the table was given.

    Attributes:
        purpose: why it is made: one of ``JUDGES``, or what the law is fitted to.
        num_steps, batch, noise_multiplier, num_bands, rank, records_per_user, learning_rate, seed: what is set.
    """

    purpose: str
    num_steps: int
    batch: int
    noise_multiplier: float
    num_bands: int
    rank: int
    records_per_user: int
    learning_rate: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Measured(Setting):
    """One training of the table, and what came of it.

    Attributes:
        num_trained: trained weights.
        relative_noise: N.
        noise_kept: κ.
        loss_before, loss: mean loss per token on the same records of held-out users, before and after.
    """

    num_trained: int
    relative_noise: float
    noise_kept: float
    loss_before: float
    loss: float

    @property
    def point(self) -> Point:
        """What the law knows of it."""
        return Point(self.num_steps, self.relative_noise, self.records_per_user, self.rank, self.noise_kept)


@dataclasses.dataclass(frozen=True)
class Point:
    """A plan as the law sees it.

    Attributes:
        num_steps: T.
        relative_noise: N.
        records_per_user: k.
        rank: of LoRA.
        noise_kept: κ.
    """

    num_steps: int
    relative_noise: float
    records_per_user: int = 1
    rank: int = 4
    noise_kept: float = 1.0


@dataclasses.dataclass(frozen=True)
class Best:
    """The best learning rate of one setting of the table, between those tried, and the loss that it takes off."""

    point: Point
    seed: int
    learning_rate: float
    drop: float  # of the loss, in training at this rate


@dataclasses.dataclass(frozen=True)
class NoiseLaw:
    """The fitted law.

    Attributes:
        half_steps, step_power: T₀ and a.
        half_noise, noise_power, record_power, rank_power, kept_power: N₀, p, b, h and w.
        rate_scale, rate_step_power, rate_rank_power, rate_half_noise, rate_noise_power, rate_kept_power: c, t, g, N₁, u
            and v.
        num_runs, least_steps, most_steps, least_kept: what it was fitted to; a rate takes less of κ as the least.
    """

    half_steps: float
    step_power: float
    half_noise: float
    noise_power: float
    record_power: float
    rank_power: float
    kept_power: float
    rate_scale: float
    rate_step_power: float
    rate_rank_power: float
    rate_half_noise: float
    rate_noise_power: float
    rate_kept_power: float
    num_runs: int
    least_steps: int
    most_steps: int
    least_kept: float

    def gain(self, point: Point) -> float:
        """Return the predicted gain, in a unit that only ratios have a meaning in."""
        gains = _gain(
            _columns([point]),
            half_steps=self.half_steps,
            step_power=self.step_power,
            half_noise=self.half_noise,
            noise_power=self.noise_power,
            record_power=self.record_power,
            rank_power=self.rank_power,
            kept_power=self.kept_power,
        )
        return float(gains[0])

    def learning_rate(self, point: Point) -> float:
        """Return the learning rate at which AdamW gains most."""
        point = dataclasses.replace(point, noise_kept=max(point.noise_kept, self.least_kept))
        log_rates = _log_rate(
            _columns([point]),
            log_scale=0.0,
            step_power=self.rate_step_power,
            rank_power=self.rate_rank_power,
            half_noise=self.rate_half_noise,
            noise_power=self.rate_noise_power,
            kept_power=self.rate_kept_power,
        )
        return self.rate_scale * float(np.exp(log_rates[0]))


@functools.cache
def table() -> tuple[Measured, ...]:
    """Return the measured trainings; empty where the table was deleted to be measured again."""
    file = importlib.resources.files("privtrain.privacy") / "noise_law.csv"
    if not file.is_file():
        return ()
    types = {"str": str, "int": int, "float": float}
    type_of = {field.name: types[str(field.type)] for field in dataclasses.fields(Measured)}
    rows: list[Measured] = []
    for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
        values: dict[str, Any] = {name: type_of[name](value) for name, value in row.items()}
        rows.append(Measured(**values))
    return tuple(rows)


@functools.cache
def fitted() -> NoiseLaw:
    """Return the law fitted to the table."""
    return fit([row for row in table() if row.purpose not in JUDGES])


def best_of(rows: Sequence[Measured]) -> list[Best]:
    """Return each setting's best learning rate: the vertex of a parabola through the three best in a row.

    A best one at the end of those tried stays as it is.
    """
    by_rate = sorted(rows, key=lambda row: (_setting(row), row.learning_rate))
    best = []
    for _, group in itertools.groupby(by_rate, _setting):
        runs = list(group)
        log_rates = [float(np.log(run.learning_rate)) for run in runs]
        losses = [run.loss for run in runs]
        index = int(np.argmin(losses))
        log_rate, loss = log_rates[index], losses[index]
        if 0 < index < len(runs) - 1:
            near = slice(index - 1, index + 2)
            curve = np.polyfit(log_rates[near], losses[near], 2)
            quadratic, linear, _ = curve
            log_rate = -linear / (2 * quadratic)  # the parabola's vertex
            loss = np.polyval(curve, log_rate)
        first = runs[0]
        best.append(Best(first.point, first.seed, float(np.exp(log_rate)), float(first.loss_before - loss)))
    return best


def _setting(row: Measured) -> tuple[float, ...]:
    """Return what trainings that differ in their learning rate alone have in common."""
    return row.num_steps, row.batch, row.noise_multiplier, row.num_bands, row.rank, row.records_per_user, row.seed


def fit(rows: Sequence[Measured]) -> NoiseLaw:
    """Fit the law by least squares: of the share of the gain, and of the logarithm of the best rate.

    Raises:
        ValueError: if there are fewer settings than parameters.
    """
    best = best_of(rows)
    if len(best) < 15:
        raise ValueError(f"{len(best)} settings; the law has 14 parameters. Run: python -m tests.bench.noise_law")
    points = _columns([b.point for b in best])
    drops = np.array([b.drop for b in best])
    shares = drops / drops.max()
    log_scale, *of_rate = _fitted_rate(points, shares, np.log([b.learning_rate for b in best]))
    # In the order of NoiseLaw's fields: seven parameters of the gain, then six of the rate.
    parameters = [*_fitted_gain(points, shares), float(np.exp(log_scale)), *of_rate]
    steps = [row.num_steps for row in rows]
    return NoiseLaw(
        *parameters,
        num_runs=len(rows),
        least_steps=min(steps),
        most_steps=max(steps),
        least_kept=min(row.noise_kept for row in rows),
    )


def _fitted_gain(points: np.ndarray, shares: np.ndarray) -> list[float]:
    """Return the parameters of :func:`_gain`, in order, that fit each setting's share of the largest drop in loss.

    With them, and left out, is fitted what gain a share of 1 stands for. The first four parameters and that one are
    positive and fitted by their logarithms.
    """

    def errors(values: np.ndarray) -> np.ndarray:
        """Return how far the law with these parameters is off the shares."""
        by_log, powers, log_unit = values[:4], values[4:7], values[7]
        return np.exp(log_unit) * _gain(points, *np.exp(by_log), *powers) - shares

    start = [*np.log([30.0, 0.7, 0.5, 1.0]), 0.2, 0.4, 0.1, np.log(1.5)]
    least = [*np.log([0.5, 0.2, 0.02, 0.3]), 0.0, 0.0, 0.0, 0.0]
    most = [*np.log([3000, 3, 50, 4]), 1.0, 1.5, 1.0, 3.0]
    found = optimize.least_squares(errors, start, bounds=(least, most)).x
    return [*np.exp(found[:4]).tolist(), *found[4:7].tolist()]


def _fitted_rate(points: np.ndarray, shares: np.ndarray, log_rates: np.ndarray) -> list[float]:
    """Return the parameters of :func:`_log_rate`, in order, that fit the log of each setting's best learning rate."""
    # A learning rate that is off where nothing can be gained says nothing.
    weights = np.sqrt(np.clip(shares, 0.05, 1))
    found = optimize.least_squares(
        lambda values: weights * (_log_rate(points, *values) - log_rates),
        [np.log(0.03), 0.2, 0.4, 3.0, 1.0, 1.0],
        bounds=([-12, -0.5, -1, 0.02, 0.2, -1.0], [4, 1.5, 1, 50, 3, 3.0]),
    ).x
    return found.tolist()


def _columns(points: Sequence[Point]) -> np.ndarray:
    """Return [fields of a point, points], the fields in their order in :class:`Point`."""
    return np.array([dataclasses.astuple(point) for point in points], dtype=np.float64).T


def _gain(
    points: np.ndarray,
    half_steps: float,
    step_power: float,
    half_noise: float,
    noise_power: float,
    record_power: float,
    rank_power: float,
    kept_power: float,
) -> np.ndarray:
    """Return the share of the gain: without noise half at ``half_steps``, after many steps half at a noise.

    Records and rank raise that noise; correlation lowers it.
    """
    steps, noise, records, rank, kept = points
    half = half_noise * rank**rank_power * records**record_power * kept**kept_power
    return 1 / (1 + (half_steps / steps) ** step_power + (noise / half) ** noise_power)


def _log_rate(
    points: np.ndarray,
    log_scale: float,
    step_power: float,
    rank_power: float,
    half_noise: float,
    noise_power: float,
    kept_power: float,
) -> np.ndarray:
    """Return the log of the best learning rate: less with steps and with noise, more where noise cancels."""
    steps, noise, _, rank, kept = points
    shrunk = np.log1p((noise / half_noise) ** noise_power) + kept_power * np.log(kept)
    return log_scale + rank_power * np.log(rank) - step_power * np.log(steps) - shrunk
