"""``attacks audit-plan``: a claim, and the table that :mod:`attacks.analysis.audit.power` makes of it."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import rich.table

from attacks.analysis.audit import power as powers
from attacks.errors import AttackInputError

SCHEMA_NAME = "privtrain/audit-plan/1"


def plan_of(
    config: pathlib.Path | None,
    epsilon: float | None,
    delta: float,
    *,
    target_epsilon: float | None = None,
    power: float = powers.POWER,
) -> powers.Plan:
    """Return the plan for a configuration's own claim or for one that is given.

    Args:
        config: configuration file of the run to be audited; None if ``epsilon`` is given.
        epsilon: the claim, in place of a configuration.
        delta: of that claim; not read with a configuration.
        target_epsilon: lower bound that the audit should reach; the claimed epsilon if None.
        power: chance of reaching it.

    Raises:
        AttackInputError: if neither or both of file and epsilon are given, or nothing is claimed.
        ConfigError: naming every fault of the file.
    """
    if (config is None) == (epsilon is None):
        raise AttackInputError("expected either CONFIG or --epsilon (with --delta), and not both")
    num_sources = 1
    if config is not None:
        epsilon, delta, num_sources = _claim_of(config)
    assert epsilon is not None
    if not 0.0 < epsilon < math.inf or not 0.0 < delta < 1.0:
        raise AttackInputError(
            f"the claim is epsilon = {epsilon:g}, delta = {delta:g}; expected epsilon > 0, finite, and 0 < delta < 1"
        )
    return powers.plan(epsilon, delta, target_epsilon=target_epsilon, num_sources=num_sources, power=power)


_EMBEDDINGS = ("embed", "lm_head", "wte", "output")
"""Parts of names of the modules that hold a token's own weights."""


def canaries_for(config: pathlib.Path) -> str:
    """Return advice for the terminal: which ``canaries.kind`` shows most of what this run would leak, and why."""
    from privtrain.config import load_config

    loaded = load_config(config)
    inside = (
        " Whoever owns the run can see more: canaries.num_gradient_users with audit.keep_noised_sums: true audits the "
        "noised sum of every step."
    )
    if loaded.data.format != "text":
        return f"Canaries are texts and need data.format: text; this run has {loaded.data.format}, so it plants none."
    targets = loaded.lora.target_modules
    named = [] if targets == "all-linear" else list(targets)
    holding = [name for name in (*named, *loaded.lora.modules_to_save) if any(part in name for part in _EMBEDDINGS)]
    if loaded.training.method == "full" or (loaded.training.method == "lora" and holding):
        what = "all weights" if loaded.training.method == "full" else ", ".join(holding)
        return (
            f"Canaries for this run: canaries.kind: new_tokens. It trains {what}, so a token that nobody else uses has "
            f"weights of its own to show.{inside}"
        )
    if loaded.training.method == "lora":
        return (
            "Canaries for this run: canaries.kind: samples, texts of the base model at a high temperature (attacks "
            "sample-canaries). An adapter changes no token's own weights, and learns what the base can almost say."
            f"{inside}"
        )
    return (
        f"Canaries for this run: canaries.kind: template. training.method: {loaded.training.method} trains too few "
        f"weights for many secrets.{inside}"
    )


def to_json(plan: powers.Plan) -> str:
    """Return the plan as JSON.

    Factors by which noise is too small (``1.0``, ``inf``) become keys (``"1"``, ``"none at all"``), and so do deltas.
    """
    facts = {"schema": SCHEMA_NAME, **dataclasses.asdict(plan)}
    facts["needed"] = {_failure(failure): count for failure, count in plan.needed.items()}
    facts["ceilings"] = {f"{delta:g}": list(ceilings) for delta, ceilings in plan.ceilings.items()}
    facts["rows"] = [
        {**dataclasses.asdict(row), "bounds": {_failure(failure): value for failure, value in row.bounds.items()}}
        for row in plan.rows
    ]
    return json.dumps(facts, indent=2, ensure_ascii=False)


def printed(plan: powers.Plan) -> list[rich.table.Table | str]:
    """Return what the terminal shows, in order: the table of bounds, its explanation, the table of ceilings, a note."""
    table = rich.table.Table(
        title=f"One-run audit of a claim of epsilon = {plan.epsilon:.4g}, delta = {plan.delta:.2g}",
        title_justify="left",
    )
    table.add_column("canaries", justify="right")
    table.add_column("ceiling", justify="right")
    table.add_column(f"right for > {plan.target_epsilon:.4g}", justify="right")
    for failure in powers.FAILURES:  # one column for each factor by which the noise is too small
        table.add_column(_heading(failure), justify="right")
    for row in plan.rows:
        needed = "–" if row.correct_needed is None else str(row.correct_needed)  # noqa: RUF001
        bounds = [f"{row.bounds[failure]:.2f}" for failure in powers.FAILURES]
        table.add_row(str(row.num_coins), f"{row.ceiling:.2f}", needed, *bounds)
    counts = [f"> {powers.MOST_COINS}" if count is None else str(count) for count in plan.needed.values()]
    table.add_section()
    table.add_row("needed", "", "", *counts)
    confidence, target = f"{1.0 - plan.significance:.4g}", f"{plan.target_epsilon:.4g}"
    words = (
        f"Lower bounds on epsilon that are reached with chance {plan.power:g} at confidence {confidence} by an attack "
        f"that reads all that the model tells: scores N(mu, 1) against N(0, 1), mu = {plan.mu:.3g} if the mechanism is "
        "as claimed and that many times more if its noise is too small; without noise every guess is right. Needed: "
        f"canaries for a bound above {target}. Real attacks get less out of a model; the audit's test of the whole "
        "privacy curve may need fewer canaries."
    )
    return [table, words, _ceilings(plan), CEILINGS_SAY]


CEILINGS_SAY = (
    "Delta is a choice of the audit: the theorem pays 2 m delta for m coins, so at a large delta more coins show less. "
    "attacks analyse --audit-delta sets it; the claim is then worth the epsilon that its mechanism has at that delta."
)


def _ceilings(plan: powers.Plan) -> rich.table.Table:
    """Return the table of the largest bound that could be shown: a row a number of canaries, a column a delta."""
    table = rich.table.Table(title="Ceiling of the bound by the delta of the audit", title_justify="left")
    table.add_column("canaries", justify="right")
    for delta in plan.ceilings:
        table.add_column(f"{delta:g}" + " (claim)" * (delta == plan.delta), justify="right")
    for number, row in enumerate(plan.rows):
        table.add_row(str(row.num_coins), *(f"{ceilings[number]:.2f}" for ceilings in plan.ceilings.values()))
    return table


def _claim_of(config: pathlib.Path) -> tuple[float, float, int]:
    """Return (epsilon, delta, sources): what the run will claim, and how many groups of units will have coins.

    Sources share the audit's error: planted texts, gradient canaries and, if some are held out, the users of the split.
    """
    from privtrain.config import load_config
    from privtrain.privacy.plan import PrivacyPlan

    loaded = load_config(config)
    plan = PrivacyPlan.build(loaded.privacy, loaded.training)
    canaries = loaded.canaries
    sources = (canaries.has_texts, canaries.num_gradient_users > 0, 0.0 < loaded.data.held_out_fraction < 1.0)
    return plan.epsilon, plan.delta, max(sum(sources), 1)


def _failure(failure: float) -> str:
    """Return a factor by which noise is too small as a key of the JSON; infinity is no noise."""
    return "none at all" if math.isinf(failure) else f"{failure:g}"


def _heading(failure: float) -> str:
    """Return a factor by which noise is too small as a column's heading."""
    if failure == 1.0:
        return "as claimed"
    return "no noise" if math.isinf(failure) else f"noise / {failure:g}"
