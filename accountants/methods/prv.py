"""The privacy-random-variable accountant of Gopi, Lee, Wutschitz 2021 (arXiv 2106.02848): Opacus' implementation.

Certified ends for the *remove* direction of Poisson-sampled Gaussian steps, at an error in epsilon that is chosen here
relative to the answer. It has no add direction; the known dominance of remove (Zhu, Dong, Wang 2022) is per step and is
no theorem for compositions (Lebeda et al. 2024, arXiv 2405.20769), so the answer says ``direction = remove`` and its
kind is ``CERTIFIED_UPPER`` for that direction only: :func:`accountants.certified_upper` takes answers for both
directions alone.

Opacus brings torch, so it is imported when a number is asked for, never before.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import importlib
import importlib.metadata
import math
from typing import Any

from typing_extensions import override

from accountants.answer import Bounds, Direction
from accountants.mixtures import Composition
from accountants.numerics import saddle
from accountants.protocol import NormalFormAccountant, UnsupportedEventError

#: The error in epsilon that is asked of the method, relative to an approximate answer, and its limits.
RELATIVE_ERROR = 0.01

#: The implementation takes exp(epsilon). From 709 on, where float64 ends, it answers 709 whatever the truth.
_LARGEST_EPSILON = 650.0


class PrvAccountant(NormalFormAccountant):
    """Certified ends in the remove direction, from Opacus.

    Attributes:
        eps_error: the half-width of the interval in epsilon; None scales it to the answer.
    """

    name = "prv"
    version = f"opacus {importlib.metadata.version('opacus')}"
    min_delta = 1e-14

    def __init__(self, eps_error: float | None = None) -> None:
        self.eps_error = eps_error

    @override
    def epsilon_bounds(self, composed: Composition, delta: float) -> Bounds:
        """Return the interval of epsilon in the remove direction."""
        error = self.eps_error or _scaled_error(composed, delta)
        accountant = _opacus_accountant(composed)
        delta_error = delta / 1000  # moves epsilon very little
        try:
            # Opacus' public method gives the upper end alone.
            discrete: Any = accountant._get_dprv(eps_error=error, delta_error=delta_error)
            lower_estimate_upper = discrete.compute_epsilon(delta, delta_error=delta_error, eps_error=error)
        except (RuntimeError, ValueError, MemoryError) as failure:
            raise ValueError(f"prv: {failure}; use 'tilted'") from failure
        lower, estimate, upper = (max(float(value), 0.0) for value in lower_estimate_upper)
        if upper > _LARGEST_EPSILON:
            raise ValueError(f"prv: epsilon {upper:.4g} is where exponentials leave float64; use 'tilted'")
        return Bounds(lower, upper, Direction.REMOVE, estimate, note="remove direction only")

    def delta_bounds(self, composed: Composition, epsilon: float) -> Bounds:
        """Refuse: the implementation answers epsilon only."""
        raise UnsupportedEventError(
            f"prv gives no delta (asked for at epsilon={epsilon:g}, {composed.num_steps} steps); use 'tilted'"
        )

    @override
    def trivial_bounds(self, value: float) -> Bounds:
        return Bounds(value, value, Direction.REMOVE, value, note="remove direction only")


def _scaled_error(composed: Composition, delta: float) -> float:
    """Return the error in epsilon to ask for: 1 % of an approximate answer, between 0.001 and 0.1."""
    # Tails of mass e^-16 delta are cut off: too little to move an approximate answer.
    law = saddle.directed_loss(composed, add=False, log_mass=math.log(delta) - 16)
    approximate = saddle.saddle_for_delta(law, delta).epsilon
    return min(max(RELATIVE_ERROR * approximate, 1e-3), 0.1)


def _opacus_accountant(composed: Composition) -> Any:
    """Return an Opacus accountant with the composition as its history."""
    # A dynamic import keeps torch out of everything that only imports this module.
    opacus_prv = importlib.import_module("opacus.accountants.prv")
    accountant = opacus_prv.PRVAccountant()
    for step, count in composed.phases:
        # A unit shifts normal noise by 1/noise multiplier if it is sampled, and by 0 if not; the shifts ascend. A step
        # without sampling has one shift, of probability 1.
        *others, shift = step.shifts
        if others not in ([], [0.0]):
            raise UnsupportedEventError("prv does not cover mixtures of Gaussians")
        sampling_prob = step.probs[-1]
        accountant.history.append((1 / shift, sampling_prob, count))
    return accountant
