"""The value that every accountant returns: an interval, and how far each end may be trusted."""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

#: The version that answers of our own methods carry; raised whenever a number may change.
OWN_VERSION = "accountants 1"


class BoundKind(enum.StrEnum):
    """How far a number may be trusted.

    The certified kinds are proven bounds on the truth. An estimate may err to either side; an asymptotic value is exact
    only in the limit of infinitely many steps.
    """

    CERTIFIED_UPPER = "certified_upper"
    CERTIFIED_LOWER = "certified_lower"
    ESTIMATE = "estimate"
    ASYMPTOTIC = "asymptotic"


class Direction(enum.StrEnum):
    """Which of the two orders of a neighbouring pair an answer covers.

    With P the law of the output without the unit and Q with it, *remove* bounds Q(S) - e^eps P(S) over all sets S of
    outputs, and *add* bounds P(S) - e^eps Q(S). A guarantee needs both.
    """

    REMOVE = "remove"
    ADD = "add"
    BOTH = "both"


class UnsupportedEventError(ValueError):
    """An accountant was given an event, or a neighbouring relation, that it cannot bound."""


class NotCertifiedError(ValueError):
    """A number that is no certified upper bound was about to be used as one."""


@dataclasses.dataclass(frozen=True)
class PrivacyAnswer:
    """One accountant's answer for one event.

    Attributes:
        quantity: ``"epsilon"`` or ``"delta"``.
        lower: the largest value known to lie at or below the truth (0 if nothing better is known).
        estimate: the accountant's best point value.
        upper: the smallest value known to lie at or above the truth (infinity if nothing better is known).
        kind: what the answer certifies; calibration and release accept ``CERTIFIED_UPPER`` only. Where the kind is
            ``ESTIMATE`` or ``ASYMPTOTIC``, ``lower`` is 0 and ``upper`` infinite: nothing is known.
        method: the accountant's name, for example ``"pld"``.
        version: library and version that computed it.
        direction: the order of the neighbouring pair that the answer covers.
        relation: the neighbouring relation, by dp_accounting's names.
        note: what a reader of the number must know, for example ``"vacuous: ..."``; empty if nothing.
    """

    quantity: str
    lower: float
    estimate: float
    upper: float
    kind: BoundKind
    method: str
    version: str
    direction: Direction = Direction.BOTH
    relation: str = "ADD_OR_REMOVE_ONE"
    note: str = ""

    def __post_init__(self) -> None:
        assert not any(math.isnan(value) for value in (self.lower, self.estimate, self.upper)), self
        assert 0 <= self.lower <= self.upper, self
        if self.kind in (BoundKind.ESTIMATE, BoundKind.ASYMPTOTIC):
            assert self.lower == 0, self
            assert math.isinf(self.upper), self

    @property
    def is_certified(self) -> bool:
        """Whether ``upper`` is a certified bound for both directions."""
        return self.kind is BoundKind.CERTIFIED_UPPER and self.direction is Direction.BOTH

    def certified_upper(self, relation: str = "ADD_OR_REMOVE_ONE") -> float:
        """Return the upper end, if a guarantee under ``relation`` may be built on it: the one gate for such numbers.

        Raises:
            NotCertifiedError: if the answer is no certified upper bound, covers one direction only, or is about
                another relation; a ``ValueError``.
        """
        faults: list[str] = []
        if self.kind is not BoundKind.CERTIFIED_UPPER:
            faults.append(f"is of kind {self.kind.value!r}, not a certified upper bound")
        if self.direction is not Direction.BOTH:
            faults.append(f"covers the {self.direction.value} direction only")
        if self.relation != relation:
            faults.append(f"is about {self.relation}, where the guarantee is about {relation}")
        if faults:
            raise NotCertifiedError(f"{self.method}'s {self.quantity} " + " and ".join(faults))
        return self.upper

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of JSON scalars; infinity becomes the string ``"inf"``, which strict JSON allows."""
        record = dataclasses.asdict(self)
        for key in ("lower", "estimate", "upper"):
            if math.isinf(record[key]):
                record[key] = "inf"
        return record | {"kind": self.kind.value, "direction": self.direction.value}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PrivacyAnswer:
        """Return the inverse of :meth:`to_json`."""
        values = dict(record)
        for key in ("lower", "estimate", "upper"):
            values[key] = float(values[key])
        values["kind"] = BoundKind(values["kind"])
        values["direction"] = Direction(values["direction"])
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds computed by a method, without the metadata of an answer.

    Attributes:
        lower, upper: as in :class:`PrivacyAnswer`.
        direction: the order of the neighbouring pair that is covered. A method that has bounded both orders may name
            the one with the larger upper end here until it makes its answer.
        estimate: the best point value; None for the middle of the interval.
        kind: as in :class:`PrivacyAnswer`.
        note: as in :class:`PrivacyAnswer`.
    """

    lower: float
    upper: float
    direction: Direction = Direction.BOTH
    estimate: float | None = None
    kind: BoundKind = BoundKind.CERTIFIED_UPPER
    note: str = ""

    @property
    def best(self) -> float:
        """The point value."""
        if self.estimate is not None:
            return self.estimate
        return self.upper if math.isinf(self.upper) else (self.lower + self.upper) / 2


def point(value: float, kind: BoundKind = BoundKind.ESTIMATE, direction: Direction = Direction.BOTH) -> Bounds:
    """Return the bounds of a mere estimate: nothing is certain, so the interval is from 0 to infinity."""
    return Bounds(0.0, math.inf, direction, value, kind)
