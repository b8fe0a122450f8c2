"""What an attack is: a number per document (or per unit, given other models), and what it must be given.

An attack never sees who was trained on and never runs a model: it reads signals, per-token log-probabilities of each
document. A higher score means more member-like; this is fixed before any data is seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from attacks.analysis.arrays import BoolArray, FloatArray
from attacks.signals import DocumentSignals


@dataclasses.dataclass(frozen=True)
class DocumentAttack:
    """An attack that scores each document by itself.

    Attributes:
        name: unique.
        definition: one line for the report, with the paper.
        score: signals to a finite number; higher is more member-like.
        needs: fields of the signals that must be there, for example ``target_correct`` or ``variants.lowercase``.
    """

    name: str
    definition: str
    score: Callable[[DocumentSignals], float]
    needs: tuple[str, ...] = ()

    def missing(self, row: DocumentSignals) -> str | None:
        """Return the first entry of ``needs`` that the row lacks; None if it lacks none."""
        for need in self.needs:
            field, _, key = need.partition(".")  # "variants.lowercase": the key "lowercase" of the field "variants"
            value = getattr(row, field)
            if value is None or (key and key not in value):
                return need
        return None


@dataclasses.dataclass(frozen=True)
class UnderOtherModels:
    """The same units under the attacked model and under k shadow models.

    Attributes:
        target: [units] mean log-probability per token under the attacked model.
        shadows: [units, k] the same under each shadow.
        is_in: [units, k] whether the shadow was trained on the unit's owner.
    """

    target: FloatArray
    shadows: FloatArray
    is_in: BoolArray

    def mean_where(self, chosen: BoolArray) -> FloatArray:
        """Return each unit's mean over the chosen shadows; NaN where there is none."""
        counts = chosen.sum(axis=1)
        sums = np.where(chosen, self.shadows, 0.0).sum(axis=1)
        return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


@dataclasses.dataclass(frozen=True)
class ReferenceAttack:
    """An attack that compares a unit under the attacked model with the same unit under shadow models.

    Attributes:
        name: unique.
        definition: one line for the report, with the paper.
        score: one number per unit; higher is more member-like.
        min_in: shadows that must have been trained on each unit's owner.
        min_out: shadows that must not.
    """

    name: str
    definition: str
    score: Callable[[UnderOtherModels], FloatArray]
    min_in: int = 0
    min_out: int = 1


Attack = DocumentAttack | ReferenceAttack
