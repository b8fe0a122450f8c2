"""What exactly is attacked: digests of everything that a score depends on beside documents and settings.

Scores of another adapter, another base or another tokenizer look like any scores. So the files are hashed before a
token is scored, compared with what the run released, written into every part, and hashed again before the signals are
sealed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from attacks.errors import AttackInputError
from privtrain.config.schema import ModelSection
from privtrain.model_files import locate
from privtrain.rundir import RunDirectory
from privtrain.sealing import file_sha256

_BASE_PATTERNS = (
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "*.index.json",
    "config.json",
    "*.py",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
)
"""Files of a base model's directory that change what it or its tokenizer says."""


def digests_of(run: RunDirectory, model: ModelSection) -> dict[str, Any]:
    """Digests of a run's target: public, since they are of public files.

    Args:
        run: a finished run.
        model: its base model.

    Returns:
        ``statement``, of ``privacy.json``; ``released``, file to digest of what the run released; ``base``, the same of
        the base model and the tokenizer.

    Raises:
        DamagedFile: if a file of them is missing, a link or cannot be read.
        ConfigError: if the base model is not there.
    """
    return {
        "statement": file_sha256(run.privacy),
        "released": released_digests(run),
        "base": base_digests(model),
    }


def base_digests(model: ModelSection) -> dict[str, str]:
    """File to SHA-256 of a base model's weights, configuration and tokenizer.

    Raises:
        AttackInputError: if none of its files are found.
    """
    directory = _base_directory(model)
    found = {
        path.name: file_sha256(path, follow_links=True)  # the hub's cache is made of links
        for path in sorted(directory.iterdir())
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _BASE_PATTERNS)
    }
    if not found:
        raise AttackInputError(f"{directory} holds no file of a model; expected the base model of the run")
    return found


def digest_of(digests: Mapping[str, Any]) -> str:
    """One digest over all of them."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of what differs between two targets, or is in one of them alone."""
    found = []
    for group in sorted({*one, *other}):
        ours, theirs = one.get(group), other.get(group)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += [f"{group}: {name}" for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        elif ours != theirs:
            found.append(group)
    return found


def released_digests(run: RunDirectory) -> dict[str, str]:
    """File to SHA-256 of everything that a run released; no link among it is followed."""
    directory = run.released
    found = {
        path.relative_to(directory).as_posix(): file_sha256(path)
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }
    if not found:
        raise AttackInputError(f"{directory} is missing or empty; restore what the run released")
    return found


def _base_directory(model: ModelSection) -> pathlib.Path:
    location = locate(model)
    directory = pathlib.Path(location.path)
    if directory.is_dir():
        return directory
    from transformers.utils.hub import cached_file

    name = model.gguf_file or "config.json"
    found = cached_file(location.path, name, revision=location.arguments.get("revision"))
    if found is None:
        raise AttackInputError(f"{location.path} has no {name}; expected the base model of the run")
    return pathlib.Path(found).parent
