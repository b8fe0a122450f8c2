"""Render the reference of every configuration key, in Markdown, from the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pydantic

_INTRODUCTION = """\
# Configuration reference

One YAML file configures a run. Any key can be overridden: `privtrain plan my.yaml privacy.target_epsilon=4`. Unknown
keys are errors with a suggestion, and all faults are reported at once.

`privtrain schema` prints the JSON schema. This page is `privtrain schema --markdown`, and a test compares them.
"""
#: Limits of JSON schema → their words in the table.
_LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "pattern": "pattern `{}`",
}


def markdown_reference(model: type[pydantic.BaseModel]) -> str:
    """Return a Markdown page with a table for each section: key, type and limits, default, description."""
    schema = model.model_json_schema()
    parts = [_INTRODUCTION]
    for path, section in _sections(schema, schema["$defs"], ""):
        parts.append(f"## {path}\n\n{plain_text(section.get('description', ''))}\n\n{_table(section, schema['$defs'])}")
    return "\n".join(parts)


def _sections(node: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (title, schema) of every section below a node, in the order of the schema.

    The title is the dotted key; a key that holds one of several kinds of section has an entry for each.

    Args:
        node: JSON schema of a section, or of the whole configuration.
        definitions: name → schema that ``$ref`` refers to.
        path: dotted path of the node, ending in a dot; empty for the whole.
    """
    for key, spec in node.get("properties", {}).items():
        children = _children(spec, definitions)
        for child in children:
            name = f"{path}{key}"
            title = name if len(children) == 1 else f"{name}, kind: {child['properties']['kind']['const']}"
            yield title, child
            yield from _sections(child, definitions, f"{name}.")


def _children(spec: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas of the sections that a key may hold; none if it holds a plain value.

    ``spec`` is the key's JSON schema, which refers to sections by ``$ref``.
    """
    choices = [spec, *spec.get("allOf", []), *spec.get("anyOf", []), *spec.get("oneOf", [])]
    references = [choice["$ref"] for choice in choices if "$ref" in choice]
    return [definitions[reference.removeprefix("#/$defs/")] for reference in references]


def _table(section: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the Markdown table of the keys in ``section``, a JSON schema that refers to ``definitions``."""
    rows = ["| key | type, limits | default | meaning |", "|---|---|---|---|"]
    for key, spec in section.get("properties", {}).items():
        is_section = bool(_children(spec, definitions))
        kind = "section" if is_section else _kind(spec)
        meaning = _code(spec.get("description", ""))
        cells = (f"`{key}`", kind, _default(key, spec, section, is_section), meaning)
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _kind(spec: dict[str, Any]) -> str:
    """Return the type of a value and its limits in words, from its JSON schema: "integer, ≥ 1"."""
    if "anyOf" in spec:
        return " or ".join(_kind(choice) for choice in spec["anyOf"] if choice.get("type") != "null")
    if "enum" in spec or "const" in spec:
        return ", ".join(f"`{value}`" for value in spec.get("enum", [spec.get("const")]))
    if spec.get("type") == "array":
        if "prefixItems" in spec:
            return "[" + ", ".join(_kind(item) for item in spec["prefixItems"]) + "]"
        least = f"at least {spec['minItems']} of " if "minItems" in spec else ""
        return f"list: {least}{_kind(spec['items'])}"
    name = "path" if spec.get("format") == "path" else spec.get("type", "any")
    limits = [words.format(_number(spec[key])) for key, words in _LIMITS.items() if key in spec]
    return ", ".join([name, *limits])


def _number(value: Any) -> str:
    return f"{value:,.10g}" if isinstance(value, int | float) else str(value)


def _default(key: str, spec: dict[str, Any], section: dict[str, Any], is_section: bool) -> str:
    """Return the cell of a key's default; empty for a section, whose own table says it."""
    if key in section.get("required", []):
        return "required"
    if "default" not in spec:
        return ""
    value = spec["default"]
    if value is None:
        return "none"
    if is_section:
        return ""
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def plain_text(docstring: str) -> str:
    """Return the first paragraph of a docstring on one line."""
    first_paragraph, _, _ = docstring.partition("\n\n")
    return _code(" ".join(first_paragraph.split()))


def _code(text: str) -> str:
    """Turn reStructuredText literals and roles of a docstring into Markdown code."""
    return text.replace("``", "`").replace(":mod:", "").replace(":class:", "")
