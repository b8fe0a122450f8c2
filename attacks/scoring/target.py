"""What exactly is attacked: digests of everything that a score depends on beside documents and settings.

Scores of another adapter, another base or another tokenizer look like any scores. So the files are hashed before a
token is scored, compared with what the run released, written into every part, and hashed again before the signals are
sealed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypedDict

from attacks.errors import AttackInputError
from privtrain.config.model import ModelSection
from privtrain.files.reading import file_sha256
from privtrain.run import base_model, bundle
from privtrain.run.directory import RunDirectory


class TargetDigests(TypedDict):
    """SHA-256 digests of what a scoring was made of.

    Attributes:
        statement: of ``privacy.json``.
        released: file name to digest, of the released adapter or model.
        base: file name to digest, of the base model's weights, configuration and tokenizer.
    """

    statement: str
    released: dict[str, str]
    base: dict[str, str]


def digests_of(run: RunDirectory, model: ModelSection) -> TargetDigests:
    """Return the digests of a run's target: public, since they are of public files.

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
    """Return file to SHA-256 of a base model's weights, configuration and tokenizer.

    Raises:
        AttackInputError: if it cannot be read.
        ConfigError: if it is not there.
    """
    try:
        digests = base_model.base_digests(model)
        if not digests:  # named on a hub and not here yet: loading it brings its files
            from privtrain.models.load import load_base

            load_base(model)
            digests = base_model.base_digests(model)
    except OSError as error:
        raise AttackInputError(f"the base model {model.public_name} cannot be read: {error.strerror}") from None
    if not digests:
        raise AttackInputError(f"no file of the base model {model.public_name} was found; put it on this machine")
    return digests


def digest_of(digests: Mapping[str, Any]) -> str:
    """Return one SHA-256 over a mapping of digests."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of what differs between two mappings such as ``TargetDigests``, or is in one of them alone.

    A file is named with its group, such as ``"base: config.json"``.
    """
    names = []
    for group in sorted({*one, *other}):
        ours, theirs = one.get(group), other.get(group)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            names += [f"{group}: {name}" for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        elif ours != theirs:
            names.append(group)
    return names


def released_digests(run: RunDirectory) -> dict[str, str]:
    """Return file name to SHA-256 of the released adapter or model; files that no library loads are left out.

    Raises:
        AttackInputError: if nothing is there.
    """
    directory = run.released
    digests = {
        name: file_sha256(directory / name) for name in bundle.files_under(directory) if not bundle.is_harmless(name)
    }
    if not digests:
        raise AttackInputError(f"{directory} is missing or empty; restore what the run released")
    return digests
