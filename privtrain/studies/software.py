"""Which code and libraries a study's jobs ran with, so that a report can say whether they all had the same."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import privtrain

_ROOT = pathlib.Path(privtrain.__file__).parents[1]
_PACKAGES = ("accountants", "attacks", "privtrain")
_LIBRARIES = ("numpy", "peft", "scipy", "tokenizers", "torch", "transformers")


@functools.cache
def software() -> dict[str, Any]:
    """Return privtrain's version, commit and a digest of its code, and versions of Python and libraries.

    The commit is ``None`` for an installed package; ``-modified`` follows it where tracked files differ from it.
    """
    return {
        "privtrain": privtrain.__version__,
        "commit": _commit(),
        "code_sha256": _code_digest(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def words(facts: dict[str, Any]) -> str:
    """Return a job's software in one line."""
    shown = {name: value for name, value in facts.items() if name not in ("commit", "code_sha256")}
    versions = ", ".join(f"{name} {value}" for name, value in shown.items())
    return f"{versions}; commit {facts['commit'] or 'unknown'}, code {facts['code_sha256'][:12]}"


def _commit() -> str | None:
    """Return the commit that is checked out, marked if tracked files differ; ``None`` for an installed package."""
    if not (_ROOT / ".git").exists():
        return None
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    return f"{head}-modified" if _git("status", "--porcelain", "--untracked-files=no") else head


def _git(*arguments: str) -> str | None:
    """Return what git prints; ``None`` if it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _code_digest() -> str:
    """Return SHA-256 over name and content of all Python files."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((_ROOT / package).rglob("*.py")):
            digest.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
