"""The message for a refused run: how much is spent, and which single change would fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from privtrain.registry import spending
from privtrain.registry.spending import Limit, Part

if TYPE_CHECKING:
    from privtrain.registry.requests import BudgetKey, RunRequest


def explain(
    request: RunRequest, part: Part, refused: Sequence[tuple[BudgetKey, Limit]], limits: Sequence[Limit]
) -> str:
    """Return the message of a refusal: what is spent of each budget that does not allow the run, and what would fit.

    Args:
        request: the run that asks.
        part: its mechanism.
        refused: the budgets that do not allow the run, with what is charged to each.
        limits: all budgets that the run draws on.
    """
    lines = [f"the run {request.name!r} does not fit; nothing was reserved"]
    for key, limit in refused:
        before = spending.composed_epsilon(limit.spent, limit.delta)
        after = spending.composed_epsilon([*limit.spent, part], limit.delta)
        left = max(0.0, key.epsilon - before.epsilon)
        lines += [
            f"  budget of {describe_scope(key)}: ε {key.epsilon:g} at δ {key.delta:g}"
            + describe_period(key.period_seconds),
            f"    spent or reserved: ε {before.epsilon:.4f} ({before.method}); with this run: ε {after.epsilon:.4f}; "
            f"left: ε {left:.4f}",
        ]
    return "\n".join(lines + _advice(request, limits))


def describe_scope(key: BudgetKey) -> str:
    """Return whose budget it is."""
    return f"every user of {key.name!r}" if key.scope == "user" else f"the data set {key.name!r}"


def describe_period(seconds: float | None) -> str:
    """Return the window in words; empty if the budget is for ever."""
    if seconds is None:
        return ""
    return f" in any {seconds / 86400:g} days" if seconds >= 86400 else f" in any {seconds:g} s"


def _advice(request: RunRequest, limits: Sequence[Limit]) -> list[str]:
    """Return lines that say which change of one setting would make the refused run fit."""
    settings = request.settings
    if settings is None:
        return ["  a run that spends less may fit"]
    fit = spending.knobs(settings, own_delta=request.delta, limits=limits)
    choices = []
    if fit.epsilon is not None and fit.noise_multiplier is not None:
        choices.append(
            f"privacy.target_epsilon={fit.epsilon:.4f} (given {request.epsilon:.4f}), "
            f"which is privacy.noise_multiplier={fit.noise_multiplier:g} (given {settings.noise_multiplier:g})"
        )
    at = f"at privacy.noise_multiplier={settings.noise_multiplier:g}"
    if fit.num_steps is not None:
        choices.append(f"privacy.num_steps={fit.num_steps} (given {settings.num_steps}) {at}")
    if fit.sampling_prob is not None:
        choices.append(f"privacy.sampling_prob={fit.sampling_prob:g} (given {settings.sampling_prob:g}) {at}")
    if not choices:
        return ["  nothing of this budget is left for any run; raise it, or wait for its period to pass"]
    # num_records: how many of the sampled records a user may own; 1 where the user is sampled.
    effect = "changes nothing here: a user is clipped once, however many records it brings"
    if settings.num_records > 1:
        effect = f"counts here: with fewer than {settings.num_records} the same noise spends less"
    return [
        "  one of these would fit, all else equal:",
        *(f"    {choice}" for choice in choices),
        f"    (privacy.records_per_user {effect})",
    ]
