"""Read a YAML file and dotted overrides into a :class:`Config`; report every fault at once.

A *place* is where a value stands in the tree of the configuration, as names and numbers of list items: ``("data",
"source", "paths", 0)``. A *conflict* is a fault of several keys that do not go together.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import itertools
import json
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from privtrain.config.data import DataSection
from privtrain.config.dotted import place_of
from privtrain.config.model import ModelSection
from privtrain.config.schema import Config
from privtrain.config.section import ConflictError
from privtrain.errors import ConfigError, Fault, PrivtrainError
from privtrain.files import reading, strict_yaml

_MAX_BYTES = 16 << 20
#: Values of required keys in a second look for conflicts (:func:`_validated`), where their own are missing or at fault.
_STAND_INS = {"privacy.expected_batch_size": 1.0, "privacy.target_delta": 0.5, "privacy.num_steps": 1}

_PlacedFault = tuple[strict_yaml.Path, Fault]


def load_config(path: pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration, override and validate it.

    Args:
        path: a YAML file with the tree of :class:`Config`.
        overrides: dotted assignments such as ``privacy.target_epsilon=4``; values are parsed as YAML.

    Raises:
        ConfigError: with every fault, each naming its YAML path.
    """
    document = read_tree(path)
    faults = [Fault(fault.key, fault.problem, fault.line) for fault in document.faults]
    tree = apply_overrides(document.value, overrides)
    overridden = [tuple(_key_assigned(override).split(".")) for override in overrides]

    def line_of(place: strict_yaml.Path) -> int | None:
        """Return the line of the file where a value stands; None if it comes from an override."""
        is_overridden = any(place[: len(key)] == key for key in overridden)
        return None if is_overridden else document.line_of(place)

    config, placed_faults = _validated(tree)
    # Of a key that stands twice in the file, this is the one fault that is reported, whatever its last value is.
    reported = {fault.path for fault in faults}
    for place, fault in placed_faults:
        if fault.path not in reported:
            faults.append(dataclasses.replace(fault, line=line_of(place)))
    if config is None or faults:
        raise ConfigError(sorted(faults, key=lambda fault: fault.line or 0), str(path))
    return config


def sections_of(path: pathlib.Path, overrides: Sequence[str]) -> tuple[ModelSection | None, DataSection | None]:
    """Return the sections model and data of a file with faults; None in place of a section that has faults itself."""

    def section(name: str, kind: type[pydantic.BaseModel]) -> Any:
        try:
            tree = apply_overrides(read_tree(path).value, overrides)
            return kind.model_validate_json(json.dumps(_plain(tree[name]), default=str), strict=True)
        except (PrivtrainError, ValueError, LookupError, RecursionError):  # the faults are reported already
            return None

    return section("model", ModelSection), section("data", DataSection)


def validate(tree: dict[str, Any], source: str = "") -> Config:
    """Return a tree (section → keys → values) as a configuration.

    Raises:
        ConfigError: with every fault; ``source`` names what the tree was read from.
    """
    config, faults = _validated(tree)
    if config is None:
        raise ConfigError([fault for _, fault in faults], source)
    return config


def read_tree(path: pathlib.Path) -> strict_yaml.Document:
    """Parse a YAML file of sections; what is ambiguous in it, such as a key that stands twice, is in ``faults``.

    Raises:
        ConfigError: if the file is missing, not YAML, or not a mapping.
    """
    if not path.is_file():
        problem = f"{path} is a directory; give the YAML file in it" if path.is_dir() else f"no such file: {path}"
        raise ConfigError([Fault("", problem)])
    content = reading.read_bytes(path, max_bytes=_MAX_BYTES, follow_links=True)
    try:
        document = strict_yaml.parse(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        kind = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"at byte {error.start}"
        raise ConfigError([Fault("", f"the file is not UTF-8 ({kind}); save it as UTF-8")], str(path)) from None
    except strict_yaml.YAML_FAULTS as error:
        raise ConfigError([Fault("", f"not a YAML file: {' '.join(str(error).split())}")], str(path)) from None
    if not isinstance(document.value, dict):
        raise ConfigError([Fault("", "the file must hold sections such as run, model, data, privacy")], str(path))
    return document


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``tree`` with ``a.b=value`` assignments applied, values read as YAML."""
    result = copy.deepcopy(tree)
    faults, given = [], set[str]()
    for override in overrides:
        key, separator, text = override.partition("=")
        if key in given:
            faults.append(Fault(key, "given twice; which one counts would be a matter of order"))
        given.add(key)
        if not separator or not all(key.split(".")):
            faults.append(Fault(override, "an override looks like section.key=value"))
            continue
        try:
            node, leaf = place_of(result, key)
        except ValueError as error:
            faults.append(Fault(key, str(error)))
            continue
        try:
            document = strict_yaml.parse(text)
        except strict_yaml.YAML_FAULTS:
            faults.append(Fault(key, f"given {text!r}, which is no YAML value"))
            continue
        faults += [Fault(".".join([key, *map(str, fault.path)]), fault.problem) for fault in document.faults]
        node[leaf] = document.value
    if faults:
        raise ConfigError(faults, "overrides")
    return result


def layered(*layers: Sequence[str]) -> list[str]:
    """Join several lists of ``key=value`` overrides; where lists give the same key, the later list's value stays."""
    merged: list[str] = []
    for layer in layers:
        keys = {_key_assigned(override) for override in layer}
        merged = [*(override for override in merged if _key_assigned(override) not in keys), *layer]
    return merged


def _key_assigned(override: str) -> str:
    """Return the dotted key of an override: of ``a.b=value`` ``a.b``."""
    key, _, _ = override.partition("=")
    return key


def to_yaml(tree: dict[str, Any]) -> str:
    """Return a configuration tree as YAML, in the order of the sections."""
    return strict_yaml.dump(tree)


def public_tree(config: Config) -> dict[str, Any]:
    """Return the configuration as it is published: every key, but no path of this machine; of files their names."""
    tree = config.model_dump(
        mode="json", exclude={"run": {"output_dir"}, "registry": {"url"}, "performance": {"index_dir"}, "release": True}
    )
    if config.model.name_or_path is not None:
        tree["model"]["name_or_path"] = config.model.public_name
    if config.data.chat_template_file is not None:
        tree["data"]["chat_template_file"] = config.data.chat_template_file.name
    if config.canaries.samples_file is not None:
        tree["canaries"]["samples_file"] = config.canaries.samples_file.name
    for source in (tree["data"]["source"], tree["data"]["evaluation"] or {}):
        if "paths" in source:
            source["paths"] = [pathlib.Path(path).name for path in source["paths"]]
    return tree


def _validated(tree: dict[str, Any]) -> tuple[Config | None, list[_PlacedFault]]:
    """Return the configuration, or None and each fault with its place.

    pydantic looks for conflicts between keys only where each key is valid by itself. To report conflicts together with
    other faults, the tree is validated a second time without the keys at fault. Of the conflicts found then, those that
    name such a key are left out: its missing value may be the only reason.
    """
    config, faults, conflicts = _try_validating(tree)
    keys_at_fault = [_key_of(place) for place, _ in faults if place]
    rest = copy.deepcopy(tree)
    if keys_at_fault and all(_mask(rest, place) for place, _ in faults):
        _, _, conflicts_of_rest = _try_validating(rest)
        for place, conflict in conflicts_of_rest:
            names_key_at_fault = any(key in conflict.problem for key in keys_at_fault)
            if (place, conflict) not in conflicts and not names_key_at_fault:
                conflicts.append((place, conflict))
    return config, faults + conflicts


def _key_of(place: strict_yaml.Path) -> str:
    """Return the dotted key of a place; of an item of a list, the list's: ("a", "b", 0) → ``a.b``."""
    return ".".join(itertools.takewhile(lambda part: not part.isdigit(), map(str, place)))


def _try_validating(tree: dict[str, Any]) -> tuple[Config | None, list[_PlacedFault], list[_PlacedFault]]:
    """Return the configuration; or None, faults of single keys, and conflicts between keys.

    Types are strict: a boolean or a text is no number.
    """
    try:
        # By way of JSON, since pydantic's strict mode accepts texts for paths and lists for pairs only there.
        return Config.model_validate_json(json.dumps(_plain(tree), default=str), strict=True), [], []
    except pydantic.ValidationError as error:
        items = error.errors(include_url=False)
    except (ValueError, RecursionError):  # a list that holds itself
        return None, [((), Fault("", "a section holds itself, or is nested too deeply"))], []
    if items[0]["type"] == "json_invalid":
        return None, [((), Fault("", "holds half of a surrogate pair, which no file can hold"))], []
    faults_by_place: dict[strict_yaml.Path, Fault] = {}
    conflicts: list[_PlacedFault] = []
    for item in items:
        place = _place(item, tree)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConflictError):
            conflicts += [(place, Fault(".".join(map(str, place)), problem)) for problem in cause.problems]
            continue
        earlier = faults_by_place.get(place)
        fault = _fault(item, place)
        if earlier is not None and fault.problem != earlier.problem:
            # A key that takes values of several types has an error for each; they become one: "should be A or B".
            type_name = item["msg"].removeprefix("Input should be ")
            fault = earlier
            if type_name not in earlier.problem:
                fault = dataclasses.replace(earlier, problem=f"{earlier.problem} or {type_name}")
        faults_by_place[place] = fault
    return None, list(faults_by_place.items()), conflicts


def _mask(tree: Any, place: strict_yaml.Path) -> bool:
    """Take the key at a place (of a list's item the whole list) out of a tree, or give it a valid stand-in.

    Return whether the tree can be validated now without the fault at this place.
    """
    node, path = tree, []
    for part in place:
        path.append(str(part))
        stand_in = _STAND_INS.get(".".join(path))
        if stand_in is not None:
            node[part] = stand_in
            return True
        is_last = len(path) == len(place)
        if part not in node:
            return is_last  # a required key that is missing: nothing to take out
        if is_last or not isinstance(node[part], dict):
            del node[part]
            return True
        node = node[part]
    return False


def _plain(node: Any) -> Any:
    """Return a tree in which whole floats, as YAML reads 3.0 and 1e3, are integers: they may stand for a count."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    # Beyond 2**53 doubles are no longer exact, so such a number was hardly meant as a count.
    is_whole = isinstance(node, float) and node.is_integer() and abs(node) < 2**53
    return int(node) if is_whole else node


def _place(item: Any, tree: Any) -> strict_yaml.Path:
    """Return the place of one of pydantic's errors in the tree.

    pydantic's location has further parts: where a value may be of several types, the name of the type, as in
    ("data", "source", "files", "paths"). These are in no tree, so they are left out.
    """
    *parents, last = item["loc"] or ("",)
    node, place = tree, []
    for part in item["loc"]:
        is_key = isinstance(node, Mapping) and part in node
        is_index = isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)
        if is_key or is_index:
            node = node[part]
            place.append(part)
    # A missing key, or item of a pair, is not in the tree either, but belongs to its place. It may have the name of a
    # section above it, so the length tells, too.
    ends_with_it = len(place) > len(parents) and place[-1] == last
    if item["type"] == "missing" and not ends_with_it:
        place.append(last)
    return tuple(place)


def _fault(item: Any, place: strict_yaml.Path) -> Fault:
    """Return one of pydantic's errors (an item of ``ValidationError.errors()``) as a fault, in our words."""
    location = [str(part) for part in place]
    path = ".".join(location)
    if item["type"] == "extra_forbidden":
        *section, name = location
        similar = difflib.get_close_matches(name, sorted(_keys_beside(section)), n=1)
        # A misspelt key of this section; else the same key in other sections.
        meant = [".".join([*section, key]) for key in similar] or _homes(name, Config)
        hint = f"; did you mean {' or '.join(meant[:3])}?" if meant else ""
        return Fault(path, f"unknown key{hint}")
    if item["type"] == "missing" and isinstance(place[-1], int):
        return Fault(path, "the list is too short: this item, counted from 0, is required")
    if item["type"] == "missing":
        return Fault(path, "this key is required")
    message, given = item["msg"].removeprefix("Value error, "), item["input"]
    if item["type"] == "value_error":
        return Fault(path, message)
    if item["type"] == "union_tag_not_found":
        return Fault(f"{path}.kind", "this key is required")
    if item["type"] == "union_tag_invalid":
        context = item["ctx"]
        return Fault(f"{path}.kind", f"given {context['tag']!r}; allowed are {context['expected_tags']}")
    if item["type"] == "list_type" or item["msg"] == "Input should be an object":
        needed = f"a list, e.g. [{_shown(given)}]" if item["type"] == "list_type" else "a section of keys"
        return Fault(path, f"given {given!r}; input should be {needed}")
    hint = ""
    if isinstance(given, bool) and item["type"] != "bool_type":
        hint = " (YAML reads yes, no, on and off as true and false; put quotes around a text)"
    elif isinstance(given, str) and item["type"] in ("int_type", "float_type", "bool_type"):
        hint = " (without quotes)" if _is_number(given) else ""
    return Fault(path, f"given {given!r}; {message[0].lower()}{message[1:]}{hint}")


def _shown(given: Any) -> str:
    """Return a plain value as an example of a list's item; dots for any other."""
    return str(given) if isinstance(given, str | int) and str(given) else "..."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _homes(name: str, section: type[pydantic.BaseModel], above: str = "") -> list[str]:
    """Return the dotted keys with this last name, in the section and those below it."""
    homes = []
    for key, field in section.model_fields.items():
        path = f"{above}{key}"
        if key == name:
            homes.append(path)
        for below in _models(field.annotation):
            homes += _homes(name, below, f"{path}.")
    return list(dict.fromkeys(homes))


def _keys_beside(location: Sequence[str]) -> set[str]:
    """Return the keys that are allowed in the section at ``location``, of whichever kind the section is."""
    sections: list[type[pydantic.BaseModel]] = [Config]
    for key in location:
        fields = [section.model_fields[key] for section in sections if key in section.model_fields]
        sections = []  # that a value of the key may be
        for field in fields:
            sections += _models(field.annotation)
    return set().union(*(section.model_fields for section in sections))


def _models(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    """Yield the sections in a type annotation: of ``FilesSource | HubSource | None`` both classes."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)
