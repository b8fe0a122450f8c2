"""``privtrain disclose``: a finished run in the forms that registries and evaluators ask for."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, Literal

from accountants.gaussian_summary import gaussian_summary
from accountants.registry import get_accountant
from accountants.tradeoff import privacy_curve
from privtrain.config import load_config
from privtrain.errors import VerificationFailed
from privtrain.files import reading, strict_yaml
from privtrain.privacy.plan import PrivacyPlan, fast_accountant
from privtrain.run import bundle, disclosure
from privtrain.run.directory import RunDirectory
from privtrain.run.statement import PrivacyStatement

Form = Literal["opendp", "nist", "gdp"]

#: Points of the privacy curve (δ for each ε) that μ is computed from.
_NUM_POINTS = 400
#: The curve ends at the ε that holds with this share of δ, which is the summary's slack.
_SLACK = 0.01


def disclose(run: pathlib.Path, form: Form) -> str:
    """Return a document about a finished run; what was released is checked first.

    Args:
        run: its directory; the published files are enough.
        form: opendp (YAML record), nist (Markdown checklist) or gdp (JSON: mu beside ε and δ).

    Raises:
        ConfigError: if nothing was released there.
        VerificationFailed: if a file is not what was released.
    """
    bundle.check_released(run)
    directory = RunDirectory(run)
    statement = PrivacyStatement.model_validate(reading.read_json(directory.privacy))
    config = load_config(directory.config)
    try:
        plan = PrivacyPlan.from_body(statement.plan)  # the one that was carried out
    except ValueError as error:
        raise VerificationFailed([f"privacy.json: plan: {error}"], run) from None
    if form == "opendp":
        return strict_yaml.dump(disclosure.deployment_record(statement, config, plan))
    mu = gaussian_of(statement, plan)
    if form == "gdp":
        return json.dumps({"epsilon": statement.epsilon, "delta": statement.delta, "gaussian": mu}, indent=2) + "\n"
    rows = disclosure.evaluation_checklist(statement, config, plan, mu)
    return disclosure.checklist_markdown(rows, config.run.name)


def gaussian_of(statement: PrivacyStatement, plan: PrivacyPlan) -> dict[str, Any] | None:
    """Return one number μ that sums up the whole privacy curve of a run: the run is μ-Gaussian-DP (arXiv 1905.02383).

    The curve is that of the steps that were charged. Beside μ the answer says how far μ exceeds the true curve (the
    fields of :class:`accountants.gaussian_summary.GaussianSummary`). ``None`` where there is no privacy, or where ε
    does not follow from the sampled mechanism alone (group privacy).
    """
    if plan.not_private_reasons or not plan.user_accounting.follows_from_event:
        return None
    event = plan.event_of_steps(statement.steps_accounted or statement.steps_released)
    accountant = get_accountant(fast_accountant(plan.accountant))
    largest_epsilon = accountant.epsilon(event, _SLACK * statement.delta).upper
    summary = gaussian_summary(privacy_curve(event, accountant, largest_epsilon=largest_epsilon, points=_NUM_POINTS))
    return None if summary is None else dataclasses.asdict(summary)
