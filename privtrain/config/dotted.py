"""Dotted keys: where ``a.b.c`` stands in a tree of sections, for command line, Python, studies and translations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from privtrain.errors import ConfigError, Fault


def place_of(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return where a dotted key stands in a tree: of ``a.b.c`` the section ``tree["a"]["b"]``, and ``"c"``.

    Sections that are missing or empty are made in the tree.

    Raises:
        ValueError: if a name is empty, or one of ``a`` and ``b`` holds something else than a section.
    """
    *parents, leaf = key.split(".")
    if not all([*parents, leaf]):
        raise ValueError("a key looks like section.key, and none of its names is empty")
    section = tree
    for name in parents:
        if section.get(name) is None:
            section[name] = {}
        if not isinstance(section[name], dict):
            raise ValueError(f"{name!r} is not a section")
        section = section[name]
    return section, leaf


def assigned(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a tree with dotted keys set, e.g. ``{"privacy.num_steps": 500}``.

    Raises:
        ConfigError: with every key that cannot stand in the tree.
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
