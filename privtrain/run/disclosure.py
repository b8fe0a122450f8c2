"""Forms that describe a finished run to others: OpenDP's registry of deployments, and NIST's evaluation checklist.

Everything is filled from the privacy statement and the published configuration. What only the publisher knows is
marked, never invented.
"""

from __future__ import annotations

from typing import Any

from privtrain.config import Config
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.statement import PrivacyStatement, unit_text

#: Stands where the publisher must say something.
FOR_YOU = "TO BE FILLED IN"

_WHAT_NEIGHBOURS_DIFFER_IN = {
    "add_or_remove_one": "one unit with all of its records is added or removed",
    "zero_out": "the records of one unit are replaced by nothing, and its place stays",
}


def deployment_record(statement: PrivacyStatement, config: Config, plan: PrivacyPlan) -> dict[str, Any]:
    """Return the run as a record of OpenDP's registry of deployments, with that registry's fields (tiers 1 to 3).

    Args:
        statement: of the run.
        config: published by the run.
        plan: the plan in the statement.
    """
    return {
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "product": {
                "name": config.run.name,
                "data_curators": [FOR_YOU],
                "intended_use": FOR_YOU,
                "data_product_type": "Machine learning model",
                "data_product_region": FOR_YOU,
                "description": f"{config.model.public_name}, fine-tuned ({config.training.method}) with "
                f"{statement.unit}-level DP-SGD.",
                "publication_date": FOR_YOU,
                "data_product_sector": FOR_YOU,
            },
            "dp_flavor": {
                "name": "Approximate DP",
                "input_metric": f"Number of {statement.unit}s whose records differ",
                "bound_on_input_distance": 1,
                "output_measure": "Approximate max-divergence",
                "bound_on_output_distance": _pair(statement),
                "data_domain": f"Any records of any {statement.unit}s, in the format {config.data.format}. {FOR_YOU}: "
                "who they are.",
                "unprotected_quantities": " ".join(statement.not_covered) or "None.",
            },
            "privacy_loss": {
                "privacy_unit": unit_text(plan),
                "privacy_unit_description": "Of two neighbouring data sets, one is the other in which "
                f"{_WHAT_NEIGHBOURS_DIFFER_IN[statement.neighboring_relation]}.",
                "privacy_parameters": _parameters(statement),
                "privacy_parameters_description": "ε is a certified upper bound by the accountant "
                f"{plan.accountant}; {statement.steps_released} steps were charged.",
            },
            "model": {
                "model_name": "Central",
                "actors": "The publisher trains on records that it holds and is trusted with them. Everybody else may "
                "see the model, the configuration, the privacy statement and the released metrics.",
                "release_type": "One-shot",
                "release_type_description": (
                    "One training run." if statement.tuning is None else "The best of a secret number of training runs."
                )
                + f" {FOR_YOU}: other uses of the same data.",
                "data_source_type": "Static",
                "access_type": "Non-interactive",
            },
            "accounting": {
                "post_processing": "Optimizer, choice of what is published, export and merging.",
                "composition": f"Over {statement.num_steps} steps of {plan.sampling.replace('_', ' ')} sampling with "
                f"probability {plan.sampling_prob:g}, by privacy loss distributions or a certified equivalent.",
            },
            "implementation": {
                "pre_processing_eda_hyperparameter_tuning": _sentence(statement, "Hyper-parameter")
                + f" {FOR_YOU}: pre-processing and exploration.",
                "mechanisms": f"Gaussian mechanism, noise multiplier {plan.noise_multiplier:g}, clipping norm "
                f"{plan.clipping_norm:g} ({plan.clipping_style}). Sums are integers on a public grid and the noise is "
                "the exactly rounded Gaussian (floating-point attacks). Times, throughput and memory of a step are not "
                "released unless the statement says so (side channels). Software: "
                + ", ".join(f"{name} {version}" for name, version in (statement.software or {}).items())
                + ".",
                "justification": FOR_YOU,
            },
            "resources": {
                "sources": f"privacy.json with plan fingerprint {statement.plan_fingerprint}",
                "registry_authors": [FOR_YOU],
            },
        },
    }


def evaluation_checklist(
    statement: PrivacyStatement, config: Config, plan: PrivacyPlan, gaussian: dict[str, float] | None = None
) -> list[tuple[str, str, str]]:
    """Return (layer, question, answer) along the layers of NIST SP 800-226's pyramid, from the guarantee downwards.

    Args:
        statement: of the run.
        config: published by the run.
        plan: the plan in the statement.
        gaussian: the Gaussian curve nearest to the run's privacy curve: its ``mu``, and the ``slack`` and ``regret`` of
            that description; None if it was not computed.
    """
    bound = statement.contribution_bound
    k = "no bound" if bound is None else f"at most {bound.records_per_unit_per_step} records in a step"
    mu = "not computed"
    if gaussian is not None:
        mu = f"μ = {gaussian['mu']:.3f} (slack {gaussian['slack']:.1e}, regret {gaussian['regret']:.3f})"
    return [
        ("Guarantee", "Which ε and δ?", _pair(statement)),
        ("Guarantee", "The whole privacy curve in one number?", mu),
        (
            "Guarantee",
            "Is δ below 1 / units?",
            f"δ = {statement.delta:g}; {FOR_YOU}: the number of units is not published",
        ),
        ("Guarantee", "Does it hold at all?", "yes" if statement.private else "; ".join(statement.not_private_reasons)),
        ("Unit of privacy", "Who is protected?", f"{unit_text(plan)}, {k}"),
        ("Unit of privacy", "What is a neighbour?", _WHAT_NEIGHBOURS_DIFFER_IN[statement.neighboring_relation]),
        ("Unit of privacy", "What if a person has several units?", _sentence(statement, "The owner of a record")),
        (
            "Algorithm",
            "Which mechanism?",
            f"DP-SGD: Gaussian noise, multiplier {plan.noise_multiplier:g}, on sums of clipped gradients",
        ),
        (
            "Algorithm",
            "How is it composed?",
            f"{statement.steps_released} steps, accountant {plan.accountant}, certified upper bound",
        ),
        ("Algorithm", "Was tuning accounted for?", _sentence(statement, "Hyper-parameter")),
        ("Algorithm", "Is anything released without noise?", " ".join(statement.not_covered) or "no"),
        ("Utility", "How is it measured?", "on data.evaluation, public rows" if config.data.evaluation else FOR_YOU),
        ("Utility", "Does it differ between groups of users?", FOR_YOU),
        ("Implementation", "Floating point?", "integer sums, exactly rounded Gaussian on a public grid"),
        ("Implementation", "Source of randomness?", _sentence(statement, "The noise is exactly")),
        (
            "Implementation",
            "Timing and other side channels?",
            "measurements stay private unless the statement says otherwise",
        ),
        (
            "Implementation",
            "Was it tested?",
            "a self-test before the first step; attacks and an audit: attacks score, analyse, report",
        ),
        (
            "Trust",
            "Who is trusted with the raw data?",
            f"the machines of the job (central model). {FOR_YOU}: who runs them",
        ),
        ("Trust", "Who may have seen secrets?", _sentence(statement, "The keys in secret/")),
        (
            "Access control",
            "Who can reach records and keys?",
            f"modes 0700 and 0600 on the machines. {FOR_YOU}: people and backups",
        ),
        ("Data collection", "Were the data exposed before training?", FOR_YOU),
        (
            "Budget",
            "Are other releases made from the same data?",
            f"the registry of budgets tells, where one is used. {FOR_YOU}",
        ),
    ]


def checklist_markdown(rows: list[tuple[str, str, str]], name: str) -> str:
    """Return the checklist as a Markdown page."""
    lines = [f"| {topic} | {question} | {answer.replace('|', '/')} |" for topic, question, answer in rows]
    head = (
        f"# {name}: checklist after NIST SP 800-226\n\nFilled from privacy.json and config.yaml by privtrain disclose. "
        f"Answer what is marked {FOR_YOU}.\n\n| layer | question | answer |\n|---|---|---|\n"
    )
    return head + "\n".join(lines) + "\n"


def _pair(statement: PrivacyStatement) -> str:
    """Return ε and δ as text; ε is ∞ of a run that is not private."""
    epsilon = "∞" if statement.epsilon is None or not statement.private else f"{statement.epsilon:.4g}"
    return f"ε = {epsilon}, δ = {statement.delta:g}"


def _parameters(statement: PrivacyStatement) -> dict[str, float]:
    """Return ε and δ as numbers; empty of a run that is not private."""
    if statement.epsilon is None or not statement.private:
        return {}
    return {"epsilon": statement.epsilon, "delta": statement.delta}


def _sentence(statement: PrivacyStatement, beginning: str) -> str:
    """Return the statement's assumption that begins with these words, or "not stated"."""
    return next((text for text in statement.assumptions if text.startswith(beginning)), "not stated")
