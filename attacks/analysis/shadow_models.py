"""Users and records under shadow models, and which score of them an audit reads.

A shadow model is trained like the attacked one, on users that another secret key chose; so it is known whom it was
trained on. An audit may read any score that does not depend on the coins of the attacked run, that is on whom it was
trained on. The shadows tell which score is strongest: each stands in for the attacked model once, with the others as
its shadows. Their coins are independent of the attacked run's, so the choice costs no error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from attacks.analysis.arrays import BoolArray, FloatArray
from attacks.analysis.lift import lift
from attacks.analysis.protocol import ReferenceAttack, UnderOtherModels
from attacks.analysis.statistics import auroc

Score = Callable[[UnderOtherModels], FloatArray]

GAIN = "gain over the base"
"""The score of a run without shadows; it stands first, so that it wins a tie."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The score that an audit reads.

    Attributes:
        name: of the score.
        values: [users] the score under the attacked model.
        shadow_auroc: AUROC of the score where shadows stand in for the attacked model, the mean over shadows; None
            where there was no choice.
        compared: names of the scores that it was chosen among.
    """

    name: str
    values: FloatArray
    shadow_auroc: float | None = None
    compared: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.shadow_auroc is None:
            return self.name
        return (
            f"{self.name}, which of {', '.join(self.compared)} tells best whom each shadow model was trained on (mean "
            f"AUROC {self.shadow_auroc:.3f}); the coins of this run had no say"
        )


def by_user(models: UnderOtherModels, owner: np.ndarray, num_users: int) -> tuple[UnderOtherModels, BoolArray]:
    """Average documents over their users, under every model.

    Args:
        models: documents, sorted by owner.
        owner: [documents] index of the document's user.
        num_users: in all.

    Returns:
        The users that have documents, in ascending order, as units of the same models; and [all users] whether each
        has documents.
    """
    users, starts = np.unique(owner, return_index=True)
    target = lift(models.target, owner, num_users)[users]
    shadows = np.stack([lift(column, owner, num_users)[users] for column in models.shadows.T], axis=1)
    known = np.zeros(num_users, dtype=np.bool_)
    known[users] = True
    return UnderOtherModels(target, shadows, models.is_in[starts]), known


def lacking(attack: ReferenceAttack, models: UnderOtherModels | None) -> str:
    """Return why an attack cannot run, in words: it has too few shadow models. Empty if it can."""
    if models is None:
        return "needs shadow models; see attacks shadows --help"
    fewest_in, fewest_out = int(models.is_in.sum(axis=1).min()), int((~models.is_in).sum(axis=1).min())
    if fewest_in < attack.min_in or fewest_out < attack.min_out:
        return (
            f"needs at least {attack.min_in} shadows with and {attack.min_out} without every user; "
            f"some user has {fewest_in} and {fewest_out}"
        )
    return ""


def strongest(models: UnderOtherModels, base: FloatArray, attacks: Iterable[ReferenceAttack]) -> Chosen:
    """Return the score that tells best whom the shadows were trained on; no coin of the attacked run is an argument.

    Args:
        models: users under the attacked model and its shadows.
        base: [users] mean log-probability per token under the base model.
        attacks: candidates beside the gain over the base; those that need more shadows are skipped.
    """
    num_shadows = models.shadows.shape[1]
    stand_ins = [_StandIn.of(models, shadow) for shadow in range(num_shadows)]
    candidates: dict[str, Score] = {GAIN: lambda attacked: attacked.target - base}
    for attack in attacks:
        can_run = not any(lacking(attack, stand_in.models) for stand_in in stand_ins)
        if can_run:
            candidates[attack.name] = attack.score
    aurocs = {name: _mean_auroc(score, stand_ins) for name, score in candidates.items()}
    best = max(aurocs, key=lambda name: aurocs[name])
    return Chosen(best, candidates[best](models), aurocs[best], tuple(candidates))


class _StandIn(NamedTuple):
    """A shadow in the place of the attacked model.

    Attributes:
        models: the users under it, and under the other shadows; the attacked model is left out.
        is_in: [users] whether the shadow was trained on each.
    """

    models: UnderOtherModels
    is_in: BoolArray

    @classmethod
    def of(cls, models: UnderOtherModels, shadow: int) -> _StandIn:
        """Put the shadow of this index in the place of the attacked model."""
        others = np.arange(models.shadows.shape[1]) != shadow
        shown = UnderOtherModels(models.shadows[:, shadow], models.shadows[:, others], models.is_in[:, others])
        return cls(shown, models.is_in[:, shadow])


def _mean_auroc(score: Score, stand_ins: Iterable[_StandIn]) -> float:
    """Return the mean AUROC of a score over stand-ins that saw some users and not others; 1/2 if there is none."""
    aurocs = []
    for models, is_in in stand_ins:
        if is_in.any() and not is_in.all():
            values = score(models)
            aurocs.append(auroc(values[is_in], values[~is_in]))
    return float(np.mean(aurocs)) if aurocs else 0.5
