"""Debian's ``fortunes`` as user-level data: whom a saying is attributed to is its user, a saying is a record.

Read in place from the installed packages ``fortunes`` and ``fortunes-min`` (1:1.99.1-7.3). A saying has a user if it
ends with its one attribution (``-- Mark Twain, "..."``), which is cut off: a record must not name its user. Two
spellings of one name are two users, and a work or a proverb may stand where a person would.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

from privtrain.errors import ConfigError, Fault

PACKAGES = ("fortunes-min", "fortunes")

_FILES = "/usr/share/games/fortunes/"
#: Sayings of a file are separated by lines of "%".
_SEPARATOR = re.compile(r"^%[ \t]*$\n?", re.MULTILINE)
_ATTRIBUTION = re.compile(r"^\s+--+\s*(?=[^\s-])")
#: Where a name ends and the work, the year or the occasion begins.
_AFTER_NAME = re.compile(r"[,;:(\[\"<]|\s+(?:in|on)\s")
_NOBODY = {"anon", "anonymous", "author unknown", "seen", "unknown"}
#: A letter, a backspace and an accent print an accented letter.
_OVERSTRUCK = re.compile(r"(.)\x08(.)", re.DOTALL)


def fortune_files(root: pathlib.Path = pathlib.Path("/")) -> list[pathlib.Path]:
    """Return the sayings' files of the installed packages, as dpkg lists them.

    Args:
        root: root of the file system that the packages are installed in.

    Raises:
        ConfigError: if a package is not installed.
    """
    lists = [root / "var/lib/dpkg/info" / f"{package}.list" for package in PACKAGES]
    missing = [package for package, path in zip(PACKAGES, lists, strict=True) if not path.is_file()]
    if missing:
        problem = f"'fortunes' needs the Debian packages {' and '.join(missing)}: apt-get install fortunes"
        raise ConfigError([Fault("data.source.kind", problem)])
    installed: list[str] = []
    for path in lists:
        installed += path.read_text(encoding="utf-8").splitlines()
    # Beside each file of sayings lies an index of it, whose name has an ending.
    sayings = [name for name in sorted(installed) if name.startswith(_FILES) and "." not in name]
    files = [root / name.lstrip("/") for name in sayings]
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        problem = f"files of the Debian packages fortunes are gone: {', '.join(absent)}; reinstall them"
        raise ConfigError([Fault("data.source.kind", problem)])
    return files


def read_fortunes(root: pathlib.Path = pathlib.Path("/")) -> Iterator[tuple[str, str]]:
    """Yield (user, text): ``Mark Twain`` and one saying; the user is empty where nobody, or several, can be named."""
    for path in fortune_files(root):
        yield from parse_fortunes(path.read_text(encoding="utf-8"))


def parse_fortunes(text: str) -> Iterator[tuple[str, str]]:
    """Yield (user, saying) in the order of a file; the user is empty where nobody, or several, can be named."""
    for saying in _SEPARATOR.split(text):
        lines = _OVERSTRUCK.sub(_letter, saying).rstrip().splitlines()
        attributions = [number for number, line in enumerate(lines) if _ATTRIBUTION.match(line)]
        if len(attributions) == 1:
            (start,) = attributions
            # An attribution may go on over further indented lines, but must end the saying.
            ends_saying = all(line[:1].isspace() for line in lines[start + 1 :])
            if ends_saying:
                yield _author(" ".join(line.strip() for line in lines[start:])), "\n".join(lines[:start]).strip()
                continue
        if lines:
            yield "", "\n".join(lines).strip()


def _author(attribution: str) -> str:
    """Return the name in an attribution: ``-- Mark Twain, "Roughing It"`` → ``Mark Twain``; empty for nobody."""
    name = _AFTER_NAME.split(attribution.lstrip("- "), maxsplit=1)[0]
    name = " ".join(name.split()).rstrip(". ")
    return "" if name.lower() in _NOBODY else name


def _letter(pair: re.Match[str]) -> str:
    """Return the letter of two characters that are printed over each other; the other is an accent or underlines it."""
    first, second = pair.groups()
    return first if first.isalnum() and not second.isalnum() else second
