"""The license that a card names: what the configuration says, or the base model's own card. It is never guessed."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from privtrain.config import Config
from privtrain.files import strict_yaml
from privtrain.run.base_model import directory_of

#: How hub pages name a license, e.g. apache-2.0, llama3.2, other.
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NAME = re.compile(r"[\w.+-]{1,96}")
_LINK = re.compile(r"[\x21-\x7e]{1,300}")
_MOST_CHARACTERS = 1 << 20


def license_metadata(config: Config) -> dict[str, Any]:
    """Return ``license`` (and ``license_name``, ``license_link`` of ``other``) for a card's front matter.

    Empty if neither ``release.license`` nor a README.md beside the base model's weights says one.
    """
    if config.release.license is not None:
        return {"license": config.release.license}
    directory = directory_of(config.model)
    return {} if directory is None else license_in(directory / "README.md")


def license_in(card: pathlib.Path) -> dict[str, Any]:
    """Return ``license``, and of license ``other`` its name and link, from a model card's YAML front matter.

    Empty if the card is missing or cannot be read, or if what it says is not of the form that hub pages use.
    """
    try:
        with card.open(encoding="utf-8-sig") as file:
            text = file.read(_MOST_CHARACTERS)
    except (OSError, UnicodeDecodeError):
        return {}
    opening, _, rest = text.partition("\n")
    if opening.strip() != "---":
        return {}
    # The front matter stands between two lines of "---".
    front, end, _ = re.sub("\r\n?", "\n", rest).partition("\n---")
    if not end:
        return {}
    try:
        document = strict_yaml.parse(front)
    except strict_yaml.YAML_FAULTS:
        return {}
    value = document.value
    if document.faults or not isinstance(value, dict) or not _holds(IDENTIFIER, value.get("license")):
        return {}
    license = {"license": value["license"]}
    if license["license"] == "other":
        patterns = {"license_name": _NAME, "license_link": _LINK}
        license |= {key: value[key] for key, pattern in patterns.items() if _holds(pattern, value.get(key))}
    return license


def _holds(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
