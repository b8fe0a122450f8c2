"""Dotted keys: where ``a.b.c`` stands in a tree of sections, for command line, Python, studies and translations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from privtrain.errors import ConfigError, Fault


def place_of(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the section that a key stands in, and its last name; sections that are missing or empty are made.

    Raises:
        ValueError: if a name is empty, or one on the way is no section.
    """
    *parents, leaf = key.split(".")
    if not all([*parents, leaf]):
        raise ValueError("a key looks like section.key, and none of its names is empty")
    node = tree
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            raise ValueError(f"{part!r} is not a section")
        node = node[part]
    return node, leaf


def assigned(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a tree with dotted keys set.

    Raises:
        ConfigError: with every key that has no place.
    """
    result, faults = copy.deepcopy(dict(tree)), []
    for key, value in values.items():
        try:
            node, leaf = place_of(result, key)
        except ValueError as error:
            faults.append(Fault(key, str(error)))
            continue
        node[leaf] = copy.deepcopy(value)
    if faults:
        raise ConfigError(faults, "settings")
    return result
