"""``privtrain from``: a configuration of TRL, axolotl or LLaMA-Factory, translated or refused key by key.

"Ours" are the keys of a privtrain configuration, written dotted (``lora.rank``); "foreign" are the other stack's.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from privtrain.commands.stacks import axolotl, llamafactory, rules, trl
from privtrain.commands.stacks.rules import Outcome, Rule
from privtrain.commands.starting_point import plan_for
from privtrain.config.commented import commented_yaml
from privtrain.config.dotted import assigned
from privtrain.config.load import read_tree, validate
from privtrain.errors import ConfigError, Fault
from privtrain.files.atomic import write_atomically
from privtrain.files.writable import why_unwritable

StackName = Literal["trl", "axolotl", "llamafactory"]

_STACKS = {"trl": trl, "axolotl": axolotl, "llamafactory": llamafactory}
_TITLES = {"trl": "TRL", "axolotl": "axolotl", "llamafactory": "LLaMA-Factory"}

#: Two words that are more alike than this, from 0 to 1, may be one word.
_ALIKE = 0.8

#: What no other stack has, and the plan cannot do without.
_PLAN_NEEDS = {
    "data.user_column": "Needed: the column that holds the user id of a row. ε is for these users.",
    "privacy.sampling_prob": "Needed: the probability that a user joins a step, e.g. batch / users.",
    "privacy.expected_batch_size": "Needed: sampling_prob x users that are trained on; a public constant.",
    "privacy.target_epsilon": "Needed: the guarantee. 8 is common, 1 is strong; privtrain plan shows what it costs.",
    "privacy.target_delta": "Needed: below 1 / users, e.g. a tenth of it.",
    "privacy.num_steps": "Needed: optimizer steps. sampling_prob x num_steps is how often a user takes part.",
}


@dataclasses.dataclass(frozen=True)
class Translation:
    """A foreign configuration as one of ours, and what became of each of its keys.

    Attributes:
        tree: section → key → value of ours, e.g. ``{"lora": {"rank": 8}}``; incomplete if ``needs`` is not empty.
        translated: foreign key → dotted keys of ours.
        left_out: foreign key → why nothing depends on it.
        refused: foreign key → why the model that it asks for cannot be trained.
        needs: dotted key of ours → what somebody must still decide.
    """

    tree: dict[str, Any]
    translated: dict[str, tuple[str, ...]]
    left_out: dict[str, str]
    refused: dict[str, str]
    needs: dict[str, str]


def translate(
    stack: StackName,
    foreign: Mapping[str, Any],
    *,
    name: str = "run",
    num_users: int | None = None,
    user_column: str | None = None,
    without: Sequence[str] = (),
) -> Translation:
    """Translate every key of a foreign configuration, and the stack's defaults of keys that it does not give.

    Args:
        stack: whose configuration it is.
        foreign: its keys and values.
        name: name of the run.
        num_users: a public number of users; without it the keys of the privacy plan stay to be decided.
        user_column: column of the user id, if it is known.
        without: foreign keys that are left out knowingly, whatever they ask for.
    """
    asked = {key: value for key, value in foreign.items() if key not in without}
    report_to = str(asked.get("report_to") or "")
    values: dict[str, Any] = {"run.name": name, "tracking.wandb": "wandb" in report_to}
    for tracker in ("mlflow", "trackio"):
        if tracker in report_to:
            values[f"tracking.{tracker}"] = True
    if user_column is not None:
        values["data.user_column"] = user_column
    needs: dict[str, str] = {}
    translated: dict[str, tuple[str, ...]] = {}
    left_out: dict[str, str] = {}
    refused: dict[str, str] = {}
    for key, outcome in _outcomes(stack, asked).items():
        if outcome.is_refused:
            refused[key] = outcome.reason
            continue
        values |= outcome.values
        needs |= outcome.needs
        if outcome.values:
            translated[key] = tuple(outcome.values)
        else:
            left_out[key] = outcome.reason
    left_out |= {key: "left out, as you said" for key in without if key in foreign}
    needs |= _plan(values, num_users)
    _settle(values, needs)
    return Translation(assigned({}, values), translated, left_out, refused, needs)


def _outcomes(stack: StackName, asked: Mapping[str, Any]) -> dict[str, Outcome]:
    """Return what becomes of each foreign key that is asked for, and of the stack's defaults for keys that are not.

    A default stands under a title of its own.
    """
    module = _STACKS[stack]
    outcomes = {key: _outcome(module.RULES, key, value, asked) for key, value in asked.items()}
    for key, value in module.defaults(asked).items():
        if asked.get(key) is None:
            outcomes[f"{key} (default of {_TITLES[stack]}: {value})"] = _ruled(module.RULES[key], value, asked)
    return outcomes


def write_translation(
    stack: StackName,
    path: pathlib.Path,
    output: pathlib.Path,
    *,
    num_users: int | None = None,
    user_column: str | None = None,
    without: Sequence[str] = (),
) -> None:
    """Translate a foreign configuration file, print what became of every key, and write a configuration of ours.

    Args:
        stack: whose configuration it is.
        path: the foreign file, YAML or JSON; its name becomes the run's.
        output: the file to write; must not exist.
        num_users: a public number of users; without it the keys of the privacy plan stay to be decided.
        user_column: column of the user id, if it is known.
        without: foreign keys that are left out knowingly, whatever they ask for.

    Raises:
        ConfigError: if a key is refused (all of them at once, and nothing is written), or the file cannot be read.
    """
    if output.exists():
        raise ConfigError([Fault(str(output), "exists already; choose another --output, or remove it")])
    problem = why_unwritable(output.absolute().parent)
    if problem:
        raise ConfigError([Fault("--output", problem)])
    document = read_tree(path)
    faults = [Fault(fault.key, fault.problem, fault.line) for fault in document.faults]
    faults += [Fault(str(key), "a key is a name") for key in document.value if not isinstance(key, str)]
    if faults:
        raise ConfigError(faults, str(path))
    translation = translate(
        stack, document.value, name=path.stem, num_users=num_users, user_column=user_column, without=without
    )
    faults = [Fault(key, reason, document.line_of((key,))) for key, reason in translation.refused.items()]
    if faults:
        hint = Fault("", "to train without what such a key asks for, add: --without KEY")
        raise ConfigError([*faults, hint], str(path))
    check_translation(translation)
    head = (
        f"Translated from {path.name} ({_TITLES[stack]}) by privtrain from. Every key is here; those behind a # stand "
        "at their defaults." + ("\nDecide what is marked as needed before training." if translation.needs else "")
    )
    write_atomically(output, commented_yaml(translation.tree, head, translation.needs))
    _print(translation, output)


def check_translation(translation: Translation) -> None:
    """Raise if the keys that were translated contradict one another.

    For this check alone, valid values stand in for what is still to be decided.

    Raises:
        ConfigError: with every fault.
    """
    tree = {
        **translation.tree,
        "data": dict(translation.tree.get("data", {})),
        "privacy": dict(translation.tree.get("privacy", {})),
    }
    tree["data"].setdefault("source", {"kind": "hub", "name": "to-be-decided"})
    tree["privacy"] = {**plan_for(1000, 0.1), **tree["privacy"]}
    validate(tree, "the translated configuration")


def _outcome(table: Mapping[str, Rule], key: str, value: Any, asked: Mapping[str, Any]) -> Outcome:
    """Apply a foreign key's rule, which may be that of its prefix; refuse an unknown key, naming a similar known one.

    Args:
        table: foreign key → rule, of the stack.
        key: foreign key.
        value: its value.
        asked: the whole foreign configuration.
    """
    if value is None or value == "":
        return Outcome(reason="not set")
    rule = table.get(key) or next((r for prefix, r in rules.PREFIXES.items() if key.startswith(prefix)), None)
    if rule is None:
        near = _near_key(key, table)
        return rules.refused(f"is not known here{f'; is it {near}?' if near else ''}")
    return _ruled(rule, value, asked)


def _near_key(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that a key most probably stands for, with a slip of the hand in it; None if there is none.

    Word by word the two are alike, or one is short for the other: ``max_seq_len`` is near ``max_seq_length``, but
    ``lora_rank`` is no ``local_rank``.
    """

    def likeness(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    def are_alike(one: str, other: str) -> bool:
        is_short = bool(one) and bool(other) and (one.startswith(other) or other.startswith(one))
        return is_short or likeness(one, other) > _ALIKE

    def is_near(other: str) -> bool:
        words, others = key.split("_"), other.split("_")
        if "".join(words) == "".join(others):
            return True
        return len(words) == len(others) and all(map(are_alike, words, others))

    return max(filter(is_near, sorted(known)), key=lambda other: likeness(key, other), default=None)


def _ruled(rule: Rule, value: Any, asked: Mapping[str, Any]) -> Outcome:
    """Apply a rule; a value of another form than it reads is refused."""
    try:
        return rule(value, asked)
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError):
        return rules.refused(f"given {value!r}, which is no value of this key")


def _plan(values: dict[str, Any], num_users: int | None) -> dict[str, str]:
    """Add the keys of the privacy plan to ``values`` if the number of users is known.

    Returns:
        Dotted keys that are still to be decided → what to know of them.
    """
    if num_users is not None:
        planned = plan_for(num_users, values.get("data.held_out_fraction", 0.1))
        for key, value in planned.items():
            values.setdefault(f"privacy.{key}", value)
    return {key: text for key, text in _PLAN_NEEDS.items() if key not in values}


def _settle(values: dict[str, Any], needs: dict[str, str]) -> None:
    """Finish ``values``, dotted keys of ours: replace the undotted ones, and drop what the other keys make useless.

    Undotted keys wait for others: ``warmup_ratio`` for the number of steps, ``beta1`` and ``beta2`` for each other.
    """
    ratio = values.pop("warmup_ratio", None)
    if ratio is not None and "training.num_warmup_steps" not in values:
        if "privacy.num_steps" in values:
            values["training.num_warmup_steps"] = round(ratio * values["privacy.num_steps"])
        elif ratio:
            needs["training.num_warmup_steps"] = f"Needed: {ratio:g} x privacy.num_steps."
    beta1, beta2 = values.pop("beta1", None), values.pop("beta2", None)
    if beta1 is not None or beta2 is not None:
        values["training.betas"] = [beta1 or 0.9, beta2 or 0.999]  # AdamW's defaults for one that is not given
    if values.get("training.method") == "full":
        for key in [key for key in values if key.startswith("lora.")]:
            del values[key]
    if values.get("data.format", "text") not in ("text", "classification"):
        values.pop("data.text_column", None)


def _print(translation: Translation, output: pathlib.Path) -> None:
    """Print what became of every foreign key, and what must still be decided."""
    console = Console(highlight=False)
    table = Table("their key", "ours")
    for key, names in translation.translated.items():
        table.add_row(Text(key), ", ".join(names))
    for key, reason in translation.left_out.items():
        table.add_row(Text(key), Text(f"left out: {reason}", style="dim"))
    console.print(table)
    for key, text in translation.needs.items():
        console.print(Text.assemble(("needed", "yellow"), f" {key}: {text.removeprefix('Needed: ')}"), soft_wrap=True)
    console.print(f"wrote {output}; next: privtrain preview {output}", soft_wrap=True)
