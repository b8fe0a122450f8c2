"""Gaussian differential privacy and its central limit theorem: a closed form, exact without sampling, else asymptotic.

Dong, Roth, Su 2022 (arXiv 1905.02383); for sampled steps Bu, Dong, Long, Su 2020 (arXiv 1911.11607): with
q sqrt(T) -> constant the composition tends to mu-GDP, mu = q sqrt(T (e^(1/sigma^2) - 1)), and heterogeneous steps add
in mu^2. At any finite T the truth can lie on either side, so a sampled event's answer is ``ASYMPTOTIC`` and never
certifies. An event without sampling is exactly mu-GDP, and is certified.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses
import math

from typing_extensions import override

from accountants.answer import BoundKind, Bounds, Direction, point
from accountants.mixtures import Composition, MixtureStep
from accountants.numerics import closed_form
from accountants.protocol import NormalFormAccountant, UnsupportedEventError


def gdp_parameter(composed: Composition) -> float:
    """Return mu of the limit: mu^2 is the sum over steps of their chi-square divergences chi^2(Q, P).

    That of a sampled step is q^2 (e^(1/sigma^2) - 1). A plain Gaussian step adds 1/sigma^2, which is exact.

    Raises:
        UnsupportedEventError: for a mixture of more than two Gaussians.
    """
    total = 0.0
    for step, count in composed.phases:
        *others, shift = step.shifts  # the last is 1/sigma; before it stands 0 where the unit is sampled
        exponent = shift**2
        if not others:
            total += count * exponent
        elif others == [0.0]:
            _, sampling_prob = step.probs
            divergence = math.expm1(exponent) if exponent < 700 else math.inf
            total += count * sampling_prob**2 * divergence
        else:
            raise UnsupportedEventError("gdp does not cover mixtures of Gaussians")
    return math.sqrt(total)


def gdp_delta(mu: float, epsilon: float) -> float:
    """Return delta(epsilon) of a mu-GDP mechanism (Dong, Roth, Su 2022, corollary 2.13)."""
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return 1.0
    return closed_form.step_delta(MixtureStep((mu,), (1.0,)), epsilon, add=False)


def gdp_epsilon(mu: float, delta: float) -> float:
    """Return epsilon(delta) of a mu-GDP mechanism."""
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return math.inf
    return closed_form.step_epsilon(MixtureStep((mu,), (1.0,)), delta, add=False)


class GdpAccountant(NormalFormAccountant):
    """The central-limit accountant: ``ASYMPTOTIC`` unless nothing is sampled."""

    name = "gdp"

    @override
    def epsilon_bounds(self, composed: Composition, delta: float) -> Bounds:
        if (exact := _exact(composed)) is not None:
            return dataclasses.replace(closed_form.epsilon_bounds(exact, delta), direction=Direction.BOTH)
        return point(gdp_epsilon(gdp_parameter(composed), delta), BoundKind.ASYMPTOTIC)

    @override
    def delta_bounds(self, composed: Composition, epsilon: float) -> Bounds:
        if (exact := _exact(composed)) is not None:
            return dataclasses.replace(closed_form.delta_bounds(exact, epsilon), direction=Direction.BOTH)
        return point(gdp_delta(gdp_parameter(composed), epsilon), BoundKind.ASYMPTOTIC)


def _exact(composed: Composition) -> MixtureStep | None:
    """Return the single Gaussian step that a composition amounts to if nothing is sampled; else None.

    The normal form has merged all plain Gaussian steps into one of count 1.
    """
    (step, count), *rest = composed.phases
    return step if len(step.shifts) == 1 and count == 1 and not rest else None
