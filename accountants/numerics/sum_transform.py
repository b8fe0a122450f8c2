"""The Fourier transform of a sum of independent steps, from the steps' own transforms, with a bound on its error.

A law is *tilted* by e^(tS): its density is multiplied by that and divided by the normaliser M(t) = E[e^(tS)]. The
tilted law of a sum of independent steps is that of the sum of tilted steps, so its transform is the product of theirs,
and its normaliser the product of theirs.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

from typing import Any

import numpy as np

from accountants.mixtures import Array
from accountants.numerics.tails import UNIT

ComplexArray = np.typing.NDArray[np.complexfloating[Any, Any]]


class SumTransform:
    """The transform of the tilted law of a sum S, at some frequencies; that of S = 0 until steps are added.

    Attributes:
        log_transform: [frequencies] log of the transform.
        log_envelope: [frequencies] log of a bound on its size, all errors included.
        relative_error: [frequencies] a bound on its relative error: the sum of those of all steps.
        log_moment: log M(t).
    """

    def __init__(self, num_frequencies: int) -> None:
        self.log_transform = np.zeros(num_frequencies, dtype=np.complex128)
        self.log_envelope = np.zeros(num_frequencies)
        self.relative_error = np.zeros(num_frequencies)
        self.log_moment = 0.0

    def add(self, values: ComplexArray, error: Array | float, log_moment: float, count: int) -> None:
        """Add so many equal steps to the sum.

        Args:
            values: [frequencies] the transform of a step's tilted law.
            error: a bound on the absolute error of each value.
            log_moment: log of the normaliser of a step's tilted law.
            count: how many steps.
        """
        magnitude = np.abs(values)
        self.log_transform += count * np.log(np.where(magnitude > 0, values, 1e-300))  # instead of log 0
        # The transform of a law is at most 1 in size; with its error it may come out as more.
        self.log_envelope += count * np.log(np.minimum(magnitude + error, 1 + error))
        self.relative_error += count * (error / (magnitude + error) + 4 * UNIT)
        self.log_moment += count * log_moment
