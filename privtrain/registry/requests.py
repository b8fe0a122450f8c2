"""What a run asks of the registry, and what it is given."""

from __future__ import annotations

import dataclasses
import math

import dp_accounting

from privtrain.errors import PrivtrainError
from privtrain.registry.spending import Settings

SCOPES = ("user", "dataset")


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """A run that asks for budget.

    Attributes:
        uid: made with the run directory; a resumed run has the same.
        name, fingerprint: the run's name, and its plan's fingerprint without the data.
        dataset: the data set's name in the registry.
        manifest_sha256: digest of its content.
        unit, relation: of the guarantee; they must be the data set's and add-or-remove-one.
        event: what all steps together release.
        num_steps: how many they are.
        epsilon, delta: the run's own guarantee.
        settings: the knobs, for advice; ``None`` if the run has others.
        lease_seconds: how long the reservation stays open without news.
        claim: a new number that proves from now on that a job holds the reservation; ``None`` for none.
        earlier_claims: the numbers one of which an existing reservation must have.
        has_split: whether the run's users are split: then it keeps the do-not-train list of its last reservation.

    Raises:
        PrivtrainError: if a number is none that a guarantee or a lease can have.
    """

    uid: str
    name: str
    fingerprint: str
    dataset: str
    manifest_sha256: str
    unit: str
    relation: str
    event: dp_accounting.DpEvent
    num_steps: int
    epsilon: float
    delta: float
    settings: Settings | None
    lease_seconds: float
    claim: str | None = None
    earlier_claims: tuple[str, ...] = ()
    has_split: bool = False

    def __post_init__(self) -> None:
        wrong = {
            "epsilon": not 0 <= self.epsilon < math.inf,
            "delta": not 0 < self.delta < 1,
            "num_steps": self.num_steps < 0,
            "lease_seconds": not 0 < self.lease_seconds < math.inf,
        }
        faults = [f"{name} {getattr(self, name)}" for name, is_wrong in wrong.items() if is_wrong]
        if faults:
            raise PrivtrainError(
                f"the run {self.name!r} asks for budget with {', '.join(faults)}: ε must be finite and at least 0, δ "
                "in (0, 1), steps at least 0, the lease positive"
            )


@dataclasses.dataclass(frozen=True)
class Reservation:
    """A run's budget reservation."""

    id: str
    state: str  # open, expired or closed
    num_opt_outs: int  # length of the do-not-train list when the run began
    is_new: bool


@dataclasses.dataclass(frozen=True)
class BudgetKey:
    """The identity of a budget, for messages."""

    scope: str
    name: str
    epsilon: float
    delta: float
    period_seconds: float | None
