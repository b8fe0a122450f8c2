"""Chinese poems of the Tang and Song dynasties as user-level data: each poet is a user, each poem a record.

Read in place from the installed npm package ``chinese-poetry`` 2.0.1 (MIT; the poems are in the public domain). Two
poets of one name are one user, which protects both. Anonymous poems have no user.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

from privtrain.errors import ConfigError, Fault

PACKAGE = "chinese-poetry"
VERSION = "2.0.1"

#: Where npm puts packages that are for all, after those of the working directory and of ``NODE_PATH``.
_GLOBAL = (pathlib.Path("/usr/local/lib/node_modules"), pathlib.Path("/usr/lib/node_modules"))
#: "No name", "lost name", "not known": what stands where a poet would.
_NOBODY = {"無名氏", "佚名", "不詳"}
_NUMBER = re.compile(r"\d+")


def poem_files(directories: Sequence[pathlib.Path] | None = None) -> list[pathlib.Path]:
    """Return the poems' JSON files inside the installed package, in the order of their numbers.

    Args:
        directories: ``node_modules`` directories to look in; default: the working directory's, those of the environment
            variable ``NODE_PATH``, and npm's global ones.

    Raises:
        ConfigError: if the package is in none of them, or is of another version.
    """
    if directories is None:
        named = [pathlib.Path(p) for p in os.environ.get("NODE_PATH", "").split(os.pathsep) if p]
        directories = [pathlib.Path("node_modules"), *named, *_GLOBAL]
    package = next((d / PACKAGE for d in directories if (d / PACKAGE / "package.json").is_file()), None)
    if package is None:
        problem = (
            f"'poems' needs the npm package {PACKAGE}: npm install {PACKAGE}@{VERSION}; looked in "
            f"{', '.join(map(str, directories))} (NODE_PATH names further directories)"
        )
        raise ConfigError([Fault("data.source.kind", problem)])
    version = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    if version != VERSION:
        problem = f"'poems' reads {PACKAGE} {VERSION}; {package} is {version}: npm install {PACKAGE}@{VERSION}"
        raise ConfigError([Fault("data.source.kind", problem)])
    return sorted((package / "dist" / "quantangshi").glob("poet.*.json"), key=_dynasty_and_number)


def _dynasty_and_number(file: pathlib.Path) -> tuple[str, int]:
    """Return what files are ordered by: of ``poet.song.12000.json`` it is ("song", 12000)."""
    _, dynasty, *_ = file.name.split(".")
    return dynasty, int(_NUMBER.findall(file.name)[0])


def read_poems(directories: Sequence[pathlib.Path] | None = None) -> Iterator[tuple[str, str]]:
    """Yield (user, text): the poet, and a poem's title and lines; the user is empty where the poet is not known."""
    for path in poem_files(directories):
        for poem in json.loads(path.read_text(encoding="utf-8")):
            poet = poem["author"].strip()
            user = "" if poet in _NOBODY else poet
            yield user, "\n".join([poem["title"], *poem["paragraphs"]]).strip()
