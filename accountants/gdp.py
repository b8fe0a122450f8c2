"""Gaussian differential privacy and its central limit theorem: a closed form, exact without sampling, else asymptotic.

Dong, Roth, Su 2022 (arXiv 1905.02383); for sampled steps Bu, Dong, Long, Su 2020 (arXiv 1911.11607): with
q sqrt(T) -> constant the composition tends to mu-GDP, mu = q sqrt(T (e^(1/sigma^2) - 1)), and heterogeneous steps add
in mu^2. At any finite T the truth can lie on either side, so a sampled event's answer is ``ASYMPTOTIC`` and never
certifies. An event without sampling is exactly mu-GDP, and is certified.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import math

import dp_accounting
from scipy import special

from accountants import closed_form
from accountants.answer import OWN_VERSION, BoundKind, PrivacyAnswer, estimate_answer
from accountants.mixtures import Composition, MixtureStep, composition
from accountants.protocol import UnsupportedEventError, check_delta, check_epsilon, check_plain_relation

NeighboringRelation = dp_accounting.NeighboringRelation


def gdp_parameter(composed: Composition) -> float:
    """Mu of the limit: chi-square divergences of the steps add up to mu^2 (for plain Gaussian steps 1/sigma^2).

    Raises:
        UnsupportedEventError: for a mixture of more than two Gaussians.
    """
    total = 0.0
    for step, count in composed.phases:
        if len(step.shifts) == 1:
            total += count * step.shifts[0] ** 2
        elif len(step.shifts) == 2 and step.shifts[0] == 0:
            exponent = step.shifts[1] ** 2
            total += count * step.probs[1] ** 2 * (math.expm1(exponent) if exponent < 700 else math.inf)
        else:
            raise UnsupportedEventError("gdp does not cover mixtures of Gaussians")
    return math.sqrt(total)


def gdp_delta(mu: float, epsilon: float) -> float:
    """delta(epsilon) of a mu-GDP mechanism (Dong, Roth, Su 2022, corollary 2.13)."""
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return 1.0
    return closed_form.step_delta(MixtureStep((mu,), (1.0,)), epsilon, add=False)


def gdp_epsilon(mu: float, delta: float) -> float:
    """epsilon(delta) of a mu-GDP mechanism."""
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return math.inf
    return closed_form.step_epsilon(MixtureStep((mu,), (1.0,)), delta, add=False)


def gdp_tradeoff(mu: float, alpha: float) -> float:
    """The least false-negative rate of a test with false-positive rate ``alpha``: Phi(Phi^-1(1 - alpha) - mu)."""
    return float(special.ndtr(-special.ndtri(alpha) - mu))


class GdpAccountant:
    """The central-limit accountant."""

    name = "gdp"

    def epsilon(
        self,
        event: dp_accounting.DpEvent,
        delta: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """See :class:`accountants.protocol.Accountant`; ``ASYMPTOTIC`` unless nothing is sampled."""
        check_delta(delta)
        return self._answer("epsilon", event, delta, relation)

    def delta(
        self,
        event: dp_accounting.DpEvent,
        epsilon: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """See :class:`accountants.protocol.Accountant`; ``ASYMPTOTIC`` unless nothing is sampled."""
        check_epsilon(epsilon)
        return self._answer("delta", event, epsilon, relation)

    def _answer(
        self, quantity: str, event: dp_accounting.DpEvent, argument: float, relation: NeighboringRelation
    ) -> PrivacyAnswer:
        check_plain_relation(self.name, relation)
        composed = composition(event)
        mu = math.inf if composed.non_private else gdp_parameter(composed)
        value = gdp_epsilon(mu, argument) if quantity == "epsilon" else gdp_delta(mu, argument)
        if composed.non_private or all(len(step.shifts) == 1 for step, _ in composed.phases):
            low, high = value * (1 - closed_form.MARGIN), value * (1 + closed_form.MARGIN)
            if quantity == "delta":
                high = min(high, 1.0)
            return PrivacyAnswer(
                quantity, low, value, high, BoundKind.CERTIFIED_UPPER, self.name, OWN_VERSION, relation=relation.name
            )
        return estimate_answer(quantity, value, BoundKind.ASYMPTOTIC, self.name, OWN_VERSION)
