"""The value that every accountant returns: an interval, and how far each end may be trusted."""

from __future__ import annotations

import dataclasses
import enum
import math


class BoundKind(enum.StrEnum):
    """What a number may be used for."""

    CERTIFIED_UPPER = "certified_upper"
    CERTIFIED_LOWER = "certified_lower"
    ESTIMATE = "estimate"
    ASYMPTOTIC = "asymptotic"


@dataclasses.dataclass(frozen=True)
class PrivacyAnswer:
    """One accountant's answer for one event.

    Attributes:
        quantity: ``"epsilon"`` or ``"delta"``.
        lower: the largest value known to lie at or below the truth (0 if nothing better is known).
        estimate: the accountant's best point value.
        upper: the smallest value known to lie at or above the truth (infinity if nothing better is known).
        kind: what the answer certifies; calibration and release accept ``CERTIFIED_UPPER`` only.
        method: the accountant's name, for example ``"pld"``.
        version: library and version that computed it.
    """

    quantity: str
    lower: float
    estimate: float
    upper: float
    kind: BoundKind
    method: str
    version: str

    def __post_init__(self) -> None:
        assert not any(math.isnan(value) for value in (self.lower, self.estimate, self.upper)), self
        assert self.lower <= self.upper, self

    def certified_upper(self) -> float:
        """The upper end, or an error if this accountant does not certify one.

        Raises:
            ValueError: if ``kind`` is not ``CERTIFIED_UPPER``.
        """
        if self.kind is not BoundKind.CERTIFIED_UPPER:
            raise ValueError(f"{self.method} gives a value of kind {self.kind.value!r}, not a certified upper bound")
        return self.upper
