"""Everything that the audit says about one source of coins, and the one rule that turns it into a verdict.

A source of coins is a group of units (users, canaries) of each of which a coin of its own decided whether it went into
training. The audit guesses the coins from scores; many right guesses contradict a small epsilon. The claim is what the
run's privacy statement promises. Each lower bound stands beside its ceiling: the bound had every guess been right.

Two tests decide, and both need nothing but the coins: the one-run bound at the claim's delta, and the one-run test
of the run's own certified curve. Where scores are independent by their making (gradient canaries) a third one does: the
AUROC against the largest that the claimed curve allows (:mod:`attacks.analysis.audit.independent`). The error of all
deciding tests together is ``SIGNIFICANCE``, shared equally between sources, tests and declared guesses. The Gaussian
and the Clopper-Pearson bounds stand beside them with the assumption that each needs, and decide nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from attacks.analysis.audit import clopper, independent, one_run, tradeoff
from attacks.analysis.audit.guesses import (
    Coins,
    FloatArray,
    Guess,
    correct_guesses,
    declared_guesses,
    fair,
    telling_guesses,
)
from attacks.analysis.statistics import Bound, DpBound
from attacks.analysis.verdict import Verdict

SIGNIFICANCE = 0.05
_NUM_TESTS = 2


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the run promises, in the unit whose coins were flipped.

    Attributes:
        pair: the claimed (epsilon, delta), or None if the run claims none for this unit.
        curve: more certified (epsilon, delta) points of the same mechanism, or None.
        reason: why there is no pair, or how it was converted from a guarantee for another unit; may be empty.
        is_made: whether the run claims anything at all; a run that is not private does not.
    """

    pair: DpBound | None
    curve: Bound | None
    reason: str
    is_made: bool = True


@dataclasses.dataclass(frozen=True)
class Counts:
    """The declared guess behind the reported bound.

    Attributes:
        num_guesses: r, how many coins were guessed.
        num_correct: how many of them rightly.
        only_in: whether every one of them said "in".
    """

    num_guesses: int
    num_correct: int
    only_in: bool = False

    def __str__(self) -> str:
        return f"{self.num_correct} of {self.num_guesses} guesses{' that said in' * self.only_in}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The audit of one source of coins.

    Attributes:
        name: of the source, for example ``"canary users"``.
        unit: ``"user"`` or ``"example"``, what each coin put in or left out.
        num_coins: m, coins left after some units were dropped so that the coins are fair.
        num_flipped: coins before units were dropped.
        delta: at which every epsilon here is meant.
        epsilon: one-run lower bound; 0 where nothing was shown.
        epsilon_ceiling: ``epsilon`` had every guess been right.
        counts: the guesses that gave ``epsilon``.
        gaussian_epsilon: lower bound that holds for Gaussian mechanisms only.
        gaussian_ceiling: ``gaussian_epsilon`` had every guess been right.
        clopper_epsilon: Clopper-Pearson lower bound; it holds only if scores are independent of each other.
        clopper_ceiling: ``clopper_epsilon`` had every guess been right.
        curve_p_value: of the test whether the claimed privacy curve allows so many right guesses, corrected for the
            number of declared guesses; None without a claim.
        curve_p_floor: the smallest such p-value that this many coins could have given; None without a claim.
        significance: error of each deciding test.
        claim: what the run promises for this unit.
        verdict: on the claim.
        verdict_reason: the sentence that explains the verdict.
        score: which score the guesses were made by, for the report.
        access: what the attacker saw, for the report.
        separation: the AUROC test of independent scores; None where scores may depend on each other.
    """

    name: str
    unit: str
    num_coins: int
    num_flipped: int
    delta: float
    epsilon: float
    epsilon_ceiling: float
    counts: Counts
    gaussian_epsilon: float
    gaussian_ceiling: float
    clopper_epsilon: float
    clopper_ceiling: float
    curve_p_value: float | None
    curve_p_floor: float | None
    significance: float
    claim: Claim
    verdict: Verdict
    verdict_reason: str
    score: str
    access: str
    separation: independent.Separation | None


def audit(
    coins: Coins, claim: Claim, delta: float, *, seed: int, num_sources: int = 1, confounded_by: str = ""
) -> Finding:
    """Return bounds, ceilings and the verdict for one source of coins.

    Args:
        coins: scores and coins.
        claim: in the unit of the coins.
        delta: at which epsilons are given where the claim has no pair; the claim's own delta otherwise.
        seed: of the dropping of units and the order of ties; not to be chosen after the result.
        num_sources: how many sources are audited in this run; they share the error.
        confounded_by: why no verdict can be trusted; empty if nothing speaks against it.
    """
    sample = fair(coins, seed)
    delta = delta if claim.pair is None else claim.pair.delta
    num_tests = _NUM_TESTS + coins.are_independent  # independent scores get a third test
    significance = SIGNIFICANCE / (num_sources * num_tests)

    num_coins = sample.num_coins
    as_counted = {guess: correct_guesses(sample, guess, seed) for guess in declared_guesses(num_coins)}
    all_right = {guess: guess.num for guess in as_counted}
    epsilon, best = _one_run(as_counted, num_coins, delta, significance)
    held_in, held_out = sample.scores[sample.is_in], sample.scores[~sample.is_in]
    finding = Finding(
        name=coins.name,
        unit=coins.unit,
        num_coins=num_coins,
        num_flipped=coins.num_coins,
        delta=delta,
        epsilon=epsilon,
        epsilon_ceiling=epsilon_ceiling(num_coins, delta, significance),
        counts=Counts(best.num, as_counted.get(best, 0), best.only_in),
        gaussian_epsilon=_gaussian_epsilon(as_counted, num_coins, delta),
        gaussian_ceiling=_gaussian_epsilon(all_right, num_coins, delta),
        clopper_epsilon=clopper.epsilon_lower_bound(held_in, held_out, delta, SIGNIFICANCE),
        clopper_ceiling=clopper.ceiling(held_in.size, held_out.size, delta, SIGNIFICANCE),
        curve_p_value=_curve_p_value(as_counted, num_coins, claim),
        curve_p_floor=_curve_p_value(all_right, num_coins, claim),
        significance=significance,
        claim=claim,
        verdict=Verdict.UNINFORMATIVE,
        verdict_reason="",
        score=coins.score,
        access=coins.access,
        separation=_separation(held_in, held_out, claim, delta, significance) if coins.are_independent else None,
    )
    verdict, reason = judge(finding, is_constant=sample.is_constant, confounded_by=confounded_by)
    return dataclasses.replace(finding, verdict=verdict, verdict_reason=reason)


def _one_run(num_right: Mapping[Guess, int], num_coins: int, delta: float, significance: float) -> tuple[float, Guess]:
    """Return the highest one-run bound of all guesses that can show anything, and the guess that gave it.

    On a tie it is the one with more guesses. Where none can show anything, return 0 and the largest declared guess.

    Args:
        num_right: declared guess → how many of its guesses are right.
        num_coins: how many coins were guessed, or left out.
        delta: at which the bound is meant.
        significance: error of the bound, shared between the guesses.
    """
    telling = telling_guesses(num_coins, delta, significance)
    if not telling:
        return 0.0, max(num_right, default=Guess(0))
    share = significance / len(telling)
    bounds = []
    for guess in telling:
        bound = one_run.epsilon_lower_bound(num_coins, guess.num, num_right[guess], delta, share)
        bounds.append((bound, guess))
    return max(bounds)


def _curve_p_value(num_right: Mapping[Guess, int], num_coins: int, claim: Claim) -> float | None:
    """Return the p-value of so many right guesses under the claimed curve, corrected for the number of guesses.

    None without a claim, or without a guess.
    """
    if claim.pair is None:
        return None
    inverse = tradeoff.of_points(claim.pair if claim.curve is None else claim.curve)
    return _corrected([tradeoff.p_value(inverse, num_coins, guess.num, right) for guess, right in num_right.items()])


def _gaussian_epsilon(num_right: Mapping[Guess, int], num_coins: int, delta: float) -> float:
    """Return the lower bound that so many right guesses show of a Gaussian mechanism; 0 without a guess.

    It decides nothing, so it has the whole error for itself, shared between the declared guesses only.
    """
    share = SIGNIFICANCE / max(len(num_right), 1)
    numbers = {(guess.num, right) for guess, right in num_right.items()}  # guesses of equal numbers have equal bounds
    bounds = [
        tradeoff.gaussian_epsilon_lower_bound(num_coins, num, right, delta, share) for num, right in sorted(numbers)
    ]
    return max(bounds, default=0.0)


def _separation(
    held_in: FloatArray, held_out: FloatArray, claim: Claim, delta: float, significance: float
) -> independent.Separation | None:
    """Return the AUROC test of independent scores against the claim; None with fewer than two units on a side."""
    if min(held_in.size, held_out.size) < 2:
        return None
    bound = claim.pair if claim.curve is None else claim.curve
    return independent.separation(held_in, held_out, bound, delta, significance)


def epsilon_ceiling(num_coins: int, delta: float, significance: float) -> float:
    """Return the largest one-run bound that this many fair coins could give: every guess right.

    ``significance`` is shared between the declared guesses, as in the audit itself.
    """
    all_right = {guess: guess.num for guess in declared_guesses(num_coins)}
    bound, _ = _one_run(all_right, num_coins, delta, significance)
    return bound


def judge(finding: Finding, *, is_constant: bool, confounded_by: str) -> tuple[Verdict, str]:
    """Return the verdict of an audit and the sentence that explains it.

    ``falsified`` if the one-run bound exceeds the claimed epsilon at the same delta and in the same unit, if the
    claimed curve leaves no room for so many right guesses, or if independent scores separate better than the curve
    allows. ``uninformative`` if none of these could have happened. ``consistent`` if one could have and none did.
    ``confounded`` if the two sides differ even without a model; ``no claim`` if the run is not private.

    Args:
        finding: without its verdict.
        is_constant: whether all units have the same score.
        confounded_by: how the sides differ; empty if they do not.
    """
    pair = finding.claim.pair
    if confounded_by:
        return Verdict.CONFOUNDED, confounded_by
    if not finding.claim.is_made:
        return Verdict.NO_CLAIM, finding.claim.reason
    if pair is None or math.isinf(pair.epsilon):
        return Verdict.UNINFORMATIVE, finding.claim.reason or "the run claims nothing for this unit"
    if finding.num_coins < 2:
        return Verdict.UNINFORMATIVE, f"too few coins ({finding.num_coins}) to tell anything: see attacks audit-plan"
    if is_constant:
        return Verdict.UNINFORMATIVE, "all units have the same score: was the base model scored against itself?"
    assert finding.curve_p_value is not None
    assert finding.curve_p_floor is not None
    counts = f"{finding.counts} among {finding.num_coins} coins were right"
    if finding.epsilon > pair.epsilon:
        return Verdict.FALSIFIED, (
            f"{counts}: epsilon is at least {finding.epsilon:.4g} at delta = {finding.delta:.2g}, and the run claims "
            f"{pair.epsilon:.4g}; look for a broken mechanism before anything is released"
        )
    if finding.curve_p_value <= finding.significance:
        return Verdict.FALSIFIED, (
            f"{counts}, which the claimed privacy curve allows with probability at most {finding.curve_p_value:.2g}; "
            "look for a broken mechanism before anything is released"
        )
    separation = finding.separation
    if separation is not None and separation.is_excess:
        return Verdict.FALSIFIED, (
            f"{finding.name} are told apart with an AUROC of at least {separation.auroc_lower:.4g}, and the claimed "
            f"privacy curve allows {separation.auroc_cap:.4g}; look for a broken mechanism before anything is released"
        )
    could_have_spoken = (
        finding.epsilon_ceiling > pair.epsilon
        or finding.curve_p_floor <= finding.significance
        or (separation is not None and separation.could_exceed)
    )
    if not could_have_spoken:
        return Verdict.UNINFORMATIVE, (
            f"with {finding.num_coins} coins even perfect guesses would show no more than epsilon = "
            f"{finding.epsilon_ceiling:.4g}, and the run claims {pair.epsilon:.4g}: see attacks audit-plan"
        )
    return Verdict.CONSISTENT, (
        f"{counts}: epsilon is at least {finding.epsilon:.4g}, and these coins could have contradicted the claimed "
        f"{pair.epsilon:.4g}; that they did not does not prove it"
    )


def _corrected(p_values: Sequence[float]) -> float | None:
    """Return the smallest p-value after Bonferroni's correction; None of none."""
    return min(1.0, len(p_values) * min(p_values)) if p_values else None
