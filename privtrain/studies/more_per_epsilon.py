"""More model per ε: plans of equal ε and equal compute, beside Opacus and beside training without noise.

The axis ``plan``:

* ``old``: as people wrote plans by hand; ``rate``: the same at the learning rate of the *noise law*
  (:mod:`privtrain.privacy.noise_law`), which says what learning rate suits a plan.
* ``optimised``, ``banded``: what ``plan --optimize`` chooses for as many records, without and with correlated noise.
* ``none``: the plan of ``optimised`` without noise, at the law's learning rate for none.
* ``opacus``, ``opacus-example``: Opacus's own engine, optimizer and accountant with the plan of ``old``, on one record
  a user, and on records, converted to users by group privacy (``opacus_arm.py`` beside the recipe).

Split, evaluation records and initial weights are the seed's alone, so differences between plans are paired.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import accountants
from privtrain import privacy
from privtrain.commands import optimize
from privtrain.config import Config, validate
from privtrain.files.atomic import write_json
from privtrain.files.cache import cache_directory
from privtrain.privacy import noise_law
from privtrain.studies.figures import AxisLabels, Level, Series, curves_figure
from privtrain.studies.findings import (
    Claim,
    Figure,
    Findings,
    Statement,
    Table,
    judge_at_least,
    judge_direction,
    judge_not_worse,
)
from privtrain.studies.results import Estimate, Results, have_same_split, noise_multiplier

TITLE = "More model per ε: optimised plans and correlated noise"
PAPER = (
    "Choquette-Choo et al. 2023, (Amplified) Banded Matrix Factorization, arXiv 2306.08153; McKenna et al. 2025, "
    "Scaling Laws for DP Language Models, arXiv 2501.18914"
)

NAMES = {
    "old": "by hand",
    "rate": "by hand, learning rate of the law",
    "optimised": "plan --optimize, independent noise",
    "banded": "plan --optimize, correlated noise",
    "none": "no noise",
    "opacus": "Opacus, plan by hand, one record a user",
    "opacus-example": "Opacus, plan by hand, records, group privacy",
}

#: Plans whose cost of noise is to be won back → what a claim calls them.
_COSTS = {"old": "the plan by hand", "rate": "the plan by hand at the law's learning rate"}

_LOSS, _PERPLEXITY = "eval/held_out_loss", "eval/held_out_perplexity"


def settle(values: Mapping[str, str], tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration keys in which a cell's plan differs from the plan by hand.

    As many records pass through the model, at the same ε; ``none`` has no ε.

    Args:
        values: of the cell's axes.
        tree: the cell's configuration with the plan by hand.
        settings: of the recipe. ``populations`` holds public constants, by the value of the axis ``corpus``:
            ``num_users`` that are held in, and ``num_trained`` weights.
    """
    plan = values["plan"]
    if plan == "old" or plan.startswith("opacus"):
        return {}
    population = settings["populations"][values["corpus"]]
    # Without the seed, so that one recommendation serves all seeds.
    seedless = {**tree, "privacy": {key: value for key, value in tree["privacy"].items() if key != "insecure_seed"}}
    advice = recommended(
        json.dumps(seedless, sort_keys=True),
        num_users=population["num_users"],
        num_trained=population["num_trained"],
        can_be_banded=plan == "banded",
    )
    if plan == "rate":
        return {"training.learning_rate": advice["rate_now"]}
    if plan == "none":
        noiseless = {"privacy.noise_multiplier": 0.0, "privacy.target_epsilon": None}
        return {**advice["overrides"], **noiseless, "training.learning_rate": advice["rate_without_noise"]}
    return advice["overrides"]


@functools.cache
def recommended(tree: str, num_users: int, num_trained: int, can_be_banded: bool) -> Mapping[str, Any]:
    """Return what ``plan --optimize`` says of a configuration, kept on disk for this version of law and accountants.

    Args:
        tree: the configuration, as JSON.
        num_users: expected training users.
        num_trained: trained weights.
        can_be_banded: whether correlated noise is offered.

    Returns:
        ``overrides`` of the best choice, ``rate_now`` (the law's learning rate for the plan as it stands) and
        ``rate_without_noise`` (for the best choice, were there no noise).
    """
    facts = [tree, num_users, num_trained, can_be_banded, _code_version()]
    path = cache_directory() / "plans" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    config = validate({**json.loads(tree), "run": {"name": "run"}})
    advice = _optimized(config, num_users, num_trained, can_be_banded)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, advice)
    return advice


def _optimized(config: Config, num_users: int, num_trained: int, can_be_banded: bool) -> dict[str, Any]:
    """Do the work of :func:`recommended`, without keeping the answer."""
    if not can_be_banded:
        # The configuration refuses correlated noise beside kept noised sums, so this takes it out of the choice.
        config = config.model_copy(update={"audit": config.audit.model_copy(update={"keep_noised_sums": True})})
    result = optimize.optimize(config, num_users, num_trained, optimize.record_draws_of(config.privacy))
    assert result.now is not None, "the recipe's plan can meet its ε"
    best = result.best
    noiseless = noise_law.Point(
        num_steps=best.num_steps,
        relative_noise=0.0,
        records_per_user=best.records_per_unit,
        rank=config.lora.rank,
    )
    rate_without_noise = noise_law.fitted().learning_rate(noiseless)
    return {
        "overrides": best.overrides(config),
        "rate_now": result.now.learning_rate,
        "rate_without_noise": float(f"{rate_without_noise:.2g}"),
    }


@functools.cache
def _code_version() -> str:
    """Return a digest of what a recommendation is computed by: accountants, plan, law and ranking."""
    paths = [pathlib.Path(optimize.__file__)]
    for directory in (*accountants.__path__, *privacy.__path__):
        paths += [path for path in pathlib.Path(directory).rglob("*") if path.suffix in (".py", ".csv")]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find(results: Results) -> Findings:
    """Judge the targets by what is complete, corpus by corpus."""
    views = [_View(results, corpus) for corpus in results.values_of("corpus")]
    return Findings(
        claims=[claim for view in views for claim in view.claims()],
        tables=[view.table() for view in views],
        figures=[figure for view in views for figure in view.figures()],
        notes=[
            "Claims are the study's own targets. What noise costs a plan is its loss less that of training without "
            "noise, on the same held-out records; a share of it is taken seed by seed.",
            "All plans pass equally many records through the model, and spend the same (ε, δ) for a user with all "
            "records.",
            "Opacus takes one record of each user for good, and knows the number of users that are held in; here a "
            "user's record is drawn afresh in each step. It has the learning rate of the plan by hand.",
            *results.recipe.settings.get("notes", []),
        ],
        numbers={view.corpus: view.numbers() for view in views},
    )


@dataclasses.dataclass(frozen=True)
class _View:
    """Cells of one corpus."""

    results: Results
    corpus: str

    def cell(self, plan: str, epsilon: str) -> dict[str, str]:
        """Return the axis values of one cell."""
        return {"corpus": self.corpus, "plan": plan, "epsilon": epsilon}

    def closed(self, plan: str, epsilon: str, of: str) -> Estimate | None:
        """Return the share of a gap in held-out loss that a plan closes, seed by seed.

        The gap is between another plan, or the model before training, and training without noise.

        Args:
            plan: the plan that closes.
            epsilon: value of the axis, for both plans and for ``none``.
            of: the other plan, or ``base``: the model before training.

        Returns:
            1 where the plan is as good as training without noise, 0 where it is no better than ``of``; ``None`` if no
            seed has all cells complete.
        """
        # The model before training is measured in the plan's own cell, before its first step.
        other_plan = plan if of == "base" else of
        sides = [self.cell(name, epsilon) for name in (plan, other_plan, "none")]
        triples = self.results.by_seed(*sides)
        if not triples:
            return None
        shares = []
        for result, other, noiseless in triples:
            start = other.first(_LOSS) if of == "base" else other.metric(_LOSS)
            gap = start - noiseless.metric(_LOSS)
            shares.append((start - result.metric(_LOSS)) / gap)
        return Estimate(tuple(shares), have_same_split(triples))

    def claims(self) -> list[Claim]:
        """Return the targets of the study, judged."""
        return [claim for epsilon in self.results.values_of("epsilon") for claim in self._claims_at(epsilon)]

    def _claims_at(self, epsilon: str) -> list[Claim]:
        """Return the targets at one ε, judged by held-out losses: all are about the plan with correlated noise."""
        at, claims = f"on {self.corpus} at ε = {epsilon}", []
        for plan, share in self._shares(float(epsilon)):
            words = (
                f"correlated noise and the optimised plan win back {share:.0%} of what noise costs {_COSTS[plan]} {at}"
            )
            closed = self.closed("banded", epsilon, of=plan)
            claims.append(judge_at_least(_target(words, f"at least {share:.0%}"), closed, share))
        if float(epsilon) <= 1:  # no share is asked for here, only that correlated noise does no harm
            claim = _target(f"correlated noise is not worse than independent noise {at}", "within the interval")
            sides = self.cell("banded", epsilon), self.cell("optimised", epsilon)
            claims.append(judge_not_worse(claim, self.results.difference(_LOSS, *sides)))
        for other in self.results.values_of("plan"):
            if other == "optimised" or other.startswith("opacus"):
                claim = _target(f"correlated noise has a lower loss than {NAMES[other]} {at}", "lower")
                sides = self.cell(other, epsilon), self.cell("banded", epsilon)  # the first loss is to be the larger
                claims.append(judge_direction(claim, self.results.difference(_LOSS, *sides)))
        return claims

    def _shares(self, epsilon: float) -> list[tuple[str, float]]:
        """Return (plan, share): at this ε that share of what noise costs the plan is to be won back."""
        shares = [("old", 0.3), ("rate", 0.3)] if epsilon >= 4 else []
        return [*shares, ("old", 0.5)] if epsilon >= 8 else shares

    def table(self) -> Table:
        """Return a table with a row for each plan and ε: settings, perplexity, and the shares of two gaps it closes."""
        rows = []
        for epsilon in self.results.values_of("epsilon"):
            for plan in self.results.values_of("plan"):
                perplexity = self.results.estimate(_PERPLEXITY, **self.cell(plan, epsilon))
                if perplexity is None:
                    continue
                shares = [self.closed(plan, epsilon, of) for of in ("base", "old")]
                shown = ["" if share is None else f"{share.text(1, 100)}" for share in shares]
                rows.append([epsilon, NAMES[plan], self._settings(plan, epsilon), perplexity.text(1), *shown])
        base = self.results.estimate(lambda result: result.first(_PERPLEXITY), corpus=self.corpus)
        note = "Held-out perplexity and shares in percent, with 95 % t-intervals over seeds; ε is for a user."
        if base is not None:
            note += f" Before training: {base.mean:.1f}."
        columns = ("ε", "plan", "steps x batch x records, bands, rate, σ", "perplexity", "of base to no noise, %",
                   "of by hand to no noise, %")  # fmt: skip
        return Table(f"Plans of equal ε and compute on {self.corpus}", columns, rows, note)

    def _settings(self, plan: str, epsilon: str) -> str:
        """Return a plan's settings in words, from the configuration of its first cell and the noise that it had."""
        result = self.results.where(**self.cell(plan, epsilon))[0]
        section, rate = result.cell.tree["privacy"], result.cell.tree["training"]["learning_rate"]
        records = 1 if section["unit"] == "example" else section["records_per_user"]
        bands = section["num_bands"] or 1
        shape = f"{section['num_steps']} x {section['expected_batch_size']:g} x {records}, {bands}"
        return f"{shape}, {rate:g}, {noise_multiplier(result):.3g}"

    def figures(self) -> list[Figure]:
        """Return perplexity against ε, a curve a plan."""
        series = []
        for plan in self.results.values_of("plan"):
            epsilons = sorted(self.results.values_of("epsilon"), key=float)
            points = [(float(e), self.results.estimate(_PERPLEXITY, **self.cell(plan, e))) for e in epsilons]
            curve = Series.through(NAMES[plan], points)
            if curve.x:
                series.append(curve)
        if not series:
            return []
        base = self.results.estimate(lambda result: result.first(_PERPLEXITY), corpus=self.corpus)
        assert base is not None, "a complete cell has a first value"
        name, labels = f"epsilon-{self.corpus}", AxisLabels("ε for a user", "held-out perplexity", "log", "log")
        svg = curves_figure(name, series, labels, [Level("before training", base.mean)])
        caption = "Equal compute; 95 % t-intervals over seeds."
        return [Figure(name, f"held-out perplexity against ε on {self.corpus}", svg, caption)]

    def numbers(self) -> list[dict[str, Any]]:
        """Return loss and shares of every complete cell, for machines."""
        rows = []
        for epsilon in self.results.values_of("epsilon"):
            for plan in self.results.values_of("plan"):
                loss = self.results.estimate(_LOSS, **self.cell(plan, epsilon))
                if loss is None:
                    continue
                shares = {}
                for other in ("base", "old", "rate", "optimised"):
                    share = self.closed(plan, epsilon, of=other)
                    if other != plan and share is not None:
                        shares[other] = share.to_json()
                rows.append({"epsilon": epsilon, "plan": plan, "loss": loss.to_json(), "closed_of": shares})
        return rows


def _target(statement: str, bar: str) -> Statement:
    """Return a claim of the study itself; ``bar``: what counts as reaching it, in words."""
    return Statement(statement, "target of the study", bar)
