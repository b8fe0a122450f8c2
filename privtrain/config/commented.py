"""A configuration file for people: every key of the schema with its meaning, those not given as comments.

For example::

    data:
      # Guessed: 40 ids in the first 100 rows
      # Column that holds the user id of a row.
      user_column: author
      # max_length: 256  # Tokens kept of a record; longer ones are truncated and counted.
"""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
from pydantic_core import PydanticUndefined

from privtrain.config.reference import plain_text
from privtrain.config.schema import Config
from privtrain.files import strict_yaml

#: Characters of a line of a comment, and of a line that holds a key with its default.
_WIDTH = 100
_MOST = 120


def commented_yaml(tree: Mapping[str, Any], head: str, notes: Mapping[str, str] | None = None) -> str:
    """Return YAML that :func:`~privtrain.config.load_config` reads as ``tree``.

    Args:
        tree: sections and their keys.
        head: what the file begins with, as a comment.
        notes: dotted key → what to know of the value that stands there, or of a value that is missing.
    """
    notes = notes or {}
    unknown = [key for key in notes if key.partition(".")[0] not in Config.model_fields]
    assert not unknown, unknown
    parts = [_comment(head, "")]
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, pydantic.BaseModel)
        given = tree.get(name, {})
        title = f"{name}:" if given else f"# {name}:"
        lines = [_comment(plain_text(section.__doc__ or ""), "").rstrip(), title]
        lines += _keys(section, given, name, notes)
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _keys(
    section: type[pydantic.BaseModel], given: Mapping[str, Any], name: str, notes: Mapping[str, str]
) -> Iterator[str]:
    """Yield the lines of each key of a section: with its value if given, else as a comment with its default.

    Args:
        section: the section's class.
        given: its keys with their values.
        name: name of the section.
        notes: dotted key → what to know of it, for all sections.
    """
    for key, field in section.model_fields.items():
        note, description = notes.get(f"{name}.{key}", ""), field.description or ""
        if key in given:
            yield _comment(note, "  ", description).rstrip()
            yield textwrap.indent(_value(key, given[key]), "  ")
            continue
        default = field.get_default(call_default_factory=True)
        text = _value(key, None if default is PydanticUndefined else _plain(default))
        if note:
            yield _comment(note, "  ", description).rstrip()
            yield "\n".join(f"  # {line}" for line in text.splitlines())
        else:
            yield _shortened(f"  # {text}  # {description}")


def _shortened(line: str) -> str:
    """Return a line, cut between words if it is too long."""
    if len(line) <= _MOST:
        return line
    return line[: line.rindex(" ", 0, _MOST - 4)] + " ..."


def _plain(value: Any) -> Any:
    """Return a default of the schema as YAML can hold it: sections as mappings, tuples as lists, paths as texts."""
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, pathlib.PurePath) else value


def _value(key: str, value: Any) -> str:
    """Return ``key: value`` as YAML, in several lines if the value is a nested one."""
    if value is None:
        return f"{key}:"
    text = strict_yaml.dump({key: value}, short=True).rstrip()
    # A plain value comes as {key: value}; take off the braces.
    return text[1:-1] if text.startswith("{") else text


def _comment(text: str, indent: str, further: str = "") -> str:
    """Return two texts, one under the other, as lines of a YAML comment, wrapped and indented; either may be empty."""
    lines: list[str] = []
    for part in (text.strip(), further.strip()):
        for line in part.splitlines():
            lines += textwrap.wrap(line, _WIDTH) or [""]  # an empty line stays one
    return "".join(f"{indent}# {line}".rstrip() + "\n" for line in lines)
