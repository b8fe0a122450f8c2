"""What an export says of itself, export.json: the released weights it was made from, and how."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from privtrain.errors import VerificationFailed
from privtrain.files import strict_json
from privtrain.run import bundle

SCHEMA = "privtrain/export/1"
NAME = "export.json"
DTYPES = ("fp32", "bf16", "fp16")


def rendered(content: Mapping[str, Any]) -> str:
    """Return the one form in which it is written."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def weights_of(files: Mapping[str, str]) -> dict[str, str]:
    """Of released files, those that the weights are read from: path → SHA-256."""
    endings = (".safetensors", ".bin", "/config.json", "adapter_config.json", ".index.json")
    return {path: digest for path, digest in files.items() if path.endswith(endings)}


def read_description(directory: pathlib.Path) -> dict[str, Any]:
    """Return what ``export.json`` says.

    Raises:
        VerificationFailed: if it is missing, or not in the one form in which it is written.
    """
    try:
        text = bundle.text_of(directory / NAME)
        content = strict_json.loads(text)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"it is not of schema {SCHEMA!r}")
        names = {"schema", "release", "released", "base_model", "merged", "dtype", "files", "relation"}
        if set(content) != names or content["dtype"] not in DTYPES or rendered(content) != text:
            raise ValueError("it is not in the form in which it is written")
        if content["relation"] != bundle.digest_of({name: content[name] for name in content if name != "relation"}):
            raise ValueError("relation is not the digest of the rest")
        bundle.check_digests("files", content["files"])
    except FileNotFoundError:
        raise VerificationFailed([f"{NAME} is missing"], directory) from None
    except (OSError, ValueError) as error:
        raise VerificationFailed([f"{NAME} cannot be used: {error}"], directory) from None
    return content
