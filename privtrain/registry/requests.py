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
        uid: the registry's name of the run, made with the run directory; a resumed run has the same.
        name, fingerprint: the run's name, and its plan's fingerprint without the data.
        dataset: the data set's name in the registry.
        manifest_sha256: digest of the data set's content.
        unit, relation: whom the guarantee protects (``user`` or ``example``, as in the data set), and its neighbouring
            relation, which must be ``add_or_remove_one``.
        event: what all steps together release, as a DP event.
        num_steps: number of these steps.
        epsilon, delta: the run's own guarantee.
        settings: noise, sampling and steps, to advise a refused run; ``None`` if the run is no plain DP-SGD.
        lease_seconds: how long the reservation stays open without news.
        claim: a new random token, by which this copy of the run directory holds the reservation from now on; ``None``
            for a run that is only settled.
        earlier_claims: tokens of earlier starts, of which an existing reservation must have one.
        has_split: whether it is decided already which users are held in: then a new reservation keeps the do-not-train
            list of the run's last one.

    Raises:
        PrivtrainError: if ε, δ, the number of steps or the lease is out of range.
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
        wrong = {  # "not ..." rather than the opposite, so that NaN is wrong
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
