"""What an export says of itself, export.json: the released weights it was made from, and how."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
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
    """Return path → SHA-256 of those released files that the weights are read from."""
    endings = (".safetensors", ".bin", "/config.json", "adapter_config.json", ".index.json")
    return {path: digest for path, digest in files.items() if path.endswith(endings)}


def read_description(directory: pathlib.Path) -> dict[str, Any]:
    """Return what ``export.json`` says.

    Raises:
        VerificationFailed: if it is missing, or not in the one form in which it is written.
    """
    keys = ("schema", "release", "released", "base_model", "merged", "dtype", "files", "relation")
    content = read_bound(directory, NAME, SCHEMA, keys)
    if content["dtype"] not in DTYPES:
        raise VerificationFailed([f"{NAME} cannot be used: dtype is {content['dtype']!r}"], directory)
    return content


def read_bound(directory: pathlib.Path, name: str, schema: str, keys: Iterable[str]) -> dict[str, Any]:
    """Return a description that holds these keys, ``files`` by digest, and as ``relation`` the digest of the rest.

    Raises:
        VerificationFailed: if it is missing, or not in the one form in which it is written.
    """
    try:
        text = bundle.text_of(directory / name)
        content = strict_json.loads(text)
        if not isinstance(content, dict) or content.get("schema") != schema:
            raise ValueError(f"it is not of schema {schema!r}")
        if set(content) != set(keys) or rendered(content) != text:
            raise ValueError("it is not in the form in which it is written")
        if content["relation"] != bundle.digest_of({key: content[key] for key in content if key != "relation"}):
            raise ValueError("relation is not the digest of the rest")
        bundle.check_digests("files", content["files"])
    except FileNotFoundError:
        raise VerificationFailed([f"{name} is missing"], directory) from None
    except (OSError, ValueError) as error:
        raise VerificationFailed([f"{name} cannot be used: {error}"], directory) from None
    return content
