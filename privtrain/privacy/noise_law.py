"""How much of a fine-tuning's gain survives noise, and which learning rate gets it: a law fitted to small trainings.

**What was measured.** ``noise_law.csv`` beside this file, written by ``python -m tests.bench.noise_law`` and never by
hand: LoRA of a small Llama on synthetic customers with the product's own trainer, over steps, noise, rank, records of a
user, and learning rate. Nothing here looks at private data.

**Variables**, as in McKenna et al. 2025 (arXiv 2501.18914), where loss depends on steps and the noise-batch ratio: T,
the steps, and ρ, the norm of the noise in the trained weights over the largest signal, all users agreeing
(:meth:`~privtrain.privacy.plan.PrivacyPlan.noise_of_run` times the root of the number of trained weights). ρ is one
number for independent and for correlated noise. k records of a user in a step make its gradient steadier: ρ / k^κ.

**Gain**, as a share of what unlimited steps without noise take off the loss, the learning rate tuned:

    gain = 1 / ((1 + (T₀ / T)^a) (1 + (ρ / (ρ₀ k^κ))^p))

**Learning rate** of AdamW, whose step is the mean gradient over the norm of what it is made of: ν, the norm of a step's
noise over the clipping norm, and s, the same of the sampling of users. The weights may move the less, the longer and
the noisier the run is:

    rate = c (s² + ν²)^(1/2) T^(-t) r^(-g) / (1 + (ρ / ρ₁)^u)

with r the rank of LoRA. Both rank plans of one kind of model and data; where they were not measured they are guesses.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
import itertools
from collections.abc import Sequence

import numpy as np
from scipy import optimize


@dataclasses.dataclass(frozen=True)
class Measured:
    """One training of the table.

    Attributes:
        purpose: why it was made; ``grid`` is what the law is judged by, all others are what it is fitted to.
        num_steps, batch, noise_multiplier, num_bands, rank, records_per_user, learning_rate, seed: what was set.
        num_trained: trained weights.
        relative_noise: ρ.
        loss_before, loss: mean loss per token on the same records of held-out users, before and after.
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
    num_trained: int
    relative_noise: float
    loss_before: float
    loss: float

    @property
    def step_noise(self) -> float:
        """ν of independent noise."""
        return self.noise_multiplier * self.num_trained**0.5 / self.batch

    @property
    def point(self) -> Point:
        """What the law knows of it; for independent noise."""
        return Point(self.num_steps, self.step_noise, self.relative_noise, self.records_per_user, self.rank)


@dataclasses.dataclass(frozen=True)
class Point:
    """A plan as the law sees it.

    Attributes:
        num_steps: T.
        step_noise: ν.
        relative_noise: ρ.
        records_per_user: k.
        rank: of LoRA.
    """

    num_steps: int
    step_noise: float
    relative_noise: float
    records_per_user: int = 1
    rank: int = 4


@dataclasses.dataclass(frozen=True)
class Best:
    """The best learning rate of one setting of the table, between those tried, and the loss that it takes off."""

    point: Point
    seed: int
    learning_rate: float
    drop: float


@dataclasses.dataclass(frozen=True)
class NoiseLaw:
    """The fitted law.

    Attributes:
        half_steps, step_power: T₀ and a.
        half_noise, noise_power, record_power: ρ₀, p and κ.
        rate_scale, sampling_noise, rate_step_power, rank_power, rate_half_noise, rate_noise_power: c, s, t, g, ρ₁, u.
        num_runs, least_steps, most_steps: what it was fitted to.
    """

    half_steps: float
    step_power: float
    half_noise: float
    noise_power: float
    record_power: float
    rate_scale: float
    sampling_noise: float
    rate_step_power: float
    rank_power: float
    rate_half_noise: float
    rate_noise_power: float
    num_runs: int
    least_steps: int
    most_steps: int

    def gain(self, point: Point) -> float:
        """Return the predicted gain, a share of the most that there is."""
        return float(_gain(_of([point]), *dataclasses.astuple(self)[:5])[0])

    def learning_rate(self, point: Point) -> float:
        """Return the learning rate at which AdamW gains most."""
        scale, *others = dataclasses.astuple(self)[5:11]
        return scale * float(np.exp(_log_rate(_of([point]), 0.0, *others)[0]))


@functools.cache
def table() -> tuple[Measured, ...]:
    """Return the measured trainings; empty where the table was deleted to be measured again."""
    file = importlib.resources.files("privtrain.privacy") / "noise_law.csv"
    if not file.is_file():
        return ()
    kinds = {field.name: {"str": str, "int": int, "float": float}[str(field.type)] for field in _FIELDS}
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    return tuple(Measured(**{name: kinds[name](value) for name, value in row.items()}) for row in rows)


_FIELDS = dataclasses.fields(Measured)


@functools.cache
def fitted() -> NoiseLaw:
    """Return the law fitted to the table."""
    return fit([row for row in table() if row.purpose != "grid"])


def best_of(rows: Sequence[Measured]) -> list[Best]:
    """Return each setting's best learning rate: the vertex of a parabola through the three best in a row.

    A best one at the end of those tried stays as it is.
    """

    def setting(row: Measured) -> tuple[float, ...]:
        return row.num_steps, row.batch, row.noise_multiplier, row.num_bands, row.rank, row.records_per_user, row.seed

    found = []
    for _, group in itertools.groupby(sorted(rows, key=lambda r: (setting(r), r.learning_rate)), setting):
        runs = list(group)
        index = int(np.argmin([run.loss for run in runs]))
        rate, loss = np.log(runs[index].learning_rate), runs[index].loss
        if 0 < index < len(runs) - 1:
            near = runs[index - 1 : index + 2]
            curve = np.polyfit([np.log(run.learning_rate) for run in near], [run.loss for run in near], 2)
            rate, loss = -curve[1] / (2 * curve[0]), np.polyval(curve, -curve[1] / (2 * curve[0]))
        first = runs[0]
        found.append(Best(first.point, first.seed, float(np.exp(rate)), float(first.loss_before - loss)))
    return found


def fit(rows: Sequence[Measured]) -> NoiseLaw:
    """Fit the law by least squares: of the share of the gain, and of the logarithm of the best rate.

    Raises:
        ValueError: if there are fewer settings than parameters.
    """
    best = best_of(rows)
    if len(best) < 12:
        raise ValueError(f"{len(best)} settings; the law has 12 parameters. Run: python -m tests.bench.noise_law")
    points = _of([b.point for b in best])
    drops, rates = np.array([b.drop for b in best]), np.log([b.learning_rate for b in best])
    most = drops.max()
    gains = optimize.least_squares(
        lambda p: np.exp(p[5]) * _gain(points, *np.exp(p[:5])) - drops / most,
        np.log([16.0, 1.0, 1.0, 1.0, 0.5, 1.2]),
        bounds=(np.log([0.5, 0.3, 0.02, 0.3, 0.01, 0.8]), np.log([500, 3, 50, 4, 1, 4])),
    ).x
    # A learning rate that is off where nothing can be gained says nothing.
    weights = np.sqrt(np.clip(drops / most, 0.05, 1))
    speed = optimize.least_squares(
        lambda p: weights * (_log_rate(points, *p) - rates),
        [np.log(0.1), 1.0, 0.7, 0.0, 1.0, 1.0],
        bounds=([-12, 0.05, 0, -1, 0.02, 0.2], [4, 20, 1.5, 1, 50, 3]),
    ).x
    scale, *others = speed
    steps = [row.num_steps for row in rows]
    return NoiseLaw(
        *np.exp(gains[:5]).tolist(),
        float(np.exp(scale)),
        *map(float, others),
        num_runs=len(rows),
        least_steps=min(steps),
        most_steps=max(steps),
    )


def _of(points: Sequence[Point]) -> np.ndarray:
    return np.array([dataclasses.astuple(point) for point in points], dtype=np.float64).T


def _gain(
    points: np.ndarray, half_steps: float, step_power: float, half_noise: float, noise_power: float, record_power: float
) -> np.ndarray:
    steps, _, noise, records, _ = points
    of_steps = 1 + (half_steps / steps) ** step_power
    return 1 / (of_steps * (1 + (noise / (half_noise * records**record_power)) ** noise_power))


def _log_rate(
    points: np.ndarray,
    log_scale: float,
    sampling_noise: float,
    step_power: float,
    rank_power: float,
    half_noise: float,
    noise_power: float,
) -> np.ndarray:
    steps, step_noise, noise, _, rank = points
    spread = 0.5 * np.log(sampling_noise**2 + step_noise**2)
    shrunk = np.log1p((noise / half_noise) ** noise_power)
    return log_scale + spread - step_power * np.log(steps) - rank_power * np.log(rank) - shrunk
