"""``privtrain plan --optimize``: batch, steps, records and bands for a guarantee and a compute budget, before any data.

Looks at the configuration, the number of users and the number of trained weights alone. The ranking is that of
:mod:`privtrain.privacy.noise_law`, fitted on small runs on public text; ε of what is recommended is certified as any
plan's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import accountants
from privtrain.config import Config
from privtrain.config.privacy import MAX_UNITS, PrivacySection
from privtrain.errors import ConfigError, Fault
from privtrain.job.advice import MOST_TRAINED, law_learning_rate, law_point
from privtrain.privacy import noise_law
from privtrain.privacy.plan import PrivacyPlan, fast_accountant

#: Steps are powers of two, which many numbers of bands divide: those that were measured, and up to the configuration's.
_STEPS = tuple(2**n for n in range(3, 13))
_MOST_MEASURED = 256
#: Bands that are compared, also in the price list; the recommended plan takes the best of all (``num_bands: auto``).
BANDS = (1, 4, 16, 64)
#: Records of a user in a step that are compared, beside the configuration's.
_RECORDS = (1, 4)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to spend the compute.

    Attributes:
        num_steps, batch, records_per_unit, num_bands: what is chosen; the batch is the expected one.
        sampling_prob: batch over users.
        noise_multiplier: for the target ε.
        relative_noise: norm of the noise in the trained weights over the largest signal
            (:meth:`~privtrain.privacy.plan.PrivacyPlan.noise_of_run`, over all trained weights).
        predicted_gain: what training takes off the loss, in a unit that only ratios have a meaning in.
        learning_rate: of AdamW: the law's or, where more is trained than it knows, the given one, changed as the law
            changes between the plans.
    """

    num_steps: int
    batch: int
    records_per_unit: int
    num_bands: int
    sampling_prob: float
    noise_multiplier: float
    relative_noise: float
    predicted_gain: float
    learning_rate: float

    def overrides(self, config: Config) -> dict[str, Any]:
        """Return the keys to change in the configuration."""
        banded = {"privacy.noise": "banded", "privacy.sampling": "cyclic_poisson", "privacy.num_bands": self.num_bands}
        independent = {"privacy.noise": "independent", "privacy.sampling": "poisson", "privacy.num_bands": None}
        records = {"privacy.records_per_user": self.records_per_unit} if config.privacy.unit == "user" else {}
        return {
            "privacy.num_steps": self.num_steps,
            "privacy.expected_batch_size": self.batch,
            "privacy.sampling_prob": self.sampling_prob,
            **(banded if self.num_bands > 1 else independent),
            **records,
            "training.learning_rate": self.learning_rate,
        }


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The frontier: the best choice for each number of steps.

    Attributes:
        record_draws: the compute, in records that pass through the model.
        now: the plan as it stands; ``None`` where the law knows no such plan.
        frontier: for each number of steps the choice with the largest predicted gain.
        best: of these, the one with the largest predicted gain.
        rests_on: what the recommendations rest on, for readers.
    """

    record_draws: float
    now: Choice | None
    frontier: tuple[Choice, ...]
    best: Choice
    rests_on: tuple[str, ...]

    def to_json(self, config: Config) -> dict[str, Any]:
        """Return all of it as JSON, with the keys to change."""
        return {**dataclasses.asdict(self), "overrides": self.best.overrides(config)}


def optimize(config: Config, num_units: float, num_trained: int, record_draws: float) -> Optimum:
    """Return the frontier of a compute budget.

    Args:
        config: whose ε, δ, unit, optimizer and clipping stay.
        num_units: expected training units.
        num_trained: trained weights.
        record_draws: records that pass through the model in the whole run.

    Raises:
        ConfigError: if the configuration has no target ε or another sampler, or no choice can meet the target.
    """
    privacy = config.privacy
    faults = []
    if privacy.target_epsilon is None:
        faults.append(Fault("privacy.target_epsilon", "--optimize chooses the noise: give it in place of the noise"))
    if privacy.sampling not in ("poisson", "cyclic_poisson"):
        problem = f"given {privacy.sampling}; --optimize compares poisson and cyclic_poisson"
        faults.append(Fault("privacy.sampling", problem))
    if faults:
        raise ConfigError(faults)
    shape_now = _Shape(
        num_steps=privacy.num_steps,
        batch=round(privacy.expected_batch_size),
        records_per_unit=records_in_step(privacy),
        num_bands=_bands_now(config),
    )
    now = _choice(config, num_trained, shape_now)
    rate_scale = 1.0
    if now is not None and num_trained > MOST_TRAINED:
        # The law's own rates are too large for so many weights: the given rate is changed as the law changes.
        rate_scale = config.training.learning_rate / now.learning_rate
        now = dataclasses.replace(now, learning_rate=config.training.learning_rate)
    shapes = _shapes(config, num_units, record_draws)
    tried = [_choice(config, num_trained, shape, num_units=num_units, rate_scale=rate_scale) for shape in shapes]
    choices = [choice for choice in tried if choice is not None]
    if not choices:
        problem = f"no batch of {num_units:.0f} users within {record_draws:.0f} records meets it"
        raise ConfigError([Fault("privacy.target_epsilon", problem)])
    frontier, best = ranked(choices, num_trained)
    return Optimum(record_draws, now, frontier, best, _rests_on(config, best, num_trained))


def ranked(choices: Sequence[Choice], num_trained: int) -> tuple[tuple[Choice, ...], Choice]:
    """Return the choice with the largest predicted gain for each number of steps, and the best of these.

    Args:
        choices: at least one, and with any that has bands the same one without.
        num_trained: trained weights.
    """
    best_by_steps: dict[int, Choice] = {}
    for choice in _where_bands_help(choices, num_trained):
        best = best_by_steps.get(choice.num_steps)
        if best is None or choice.predicted_gain > best.predicted_gain:
            best_by_steps[choice.num_steps] = choice
    frontier = tuple(best_by_steps[num_steps] for num_steps in sorted(best_by_steps))
    return frontier, max(frontier, key=lambda choice: choice.predicted_gain)


def record_draws_of(privacy: PrivacySection) -> float:
    """Return the most records that the plan as it stands passes through the model."""
    return privacy.num_steps * privacy.expected_batch_size * records_in_step(privacy)


def records_in_step(privacy: PrivacySection) -> int:
    """Return the most records of a unit in a step."""
    return 1 if privacy.unit == "example" else privacy.records_per_user or 1


class _Shape(NamedTuple):
    """What is chosen of a plan, with the field names of :class:`Choice`; ``batch`` is the expected one."""

    num_steps: int
    batch: int
    records_per_unit: int
    num_bands: int


def _shapes(config: Config, num_units: float, record_draws: float) -> Iterator[_Shape]:
    """Yield the shapes that spend the budget: steps x batch x records of a unit are about ``record_draws``."""
    privacy = config.privacy
    choices_of_k = {1} if privacy.unit == "example" else {records_in_step(privacy), *_RECORDS}
    choices_of_bands = BANDS if can_be_banded(config) else (1,)
    # With more steps than these the law only says that more are better, down to a batch of one.
    most_steps = max(_MOST_MEASURED, privacy.num_steps)
    choices_of_steps = sorted(num_steps for num_steps in {*_STEPS, privacy.num_steps} if num_steps <= most_steps)
    for records, num_steps in itertools.product(sorted(choices_of_k), choices_of_steps):
        batch = int(record_draws / (num_steps * records))
        if not 1 <= batch <= min(num_units, MAX_UNITS):
            continue
        for num_bands in choices_of_bands:
            # Bands divide the steps, and split the users into as many groups, each at least as large as the batch.
            if num_steps % num_bands == 0 and num_bands * batch <= num_units:
                yield _Shape(num_steps, batch, records, num_bands)


def _where_bands_help(choices: Sequence[Choice], num_trained: int) -> list[Choice]:
    """Leave out bands where a step of independent noise has less noise than signal, by their norms.

    AdamW divides by a step's noise, of which bands have more, and the law knows the noise in the weights alone. Of the
    measured trainings of 8 and 16 steps whose noise was 0.6 times the signal, those with 4 and 8 bands gained a tenth
    less than those without.
    """

    def without_bands(choice: Choice) -> tuple[int, int, int]:
        """Return what the choice shares with the one of independent noise."""
        return choice.num_steps, choice.batch, choice.records_per_unit

    step_noise = {}  # of independent noise: norm of a step's noise over the largest norm of its signal
    for choice in choices:
        if choice.num_bands == 1:
            step_noise[without_bands(choice)] = choice.noise_multiplier / choice.batch * math.sqrt(num_trained)
    return [
        choice for choice in choices if choice.num_bands == 1 or step_noise.get(without_bands(choice), math.inf) > 1
    ]


def can_be_banded(config: Config) -> bool:
    """Return whether the configuration would be accepted with correlated noise in place of what it asks for."""
    banded = {"noise": "banded", "sampling": "cyclic_poisson", "num_bands": 1}
    privacy = config.privacy.model_copy(update=banded)
    return not any(privacy.conflicts()) and not any(config.model_copy(update={"privacy": privacy}).conflicts())


def _bands_now(config: Config) -> int:
    """Return the bands of the configured plan: 1 where its noise is independent."""
    if config.privacy.noise != "banded":
        return 1
    plan = PrivacyPlan.uncertified(config.privacy, config.training)
    return 1 if plan.strategy is None else plan.strategy.num_bands


def _choice(
    config: Config, num_trained: int, shape: _Shape, *, num_units: float | None = None, rate_scale: float = 1.0
) -> Choice | None:
    """Return the choice of a shape with the noise that it needs; ``None`` if no noise is enough.

    Args:
        config: whose ε, δ, unit, optimizer and clipping stay.
        num_trained: trained weights.
        shape: steps, batch, records of a unit and bands.
        num_units: expected training units; ``None``: the configured sampling probability stays.
        rate_scale: factor of the law's learning rate.
    """
    privacy, training = config.privacy, config.training
    prob = privacy.sampling_prob if num_units is None else float(f"{shape.batch / num_units:.4g}")
    assert prob is not None, "Poisson sampling has it"
    is_banded = shape.num_bands > 1
    update: dict[str, Any] = {
        "num_steps": shape.num_steps,
        "expected_batch_size": float(shape.batch),
        "sampling_prob": min(prob, 1.0),
        "noise": "banded" if is_banded else "independent",
        "sampling": "cyclic_poisson" if is_banded else "poisson",
        "num_bands": shape.num_bands if is_banded else None,
        "records_per_user": shape.records_per_unit if privacy.unit == "user" else privacy.records_per_user,
        "accountant": fast_accountant(privacy.accountant or "pld"),
    }
    try:
        plan = PrivacyPlan.uncertified(privacy.model_copy(update=update), training)
    except accountants.CalibrationError:
        return None
    if not plan.has_room:
        return None
    point = law_point(config, plan, num_trained)
    return Choice(
        **shape._asdict(),
        sampling_prob=update["sampling_prob"],
        noise_multiplier=plan.noise_multiplier,
        relative_noise=point.relative_noise,
        predicted_gain=noise_law.fitted().gain(point),
        learning_rate=float(f"{rate_scale * law_learning_rate(point, training):.2g}"),
    )


def _rests_on(config: Config, best: Choice, num_trained: int) -> tuple[str, ...]:
    """Return in sentences what the recommended plan was derived from, and where that ends."""
    law, clipping = noise_law.fitted(), config.privacy.clipping_style
    where = (
        f"{law.num_runs} trainings of a Llama of half a million weights on synthetic customers, {law.least_steps} to "
        f"{law.most_steps} steps"
    )
    rate = "learning rate: the rate that was best in those trainings, by steps, noise and rank"
    if num_trained > MOST_TRAINED:
        rate = (
            f"learning rate: yours of {config.training.learning_rate:g}, changed as the best rate of those trainings "
            f"changes between the plans; {num_trained:,} trained weights are too many to take that rate itself"
        )
    limits = [
        f"batch, steps and records of a user: a law of loss against steps and noise in the trained weights, fitted to "
        f"{where}; it ranks plans, and no loss of yours is predicted by it",
        "bands: the predicted noise in the trained weights at the same certified ε, where a step has more noise than "
        "signal; with less, bands lost in those trainings",
        rate,
        f"clipping: kept ({clipping}, norm {config.privacy.clipping_norm:g}); AdamW's steps do not depend on the norm "
        "once most units are clipped, and how many are is private",
    ]
    if not law.least_steps <= best.num_steps <= law.most_steps:
        limits.append(f"{best.num_steps} steps are outside what was measured: the law goes on as it was within")
    if config.training.method != "lora":
        limits.append(f"training.method: {config.training.method} was not measured: take the learning rate as a start")
    return tuple(limits)
