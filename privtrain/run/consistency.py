"""Whether a privacy statement, a model card, metrics and a configuration say one thing: checked from the files alone.

The statement carries the whole plan. So the plan can be rebuilt and fingerprinted, its ε computed again by the
accountant, and everything else that the statement says of the plan derived again and compared, field by field.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pydantic

import privtrain
from privtrain.config.privacy import PrivacySection
from privtrain.config.publishing import TrackingSection
from privtrain.errors import ConfigError
from privtrain.files import strict_json, strict_yaml
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.release import banner, card_section
from privtrain.run.statement import NOT_COVERED, SCHEMA, PrivacyStatement, not_covered, statement_of

#: Between machines the last digits of an accountant's answer may differ.
_RELATIVE_TOLERANCE = 1e-6

#: Keys of ``privacy`` in the published configuration that must equal the plan's field of the same name.
_CONFIG_KEYS = ("unit", "neighboring_relation", "num_steps", "clipping_norm", "clipping_style", "expected_batch_size")
#: Field of the plan → key of ``privacy`` in the configuration, where the two names differ.
_NAMES = {"delta": "target_delta", "records_per_unit": "records_per_user"}


def statement_faults(statement: dict[str, Any]) -> list[str]:
    """Return what in a privacy statement (``privacy.json``) contradicts the plan that it carries, one text a fault.

    Each begins with the name of the statement's field. Some faults, such as an unreadable plan, end the search.
    """
    if statement.get("schema") != SCHEMA:
        return [f"schema is {statement.get('schema')!r}; this version reads {SCHEMA!r}"]
    try:
        plan = PrivacyPlan.from_body(statement.get("plan"))
    except ValueError as error:
        return [f"plan: {error}"]
    fingerprint = plan.fingerprint()
    uncovered = statement.get("not_covered")
    if not isinstance(uncovered, list) or not all(isinstance(item, str) for item in uncovered):
        return ["not_covered is no list of sentences"]
    if is_our_version(statement) and uncovered[: len(NOT_COVERED)] != list(NOT_COVERED):
        return ["not_covered lacks what no run covers"]
    if statement.get("plan_fingerprint") != fingerprint:
        return [f"plan_fingerprint is {statement.get('plan_fingerprint')}, the plan stated has {fingerprint}"]
    problem = _form_problem(statement)
    if problem:
        return [problem]
    released, accounted = statement.get("steps_released"), statement.get("steps_accounted")
    if type(plan.num_steps) is not int:
        return ["plan.num_steps is no whole number"]
    if type(released) is not int or type(accounted) is not int or not 0 <= released <= accounted <= plan.num_steps:
        return [f"steps_accounted is {accounted}; must be at least steps_released and at most num_steps of the plan"]
    try:
        faults = _epsilon_faults(plan)
        expected = _derived(plan, statement)
    except (KeyError, TypeError, pydantic.ValidationError) as error:
        return [f"it lacks what a privacy statement holds ({error!r})"]
    except ValueError as error:
        return [f"epsilon: the accountant cannot certify the plan stated ({error})"]
    return faults + list(_differences(statement, expected, ""))


def _form_problem(statement: dict[str, Any]) -> str:
    """Return the first field that has a wrong type or an impossible count, with the problem; empty if there is none.

    Of fields that do not follow from the plan only the form can be checked.
    """
    try:
        parsed = PrivacyStatement.model_validate(statement)
    except pydantic.ValidationError as error:
        first, *_ = error.errors(include_input=False, include_url=False)
        # Without a field it is the model's own check, of ``private`` against ε.
        field = ".".join(map(str, first["loc"])) or "private"
        return f"{field}: {first['msg']}"
    software, num_model_steps = statement.get("software"), statement.get("steps_of_the_model")
    if not isinstance(software, dict) or not software or not all(isinstance(value, str) for value in software.values()):
        return "software: names no version"
    if type(num_model_steps) is not int or not 0 <= num_model_steps <= parsed.steps_released:
        return f"steps_of_the_model is {_short(num_model_steps)}; must be at most steps_released"
    if parsed.ledger is None or not num_model_steps <= parsed.ledger.num_commits <= parsed.steps_released:
        return "ledger.num_commits: must be at least steps_of_the_model and at most steps_released"
    return ""


def _epsilon_faults(plan: PrivacyPlan) -> list[str]:
    """Return a fault if the ε in the plan is not what the accountant computes for that plan; empty if it is."""
    if plan.noise_multiplier == 0:
        return [] if math.isinf(plan.epsilon) else [f"plan.epsilon is {plan.epsilon}, but the plan adds no noise"]
    fresh = plan.recomputed_epsilon()
    if plan.epsilon_agrees_with(fresh):
        return []
    return [f"plan.epsilon is {plan.epsilon}, the accountant gives {fresh} for the plan stated"]


def _derived(plan: PrivacyPlan, statement: dict[str, Any]) -> dict[str, Any]:
    """Return the statement that follows from the plan.

    Counts of steps, digests and software versions, which only the run knows, are taken from the statement itself.
    """
    expected = statement_of(
        plan,
        not_covered=statement["not_covered"],
        num_model_steps=statement["steps_of_the_model"],
        num_charged=statement["steps_released"],
        num_accounted=statement["steps_accounted"],
        num_commits=statement["ledger"]["num_commits"],
        ledger_head=statement["ledger"]["head"],
        split_commitment=statement["split_commitment"],
    )
    expected = json.loads(json.dumps(expected, allow_nan=False))  # types as in a file: lists in the place of tuples
    expected["software"] = statement["software"]
    for mine, theirs in zip(expected["accountants"], statement["accountants"], strict=False):
        mine["version"] = theirs["version"]
    if not is_our_version(statement):
        expected["assumptions"] = statement["assumptions"]
    return expected


def is_our_version(statement: dict[str, Any]) -> bool:
    """Return whether this version of privtrain wrote the statement, so that its words can be compared too."""
    return statement.get("software") == {"privtrain": privtrain.__version__}


def _differences(stated: Any, expected: Any, name: str) -> Iterator[str]:
    """Yield a text for every field in which two JSON values differ.

    Args:
        stated: the value in the statement.
        expected: the value that follows from the plan.
        name: dotted name of the field, such as ``mechanism.kind``; empty for the whole statement.
    """
    if isinstance(expected, dict) and isinstance(stated, dict):
        for key in sorted({*stated, *expected}):
            inner = f"{name}.{key}" if name else key
            if key not in expected:
                yield f"{inner} is no part of a statement"
            elif key not in stated:
                yield f"{inner} is missing"
            else:
                yield from _differences(stated[key], expected[key], inner)
    elif isinstance(expected, list) and isinstance(stated, list) and len(expected) == len(stated):
        for index, (mine, theirs) in enumerate(zip(stated, expected, strict=True)):
            yield from _differences(mine, theirs, f"{name}[{index}]")
    elif not _is_equal(stated, expected):
        yield f"{name} is {_short(stated)}, by the plan it is {_short(expected)}"


def _is_equal(stated: Any, expected: Any) -> bool:
    """Return whether two JSON scalars are equal, floats up to the tolerance; True is not 1, and 1 is not 1.0."""
    if type(stated) is float and type(expected) is float:
        return math.isclose(stated, expected, rel_tol=_RELATIVE_TOLERANCE, abs_tol=1e-300)
    return type(stated) is type(expected) and stated == expected


def _short(value: Any) -> str:
    """Return a value as JSON of at most 80 characters, for an error message."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


def card_faults(card: str, statement: dict[str, Any]) -> list[str]:
    """Return where a model card contradicts the privacy statement.

    A card of this version is made again and compared line by line; of another version's card only the rows with ε, δ
    and fingerprint are checked.

    Args:
        card: text of README.md.
        statement: in which :func:`statement_faults` found nothing.
    """
    plan = PrivacyPlan.from_body(statement["plan"])
    if not is_our_version(statement):
        epsilon = "∞" if statement["epsilon"] is None else f"{statement['epsilon']:.4g}"
        rows = (f"| ε | {epsilon} |", f"| δ | {plan.delta:g} |", f"| Plan fingerprint | `{plan.fingerprint()}` |")
        return [f"does not hold the statement's row {row}" for row in rows if row not in card]
    faults = []
    if banner(statement) not in card:
        faults.append("does not say that the run is not private")
    expected = card_section(plan, statement)
    start = card.find("## Privacy statement")  # -1 if it is not there
    given = card[max(start, 0) :]
    if start < 0 or given != expected:
        lines = itertools.zip_longest(expected.splitlines(), given.splitlines())
        # The lines of ours that the card lacks or has otherwise; if there is none, the card goes on too long.
        wrong = [ours for ours, theirs in lines if ours is not None and ours != theirs]
        first = wrong[0] if wrong else "its end"
        faults.append(f"is not the card of privacy.json, from this line on: {first}")
    return faults


def metrics_faults(text: str, statement: dict[str, Any]) -> list[str]:
    """Return where ``metrics.jsonl`` contradicts the statement: the largest ε of its rows must be the statement's."""
    known: list[float] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            value = strict_json.loads(line).get("privacy/epsilon")
            if value is not None:
                known.append(float(value + 0.0))  # adding fails for text, which float() would take
        except (AttributeError, ArithmeticError, ValueError, TypeError):
            return [f"line {number} is no row of metrics"]
    if known and not _is_equal(max(known), statement["epsilon"]):
        return [f"privacy/epsilon ends at {max(known)}, the statement says {statement['epsilon']}"]
    return []


def config_faults(text: str, statement: dict[str, Any]) -> list[str]:
    """Return where ``config.yaml`` contradicts the statement: its plan, and its list of what ε does not cover.

    Args:
        text: of the published configuration.
        statement: in which :func:`statement_faults` found nothing.
    """
    plan = PrivacyPlan.from_body(statement["plan"])
    try:
        document = strict_yaml.parse(text)
        if document.faults:
            return [f"line {fault.line}, {fault.key}: {fault.problem}" for fault in document.faults]
        tree = document.value
        privacy = tree["privacy"]
        expected = {name: getattr(plan, name) for name in _CONFIG_KEYS}
        expected |= {"sampling": plan.sampling, "target_delta": plan.delta, "insecure_seed": plan.insecure_seed}
        if privacy["noise_multiplier"] is not None:
            expected["noise_multiplier"] = plan.noise_multiplier
        wrong = {name: value for name, value in expected.items() if privacy[name] != value}
        faults = [f"privacy.{name} is {privacy[name]}, by the statement it is {value}" for name, value in wrong.items()]
        if faults or not is_our_version(statement):
            return faults
        return _remade_faults(tree, plan, statement["not_covered"])
    except (*strict_yaml.YAML_FAULTS, ConfigError) as error:
        return [f"is no published configuration ({type(error).__name__})"]


def _remade_faults(tree: dict[str, Any], plan: PrivacyPlan, uncovered: list[str]) -> list[str]:
    """Make the plan and the list of what ε does not cover again from the configuration; return what differs.

    Args:
        tree: the published configuration.
        plan: as the statement carries it.
        uncovered: the statement's list of what ε does not cover.
    """
    section = PrivacySection.model_validate(tree["privacy"])
    # Noise and accountant may be "chosen by the program" in the configuration; the statement's are filled in.
    given = {"noise_multiplier": plan.noise_multiplier, "accountant": section.accountant or plan.accountant}
    # Uncertified: made without asking the accountant, as ε was checked from the statement already.
    remade = PrivacyPlan.uncertified(section.model_copy(update=given), strategy=plan.strategy).body()
    faults = [
        f"privacy.{_NAMES.get(name, name)} gives {_short(remade[name])}, by the statement it is {_short(value)}"
        for name, value in plan.body().items()
        if name != "epsilon" and remade[name] != value
    ]
    # "Bands" are the steps over which noise is correlated; 1 means that each step has noise of its own.
    bands = 1 if plan.strategy is None else plan.strategy.num_bands
    if section.num_bands not in (None, "auto", bands):
        faults.append(f"privacy.num_bands is {section.num_bands}, by the statement it is {bands}")
    if section.target_epsilon is not None and not plan.epsilon <= section.target_epsilon * (1 + _RELATIVE_TOLERANCE):
        faults.append(f"privacy.target_epsilon is {section.target_epsilon}, the statement's ε is {plan.epsilon}")
    tracking = TrackingSection.model_validate(tree["tracking"])
    # Which mirrors were watched while the run trained is not in the configuration.
    if uncovered not in [not_covered(tracking, watched) for watched in ((), ("wandb",))]:
        faults.append("tracking publishes other things than not_covered of the statement names")
    return faults
