"""YAML that has one meaning: what YAML 1.1 reads in silence as something else than people wrote is a fault.

A key that stands twice (the last would win), ``.inf`` and ``.nan``, ``010`` (which is 8) and ``1:30`` (which is 90) are
faults, each with its line. Faults name keys and lines, and values only where the file is a configuration; all come at
once. Anchors and ``<<`` merges are read as YAML means them: a key beside a merge replaces the merged one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import yaml

#: What PyYAML's safe constructors raise on hostile scalars and keys: the file is no YAML at all.
YAML_FAULTS = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
)

_INT, _FLOAT, _TEXT, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "str", "merge"))
#: 1e-5 and 1E6, which YAML 1.1 reads as text for want of a dot or a sign.
_EXPONENT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_MOST_DIGITS = 300

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class StrictFault:
    """One value or key that has no single meaning.

    Attributes:
        path: keys and list positions that lead to it.
        line: its line in the file, from 1.
        problem: what is wrong, without the value.
    """

    path: Path
    line: int
    problem: str

    @property
    def key(self) -> str:
        """The dotted path."""
        return ".".join(map(str, self.path))


@dataclasses.dataclass(frozen=True)
class Document:
    """A YAML document as Python values.

    Attributes:
        value: dictionaries, lists and scalars; ``None`` for an empty document.
        faults: what has no single meaning, in order of lines.
        lines: path → line of each key or item; a node that an alias repeats stands at its first place.
    """

    value: Any
    faults: tuple[StrictFault, ...]
    lines: dict[Path, int]

    def line_of(self, path: Path) -> int | None:
        """Return the line of a key or item, else of the nearest section above it; None if nothing above is known."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


def parse(text: str) -> Document:
    """Read one YAML document; keys and values without a single meaning are listed in its ``faults``, not raised.

    Raises:
        yaml.YAMLError: or another of :data:`YAML_FAULTS`, if the text is no YAML at all.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document(None, (), {})
        survey = _Survey(loader)
        survey.visit(node, ())
        # A document with faults is still read, so that its other faults come in the same round.
        value = loader.construct_document(node)
        return Document(value, tuple(sorted(survey.faults, key=lambda fault: fault.line)), survey.lines)
    finally:
        loader.dispose()


def dump(value: Any, *, short: bool = False) -> str:
    """Return YAML that :func:`parse` reads as ``value``, keys in order; ``short`` puts plain lists on one line."""
    if short:
        return yaml.dump(
            value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=1 << 20, allow_unicode=True
        )
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, in which ``1e-5`` is a number as in YAML 1.2 and in every other language."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that the loader would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, re.compile(rf"^(?:{_EXPONENT.pattern})$"), list("-+0123456789."))


class _Survey:
    """Walks the parsed nodes and notes lines and faults, before they become values: a dictionary has no key twice.

    Attributes:
        faults: what has no single meaning.
        lines: path → line of each key or item.
    """

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._seen: set[int] = set()
        self.faults: list[StrictFault] = []
        self.lines: dict[Path, int] = {}

    def visit(self, node: yaml.Node, path: Path) -> None:
        """Note the lines and faults of a node and of all below it."""
        if id(node) in self._seen:  # an alias; also what keeps one that holds itself from going on for ever
            return
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines[*path, index] = item.start_mark.line + 1
                self.visit(item, (*path, index))
        elif isinstance(node, yaml.ScalarNode):
            self._visit_scalar(node, path)

    def _visit_mapping(self, node: yaml.MappingNode, path: Path) -> None:
        """Note the line of each key and the keys that stand twice, and visit the values."""
        first_lines: dict[object, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _MERGE:  # "<<": its value is a mapping whose keys count as this one's
                self.visit(value_node, path)
                continue
            if key_node.tag == _FLOAT and _EXPONENT.fullmatch(key_node.value):
                key_node.tag = _TEXT  # a key such as 1e5 is a name, as in YAML 1.1; only values are numbers
            key = self._loader.construct_object(key_node, deep=True)
            is_number = isinstance(key, int) and not isinstance(key, bool)
            key_path = (*path, key if is_number else str(key))
            if key in first_lines:
                self._add(key_path, line, f"this key stands twice, in lines {first_lines[key]} and {line}; keep one")
            else:
                first_lines[key] = line
                self.lines.setdefault(key_path, line)
            self.visit(value_node, key_path)

    def _visit_scalar(self, node: yaml.ScalarNode, path: Path) -> None:
        """Note a number that YAML 1.1 reads as something else than it looks like, or that is not finite."""
        line, text = node.start_mark.line + 1, node.value
        if node.tag == _INT and len(text) > _MOST_DIGITS:
            self._add(path, line, "a whole number beyond the range of a double")
            node.value = "0"  # PyYAML refuses to read thousands of digits
        elif node.tag in (_INT, _FLOAT) and ":" in text:
            self._add(path, line, f"YAML reads {text} as minutes and seconds; write the number, or quotes")
        elif node.tag == _INT and _OCTAL.fullmatch(text):
            self._add(path, line, f"YAML reads {text} as an octal number; write {text.lstrip('+-0') or 0}, or quotes")
        elif node.tag == _FLOAT and not math.isfinite(self._loader.construct_yaml_float(node)):
            self._add(path, line, f"given {text}; must be a finite number")

    def _add(self, path: Path, line: int, problem: str) -> None:
        self.faults.append(StrictFault(path, line, problem))
