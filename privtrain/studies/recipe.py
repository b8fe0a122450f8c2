"""A study's recipe: one YAML file with a base configuration, axes and seeds, expanded into cells in a fixed order.

An *axis* has named values, e.g. ``method`` with ``plain`` and ``dp``; a value is a set of overrides of the base, such
as ``{privacy.noise_multiplier: 1.1}``. A *cell* is one combination of values and a seed: a training job and the
commands that follow it. A cell's *digest* covers everything that decides what it does: its configuration, its commands,
how its data are made, and privtrain's version. Cells of equal digest are one and the same job. A *place* is a
placeholder such as ``{data}``, for a path that is known only when the study runs.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import hashlib
import importlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import pydantic
from pydantic import Field

import privtrain
from privtrain.config.dotted import place_of
from privtrain.config.load import read_tree, to_yaml, validate
from privtrain.config.section import Section
from privtrain.errors import ConfigError, Fault

#: Where the shipped recipes lie: ``launch/recipes/studies/NAME/SCALE.yaml`` of the repository.
RECIPES = pathlib.Path(__file__).parents[2] / "launch" / "recipes" / "studies"

TRAIN = "privtrain train {config}"

#: Placeholders in a configuration or a command: the configuration file, the run directory, the job's directory, the
#: directory of the study's prepared files, and that of its recipe.
PLACES = ("config", "run", "cell", "data", "recipe")

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class Recipe(Section):
    """What ``launch/recipes/studies/NAME/SCALE.yaml`` holds."""

    study: str = Field(pattern=_NAME.pattern, description="Name of the study.")
    module: str | None = Field(default=None, description="Python module that reads the results; default: the study's.")
    settings: dict[str, Any] = Field(default={}, description="What the study's module reads; part of no digest.")
    prepare: dict[str, str] = Field(
        default={}, description="File under {data} -> command that writes it at {file}; run once, before the cells."
    )
    base: dict[str, Any] = Field(description="Configuration that all cells share, without run.")
    axes: dict[str, dict[str, dict[str, Any] | None]] = Field(
        description="Axis -> value -> dotted overrides. The key commands replaces the study's commands."
    )
    exclude: list[dict[str, list[str]]] = Field(
        default=[], description="Combinations that are left out: axis -> value or values; all axes named must fit."
    )
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1, description="One job a cell and seed.")
    seed_key: str | None = Field(
        default="privacy.insecure_seed",
        description="Key that takes the seed: the same split, sample and noise for every method, and a run that is "
        "marked as not private. null: every job draws its own secrets.",
    )
    commands: list[str] = Field(
        default=[TRAIN],
        min_length=1,
        description="Run one after another; {config}, {run}, {cell}, {data} and {recipe} are paths.",
    )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One job of a study.

    Attributes:
        name: its axis values and seed, unique in the study.
        values: axis -> value.
        seed: which repetition.
        tree: its configuration, all defaults filled in, without the section ``run``; ``{data}`` is not filled in.
        commands: with placeholders not filled in.
        digest: SHA-256 of everything that decides what the job does.
    """

    name: str
    values: Mapping[str, str]
    seed: int
    tree: Mapping[str, Any]
    commands: tuple[str, ...]
    digest: str

    def config_yaml(self, directory: pathlib.Path, data: pathlib.Path) -> str:
        """Return the file that ``privtrain train`` reads, for a cell that lives in ``directory``."""
        tree = {"run": {"name": "run", "output_dir": str(directory)}, **copy.deepcopy(dict(self.tree))}
        return to_yaml(_in_strings(tree, {"data": str(data)}))


class Settle(Protocol):
    """Computes overrides of a cell from its axis values, e.g. the noise that an accountant asks for."""

    def __call__(
        self, values: Mapping[str, str], tree: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return dotted overrides.

        Args:
            values: axis → value of the cell.
            tree: the cell's nested configuration so far: the base with the overrides of these values and the seed.
            settings: of the recipe.
        """
        ...


def recipe_path(study: str, scale: str) -> pathlib.Path:
    """Return the shipped recipe of a study.

    Raises:
        ConfigError: if there is none; with those that there are.
    """
    path = RECIPES / study / f"{scale}.yaml"
    if not path.is_file():
        known = sorted(str(p.parent.name) for p in RECIPES.glob(f"*/{scale}.yaml"))
        listed = ", ".join(known) or f"none: {RECIPES} does not exist; run in the repository, or give --recipe FILE"
        raise ConfigError([Fault("study", f"no recipe of {study!r} at scale {scale}; there are {listed}")])
    return path


def read_recipe(path: pathlib.Path) -> Recipe:
    """Read and validate a recipe.

    Raises:
        ConfigError: with every fault.
    """
    try:
        document = read_tree(path)
        if document.faults:
            raise ConfigError([Fault(item.key, item.problem, item.line) for item in document.faults], str(path))
        return Recipe.model_validate(_with_text_keys(document.value))
    except pydantic.ValidationError as error:
        faults = [Fault(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors(include_url=False)]
        raise ConfigError(faults, str(path)) from None


def module_of(recipe: Recipe) -> Any:
    """Return the Python module that settles a study's cells and reads their results.

    Raises:
        ConfigError: if there is none.
    """
    name = recipe.module or f"privtrain.studies.{recipe.study.replace('-', '_')}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError([Fault("module", f"there is no module {name}")]) from None


def expand(recipe: Recipe, settle: Settle | None = None) -> list[Cell]:
    """Return every cell, axes in the order of the recipe, seeds innermost.

    Raises:
        ConfigError: with every fault of every cell.
    """
    cells, faults = [], []
    for values in _combinations(recipe):
        for seed in recipe.seeds:
            name = "-".join([*values.values(), f"s{seed}"])
            try:
                cells.append(_cell(recipe, name, values, seed, settle))
            except ConfigError as error:
                faults += [Fault(f"{name}: {fault.path}", fault.problem) for fault in error.faults]
    if not (cells or faults):
        faults = [Fault("axes", "no cell is left")]
    uses = collections.Counter(cell.name for cell in cells)
    repeated = sorted(name for name, count in uses.items() if count > 1)
    faults += [Fault("axes", f"two cells are named {name}") for name in repeated]
    if faults:
        raise ConfigError(faults, f"study {recipe.study}")
    return cells


def _combinations(recipe: Recipe) -> Iterator[dict[str, str]]:
    """Yield axis → value of every combination that the recipe does not exclude."""
    for combination in itertools.product(*recipe.axes.values()):
        values = dict(zip(recipe.axes, combination, strict=True))
        if not any(_is_excluded(values, rule) for rule in recipe.exclude):
            yield values


def _is_excluded(values: Mapping[str, str], rule: Mapping[str, Sequence[str]]) -> bool:
    """Return whether a rule, axis → excluded values, leaves a combination out: all axes that it names must fit."""
    return all(values.get(axis) in excluded for axis, excluded in rule.items())


def _cell(recipe: Recipe, name: str, values: Mapping[str, str], seed: int, settle: Settle | None) -> Cell:
    """Return one cell: the base with the overrides of its axis values, its seed and ``settle``, validated and digested.

    Args:
        recipe: the study's.
        name: of the cell.
        values: axis → value.
        seed: which repetition.
        settle: computes further overrides, e.g. a noise multiplier.

    Raises:
        ConfigError: with every fault of the cell.
    """
    if not _NAME.match(name):
        raise ConfigError([Fault("axes", "names of values are letters, digits, dots, dashes and underscores")])
    tree, commands = copy.deepcopy(recipe.base), list(recipe.commands)
    for axis, value in values.items():
        overrides = dict(recipe.axes[axis][value] or {})
        commands = overrides.pop("commands", commands)
        _assign(tree, overrides)
    if recipe.seed_key is not None:
        _assign(tree, {recipe.seed_key: seed})
    if settle is not None:
        _assign(tree, settle(values, tree, recipe.settings))
    config = validate({**tree, "run": {"name": "run"}})
    resolved = config.model_dump(mode="json", exclude={"run"})
    # Keys at their default are not digested, so that a key which a later version adds does not change every digest.
    not_default = config.model_dump(mode="json", exclude={"run"}, exclude_defaults=True)
    faults = [Fault("commands", f"{c!r} has an unknown place") for c in commands if _open_places(c) - set(PLACES)]
    if faults:
        raise ConfigError(faults)
    deciding = {
        "privtrain": privtrain.__version__,
        "config": not_default,
        "commands": commands,
        "prepare": recipe.prepare,
        "seed": seed,
    }
    canonical = json.dumps(deciding, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return Cell(name, dict(values), seed, resolved, tuple(commands), digest)


def fill(command: str, places: Mapping[str, str]) -> list[str]:
    """Return a command's words with placeholders filled in (name → path); a path with a space stays one word."""
    return [_in_strings(word, places) for word in command.split()]


def _open_places(text: str) -> set[str]:
    """Return the names that stand in braces in a text."""
    return set(re.findall(r"\{(\w+)\}", text))


def _assign(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Put dotted overrides, e.g. ``{"privacy.num_steps": 9}``, into a tree; ``None`` removes a key."""
    for key, value in overrides.items():
        try:
            node, leaf = place_of(tree, key)
        except ValueError as error:
            raise ConfigError([Fault(key, str(error))]) from None
        if value is None:
            node.pop(leaf, None)
        else:
            node[leaf] = copy.deepcopy(value)


def _in_strings(node: Any, places: Mapping[str, str]) -> Any:
    """Fill in ``{place}`` in every text of a tree."""
    if isinstance(node, dict):
        return {key: _in_strings(value, places) for key, value in node.items()}
    if isinstance(node, list):
        return [_in_strings(value, places) for value in node]
    if isinstance(node, str):
        for place, value in places.items():
            node = node.replace(f"{{{place}}}", value)
    return node


def _with_text_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """Turn names of axes and of their values into text, in ``tree`` itself: YAML reads the name ``8`` as a number.

    What has another form than a recipe's is left as it is, for the model to refuse.
    """
    axes = tree.get("axes")
    if isinstance(axes, dict):
        tree["axes"] = {str(axis): _text_keyed(values) for axis, values in axes.items()}
    rules = tree.get("exclude")
    if rules is None:
        tree.pop("exclude", None)  # an empty key excludes nothing
    elif isinstance(rules, list):
        tree["exclude"] = [_text_rule(rule) for rule in rules]
    return tree


def _text_keyed(node: Any) -> Any:
    """Return a mapping with its keys as texts; anything else as it is."""
    return {str(key): value for key, value in node.items()} if isinstance(node, dict) else node


def _text_rule(rule: Any) -> Any:
    """Return a rule of ``exclude``, e.g. ``{method: dp, k: [1, 8]}``, with lists of texts; anything else as it is."""
    if not isinstance(rule, dict):
        return rule
    return {str(axis): _texts(values) for axis, values in rule.items()}


def _texts(value: Any) -> list[str]:
    """Return a value, or a list of values, as a list of texts."""
    items = value if isinstance(value, list) else [value]
    return [str(item) for item in items]
