"""Sampling schemes: each draws the units of a step and states the DP event that accounts for the draw.

One value for both, so that sampler and accountant cannot disagree: every constant that a draw depends on is a field
that :meth:`Scheme.event` reads. Public: the fields and this code. Secret: the key, and therefore who was drawn.

A draw is a pure function of (key, epoch, number of units), the same on every rank. *Epoch* is the scheme's own period:
one step for Poisson sampling. A *generation* is a stretch of a run under one secret key. A new one begins a new epoch;
an epoch that it cuts short stays charged as a whole, because a part of an epoch is post-processing of all of it.
Privacy amplification by sampling assumes that the draw stays secret, so nothing here is logged outside ``secret/``.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

import accountants
from privtrain.config.privacy import MAX_UNITS, PrivacySection
from privtrain.config.schemes import SCHEME_RULES, SchemeName
from privtrain.errors import ConfigError, Fault
from privtrain.privacy.secret import SecretKey

#: Our name of a neighbouring relation -> dp_accounting's.
RELATIONS = {"add_or_remove_one": "ADD_OR_REMOVE_ONE", "zero_out": "REPLACE_SPECIAL"}


@dataclasses.dataclass(frozen=True)
class Scheme(abc.ABC):
    """A sampling scheme, with the DP event that accounts for it.

    Attributes:
        name: as in ``privacy.sampling``; :mod:`privtrain.config.schemes` has what goes with it.
        to_draw_fewer: which key of ``privacy`` to change, and how, so that a step draws fewer units.
    """

    name: ClassVar[SchemeName]
    to_draw_fewer: ClassVar[tuple[str, str]]

    @property
    def accountants(self) -> tuple[str, ...]:
        """Accountants that can certify the scheme; the first is the default."""
        return SCHEME_RULES[self.name].accountants

    @property
    @abc.abstractmethod
    def rate(self) -> float:
        """Marginal probability that a unit joins a given step."""

    @property
    def num_places(self) -> int | None:
        """Fixed public number of places to draw from, each filled by a unit or empty; ``None`` without places."""
        return None

    def most_expected(self, num_units: float) -> float:
        """Return the expected number of units in a step out of ``num_units``, or the batch limit if that is less."""
        return self.rate * num_units

    @property
    def period(self) -> int:
        """Steps per epoch: a unit's steps within one epoch are drawn together."""
        return 1

    @abc.abstractmethod
    def event(self, noise_multiplier: float, num_epochs: int) -> Any:
        """Return the event of ``num_epochs`` epochs, as :mod:`accountants` reads it.

        ``noise_multiplier`` is the noise's standard deviation over the sensitivity of a step's sum.
        """

    @abc.abstractmethod
    def epoch(self, key: SecretKey, epoch: int, num_units: int) -> list[np.ndarray]:
        """Return, for each step of an epoch, the sorted indices of its units."""

    @property
    @abc.abstractmethod
    def assumption(self) -> str:
        """The sampling assumption, as a sentence of the privacy statement."""

    def event_of_steps(self, noise_multiplier: float, num_steps: int) -> Any:
        """Return the event of ``num_steps`` steps of one key; an unfinished epoch counts as a whole one."""
        num_epochs = self.whole_steps(num_steps) // self.period
        return self.event(noise_multiplier, num_epochs)

    def whole_steps(self, num_steps: int) -> int:
        """Return ``num_steps`` rounded up to whole epochs."""
        return math.ceil(num_steps / self.period) * self.period

    def accounted_steps(self, generations: Iterable[int]) -> int:
        """Return the steps to account for: those begun in each generation, rounded up to whole epochs.

        Args:
            generations: of every step that was begun, the number of its generation.
        """
        return sum(self.whole_steps(count) for count in Counter(generations).values())

    def parameters(self) -> dict[str, Any]:
        """Return the scheme's name and constants by name, for the privacy statement."""
        return {"scheme": self.name, "sampling_prob": self.rate, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Poisson(Scheme):
    """Poisson sampling: each unit joins each step independently with probability ``sampling_prob``."""

    name = "poisson"
    to_draw_fewer = "sampling_prob", "lower"
    sampling_prob: float

    @property
    @override
    def rate(self) -> float:
        return self.sampling_prob

    @override
    def event(self, noise_multiplier: float, num_epochs: int) -> Any:
        return accountants.dp_sgd_event(
            noise_multiplier=noise_multiplier, sampling_prob=self.sampling_prob, num_steps=num_epochs
        )

    @override
    def epoch(self, key: SecretKey, epoch: int, num_units: int) -> list[np.ndarray]:
        return [np.flatnonzero(key.stream("sample", epoch).uniform(num_units) < self.sampling_prob)]

    @property
    @override
    def assumption(self) -> str:
        return f"Each unit joins each step by a secret coin of its own, with probability {self.sampling_prob:g}."


@dataclasses.dataclass(frozen=True)
class CyclicPoisson(Scheme):
    """Poisson sampling of ``num_bands`` groups in turn (Choquette-Choo et al. 2023, arXiv 2306.08153, section 5).

    A secret coin puts each unit into one group for good; the steps of an epoch draw from one group each, with
    probability ``num_bands * sampling_prob``. So two steps of a unit are at least ``num_bands`` apart, which is what
    the sensitivity of a banded strategy (:mod:`privtrain.privacy.banded`) rests on, and an epoch is one Gaussian
    release of a unit with that probability. ``noise_multiplier`` is relative to the strategy's column norm. The group
    may be known: the amplification is that of the second coin alone.

    Raises:
        ValueError: if there is no group, or the probability within a group would be above 1.
    """

    name = "cyclic_poisson"
    to_draw_fewer = "sampling_prob", "lower"
    sampling_prob: float
    num_bands: int

    def __post_init__(self) -> None:
        if type(self.num_bands) is not int or self.num_bands < 1 or not 0 <= self.group_prob <= 1:
            raise ValueError(f"{self.num_bands!r} groups of probability {self.sampling_prob!r} a step cannot be drawn")

    @property
    @override
    def rate(self) -> float:
        return self.sampling_prob

    @property
    def group_prob(self) -> float:
        """Chance that a unit joins the one step of an epoch that draws from its group."""
        return self.num_bands * self.sampling_prob

    @property
    @override
    def period(self) -> int:
        return self.num_bands

    def event(self, noise_multiplier: float, num_epochs: int) -> Any:
        """Return the event of Poisson-sampled Gaussian mechanisms, one an epoch."""
        return accountants.dp_sgd_event(
            noise_multiplier=noise_multiplier, sampling_prob=self.group_prob, num_steps=num_epochs
        )

    def epoch(self, key: SecretKey, epoch: int, num_units: int) -> list[np.ndarray]:
        """Draw the units of one step a group; a unit's group is the same in every epoch of a key."""
        # The remainder of a 64-bit integer is uniform up to num_bands / 2**64.
        groups = key.stream("group").uint64(num_units) % np.uint64(self.num_bands)
        is_drawn = key.stream("sample", epoch).uniform(num_units) < self.group_prob
        return [np.flatnonzero(is_drawn & (groups == np.uint64(group))) for group in range(self.num_bands)]

    @property
    @override
    def assumption(self) -> str:
        return (
            f"A secret coin puts each unit into one of {self.num_bands} groups for as long as one key is used; steps "
            "draw from the groups in turn, each unit of the group by a secret coin of its own with probability "
            f"{self.group_prob:g}. The steps of a unit are thus at least {self.num_bands} apart. A round of the groups "
            "that was begun is charged as a whole."
        )


@dataclasses.dataclass(frozen=True)
class TruncatedPoisson(Scheme):
    """Poisson sampling cut to ``max_batch_size`` by a uniform subset (Ganesh et al. 2025, arXiv 2508.15089).

    ``max_num_units`` places toss coins and compete for the batch; those without a unit contribute nothing. The number
    of competitors is thereby a public constant, as the analysis needs, and adding or removing a unit is exactly
    zero-out: a place is filled or empty and nobody else's chances change.
    """

    name = "truncated_poisson"
    to_draw_fewer = "max_batch_size", "lower"
    sampling_prob: float
    max_batch_size: int
    max_num_units: int

    @property
    @override
    def rate(self) -> float:
        return self.sampling_prob

    @override
    def most_expected(self, num_units: float) -> float:
        return min(super().most_expected(num_units), self.max_batch_size)

    @property
    @override
    def num_places(self) -> int:
        return self.max_num_units

    @override
    def event(self, noise_multiplier: float, num_epochs: int) -> Any:
        return accountants.truncated_poisson_event(
            noise_multiplier=noise_multiplier,
            sampling_prob=self.sampling_prob,
            max_batch_size=self.max_batch_size,
            num_units=self.max_num_units,
            num_steps=num_epochs,
        )

    @override
    def epoch(self, key: SecretKey, epoch: int, num_units: int) -> list[np.ndarray]:
        # Places, of which the first `num_units` are filled by a unit each.
        drawn = np.flatnonzero(key.stream("sample", epoch).uniform(self.max_num_units) < self.sampling_prob)
        if len(drawn) > self.max_batch_size:
            drawn = drawn[key.stream("truncate", epoch).choose(len(drawn), self.max_batch_size)]
        return [drawn[drawn < num_units]]

    @property
    @override
    def assumption(self) -> str:
        return (
            f"Each of {self.max_num_units} places joins each step by a secret coin with probability "
            f"{self.sampling_prob:g}; of more than {self.max_batch_size} a uniform subset of that size is kept. Places "
            "without a unit compete too, so adding or removing a unit fills or empties a place (zero-out) and changes "
            "nobody else's chances. The number of places is public."
        )


@dataclasses.dataclass(frozen=True)
class RandomAllocation(Scheme):
    """Every epoch of ``steps_per_epoch`` steps, each unit joins ``steps_per_unit`` of them, chosen uniformly.

    Units choose independently of each other, so one unit's arrival moves nobody. Feldman and Shenfeld 2025 (arXiv
    2502.08202), 2026 (arXiv 2602.17284); with one step a unit also known as balls-and-bins.
    """

    name = "random_allocation"
    to_draw_fewer = "steps_per_epoch", "raise"
    steps_per_epoch: int
    steps_per_unit: int = 1

    @property
    @override
    def rate(self) -> float:
        return self.steps_per_unit / self.steps_per_epoch

    @property
    @override
    def period(self) -> int:
        return self.steps_per_epoch

    @override
    def event(self, noise_multiplier: float, num_epochs: int) -> Any:
        return accountants.random_allocation_event(
            noise_multiplier=noise_multiplier,
            num_steps=self.steps_per_epoch,
            num_selected=self.steps_per_unit,
            num_epochs=num_epochs,
        )

    def epoch(self, key: SecretKey, epoch: int, num_units: int) -> list[np.ndarray]:
        """Draw each unit's steps without replacement (Floyd's algorithm), for all units at once.

        Of E steps, k are wanted. Round i draws from steps 0 to E - k + i, and takes the last of them if the step drawn
        was taken before.
        """
        shape = num_units, self.steps_per_unit
        draws = key.stream("allocation", epoch).uint64(math.prod(shape)).reshape(shape)
        chosen = np.empty(shape, dtype=np.int64)  # [units, i]: each unit's steps, in the order of rounds
        for i, last in enumerate(range(self.steps_per_epoch - self.steps_per_unit, self.steps_per_epoch)):
            # The remainder of a 64-bit integer is uniform up to (last + 1) / 2**64.
            candidate = (draws[:, i] % np.uint64(last + 1)).astype(np.int64)
            taken = (chosen[:, :i] == candidate[:, None]).any(axis=1)
            chosen[:, i] = np.where(taken, last, candidate)
        # Turn (unit, step) around: sort all pairs by step, units in order within a step, and cut where a step ends.
        units = np.repeat(np.arange(num_units), self.steps_per_unit)
        order = np.argsort(chosen.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(chosen.ravel(), minlength=self.steps_per_epoch))
        return np.split(units[order], ends[:-1])

    @property
    @override
    def assumption(self) -> str:
        return (
            f"In every epoch of {self.steps_per_epoch} steps each unit joins {self.steps_per_unit}, chosen uniformly, "
            "in secret and independently of the other units. An epoch that was begun is charged as a whole."
        )


@dataclasses.dataclass(frozen=True)
class Shuffle(Scheme):
    """Every epoch shuffles ``max_num_units`` places into ``steps_per_epoch`` batches of equal size (up to one).

    Accounted *without* amplification, as if the order were known: one Gaussian release of a unit an epoch. No better
    upper bound is known, and shuffling certainly costs far more than Poisson sampling at the same rate
    (``tests/accountants/shuffling.py``). Empty places are shuffled too: see :class:`TruncatedPoisson`.
    """

    name = "shuffle"
    to_draw_fewer = "steps_per_epoch", "raise"
    steps_per_epoch: int
    max_num_units: int

    @property
    @override
    def rate(self) -> float:
        return 1 / self.steps_per_epoch

    @property
    @override
    def period(self) -> int:
        return self.steps_per_epoch

    @property
    @override
    def num_places(self) -> int:
        return self.max_num_units

    @override
    def event(self, noise_multiplier: float, num_epochs: int) -> Any:
        return accountants.shuffled_event(
            noise_multiplier=noise_multiplier, num_batches=self.steps_per_epoch, num_epochs=num_epochs
        )

    def epoch(self, key: SecretKey, epoch: int, num_units: int) -> list[np.ndarray]:
        """Shuffle the places by ranking 64-bit draws; P(tie) is below ``max_num_units**2 / 2**65``.

        The first ``num_units`` places are filled by a unit each, the others are left out of every batch.
        """
        order = np.argsort(key.stream("shuffle", epoch).uint64(self.max_num_units), kind="stable")
        batches = np.array_split(order, self.steps_per_epoch)
        return [np.sort(batch[batch < num_units]) for batch in batches]

    @property
    @override
    def assumption(self) -> str:
        return (
            f"Every epoch shuffles {self.max_num_units} places into {self.steps_per_epoch} batches; each unit joins one"
            " step an epoch. No amplification by the shuffle is claimed: the guarantee holds even if the order is "
            "known. Places without a unit are shuffled too, so adding or removing a unit (zero-out) moves nobody else. "
            "The number of places is public. An epoch that was begun is charged as a whole."
        )


SCHEMES: dict[str, type[Scheme]] = {
    cls.name: cls for cls in (Poisson, CyclicPoisson, TruncatedPoisson, RandomAllocation, Shuffle)
}


def relation_of(name: str) -> Any:
    """Return the neighbouring relation of a name in :data:`RELATIONS`, as :mod:`accountants` reads it."""
    from accountants.api import NeighboringRelation  # dp-accounting takes a second to import

    return NeighboringRelation[RELATIONS[name]]


def scheme_of(privacy: PrivacySection) -> Scheme:
    """Return the configured scheme; the config schema guarantees that its keys are set."""
    cls = SCHEMES[privacy.sampling]
    values = {field.name: getattr(privacy, field.name) for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if value is not None})


def scheme_from_statement(sampling: Mapping[str, Any]) -> Scheme | None:
    """Return the scheme that a privacy statement describes.

    Args:
        sampling: what :meth:`Scheme.parameters` returned for it.

    Returns:
        ``None`` if there is no scheme of that name, or a constant is missing or not allowed.
    """
    cls = SCHEMES.get(str(sampling.get("scheme")))
    if cls is None:
        return None
    values = {field.name: sampling.get(field.name) for field in dataclasses.fields(cls)}
    try:
        return None if None in values.values() else cls(**values)
    except (TypeError, ValueError):
        return None


@dataclasses.dataclass(frozen=True)
class DrawnUnit:
    """A unit that joined a step, with the records it contributes.

    Attributes:
        unit: index into the run's units.
        record_indices: at most k distinct indices of that unit's records.
    """

    unit: int
    record_indices: tuple[int, ...]


class UnitSampler:
    """Sampler of the units of each step by a scheme, with at most k random records of each.

    Which records a unit brings does not affect the guarantee: the unit is clipped once whatever it brings. The records
    are drawn afresh in each step, so over a run all of a user's records can be seen.

    Args:
        scheme: how units are drawn.
        records_per_unit: k.
        key: the secret of the run's current generation.
        num_records: number of records of every unit, in unit order.
        first_step: the first step of the generation, with which its first epoch begins.

    Raises:
        ConfigError: if there are more units than the scheme has places for, or than a step can add up.
    """

    def __init__(
        self,
        scheme: Scheme,
        records_per_unit: int,
        key: SecretKey,
        num_records: Sequence[int] | np.ndarray,
        first_step: int = 0,
    ) -> None:
        limit = scheme.num_places
        if limit is not None and len(num_records) > limit:
            fault = f"given {limit}, but there are {len(num_records)} training units; raise it"
            raise ConfigError([Fault("privacy.max_num_units", fault)])
        check_step_size(scheme, len(num_records))
        self._scheme = scheme
        self._records_per_unit = records_per_unit
        self._key = key
        self._num_records = np.asarray(num_records, dtype=np.int64)
        self._first_step = first_step
        # The epoch drawn last, and the units of each of its steps: kept, since a draw is for a whole epoch.
        self._epoch_drawn: int | None = None
        self._units_by_step: list[np.ndarray] = []

    def draw(self, step: int) -> list[DrawnUnit]:
        """Return the units of a step in increasing order; possibly none."""
        epoch, position = divmod(step - self._first_step, self._scheme.period)
        assert epoch >= 0, (step, self._first_step)
        if self._epoch_drawn != epoch:
            self._units_by_step = self._scheme.epoch(self._key, epoch, len(self._num_records))
            self._epoch_drawn = epoch
        units = self._units_by_step[position].tolist()
        return [DrawnUnit(unit, self._record_indices_of(unit, step)) for unit in units]

    def _record_indices_of(self, unit: int, step: int) -> tuple[int, ...]:
        """Draw the records that a unit brings to a step."""
        stream = self._key.stream("records", step, unit)
        return tuple(stream.choose(int(self._num_records[unit]), self._records_per_unit))


def check_step_size(scheme: Scheme, num_units: float) -> None:
    """Raise unless int64 holds the sum of any step: see :mod:`privtrain.clipping.exact_sum`.

    A draw's size spreads by at most √MAX_UNITS = 1448 about the expected one, and an overflow needs twice MAX_UNITS.

    Raises:
        ConfigError: naming the key that decides.
    """
    num_drawn = scheme.most_expected(num_units)
    if num_drawn > MAX_UNITS:
        key, how = scheme.to_draw_fewer
        raise ConfigError(
            [
                Fault(
                    f"privacy.{key}",
                    f"given {getattr(scheme, key):g}; with {num_units:,.0f} training units a step draws "
                    f"{num_drawn:,.0f} of them, and integers hold the sum of {MAX_UNITS:,}: {how} it",
                )
            ]
        )


def assign_to_ranks(drawn: Sequence[DrawnUnit], costs: Sequence[int], num_ranks: int) -> list[list[DrawnUnit]]:
    """Assign whole units to ranks: counts differ by at most one, and a snake order evens out the costs.

    Args:
        drawn: the units of the step.
        costs: a positive cost for each of them: its longest record, so that rows of similar length share a microbatch.
        num_ranks: world size.

    Returns:
        For every rank its units, in decreasing cost, so that neighbours have similar lengths.
    """
    # Dearest first; units of equal cost by their index, so that every rank has the same order.
    order = sorted(range(len(drawn)), key=lambda i: (-costs[i], drawn[i].unit))
    shares: list[list[DrawnUnit]] = [[] for _ in range(num_ranks)]
    for position, i in enumerate(order):
        # Snake order: ranks get a unit each from the first to the last, then from the last to the first, and so on.
        round_number, place = divmod(position, num_ranks)
        rank = place if round_number % 2 == 0 else num_ranks - 1 - place
        shares[rank].append(drawn[i])
    return shares
