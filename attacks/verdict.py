"""What an attack's result says about the run's claim: one rule, stated once, applied to every statistic."""

from __future__ import annotations

import dataclasses
import enum
import math

from attacks import statistics
from attacks.rundir import PrivacyStatement

ATTACKED_UNIT = "user"
"""User inference accuses users; a guarantee in another unit does not answer it."""


class Verdict(enum.StrEnum):
    """What the result says about the claim, and about nothing else."""

    FALSIFIED = "falsified"
    CONSISTENT = "consistent"
    UNINFORMATIVE = "uninformative"
    CONFOUNDED = "confounded"  # reserved: the sides differ without any model (blind baseline)


@dataclasses.dataclass(frozen=True)
class Cap:
    """What the run's (epsilon, delta) allows, in the attack's own unit.

    Attributes:
        bound: the guarantee, or None if the run gives none for this unit.
        reason: why there is no bound or why the bound is vacuous; empty if it bites.
    """

    bound: statistics.DpBound | None
    reason: str

    @classmethod
    def of(cls, statement: PrivacyStatement) -> Cap:
        """Reads the cap off the privacy statement; nobody types it.

        Args:
            statement: of the attacked run.

        Returns:
            The cap.
        """
        if math.isinf(statement.effective_epsilon):
            return cls(statistics.DpBound(math.inf, statement.delta), "the run is not private, so it caps nothing")
        if statement.unit != ATTACKED_UNIT:
            return cls(
                None,
                f"epsilon protects one {statement.unit} and the attack accuses a {ATTACKED_UNIT}: through "
                "group privacy over all records of a user the cap is vacuous",
            )
        return cls(statistics.DpBound(statement.effective_epsilon, statement.delta), "")

    def auroc(self, num_held_out: int) -> float | None:
        """The cap on the sample's expected AUROC.

        Args:
            num_held_out: held-out users.

        Returns:
            The cap, or None without a bound.
        """
        return None if self.bound is None else statistics.auroc_cap(self.bound, num_held_out)


def judge(
    cap: Cap, auroc_interval: statistics.Interval, num_held_in: int, num_held_out: int, *, is_constant: bool
) -> tuple[Verdict, str]:
    """The verdict on one statistic and the sentence that explains it.

    ``falsified`` if the interval's lower end exceeds the cap. ``uninformative`` if that could not have happened: no
    cap, a statistic without any spread, or a ceiling whose own lower end does not exceed the cap. ``consistent``
    otherwise: the sample could have contradicted the claim and did not.

    Args:
        cap: what the run's claim allows.
        auroc_interval: the bootstrap interval of the statistic's AUROC.
        num_held_in: users on the held-in side.
        num_held_out: users on the held-out side.
        is_constant: whether all users have the same value.

    Returns:
        The verdict and its reason.
    """
    allowed = cap.auroc(num_held_out)
    if allowed is None or cap.reason:
        return Verdict.UNINFORMATIVE, cap.reason
    if is_constant:
        return Verdict.UNINFORMATIVE, "all users have the same value: was the base model scored against itself?"
    ceiling = statistics.perfect_separation(num_held_in, num_held_out)
    if auroc_interval.lower > allowed:
        return Verdict.FALSIFIED, (
            f"the interval's lower end {auroc_interval.lower:.4f} exceeds the {allowed:.4f} that the claim allows: "
            "look for a broken split or a broken mechanism before anything is released"
        )
    if ceiling.lower <= allowed:
        return Verdict.UNINFORMATIVE, (
            f"with {num_held_in} + {num_held_out} users even perfect separation would prove no more than an AUROC of "
            f"{ceiling.lower:.4f}, and the claim allows {allowed:.4f}: this sample could not have contradicted it"
        )
    return Verdict.CONSISTENT, (
        f"this sample could have shown an AUROC above the {allowed:.4f} that the claim allows and did not; "
        "that does not prove the claim"
    )
