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
    """Return a description as the text of its file: the one form that is written, and that a reader accepts."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def weights_of(files: Mapping[str, str]) -> dict[str, str]:
    """Return those of the released files (path → SHA-256) that an export reads the weights from."""
    endings = (".safetensors", ".bin", "/config.json", "adapter_config.json", ".index.json")
    return {path: digest for path, digest in files.items() if path.endswith(endings)}


def read_description(directory: pathlib.Path) -> dict[str, Any]:
    """Return the content of ``export.json`` in a directory.

    Raises:
        VerificationFailed: if it is missing, or differs from what an export writes.
    """
    keys = ("schema", "release", "released", "base_model", "merged", "dtype", "files", "relation")
    content = read_bound(directory, NAME, SCHEMA, keys)
    if content["dtype"] not in DTYPES:
        raise VerificationFailed([f"{NAME} cannot be used: dtype is {content['dtype']!r}"], directory)
    return content


def read_bound(directory: pathlib.Path, name: str, schema: str, keys: Iterable[str]) -> dict[str, Any]:
    """Return the content of a description such as ``export.json``, whose form and own digest are checked.

    Args:
        directory: where it is.
        name: of the file.
        schema: that it must have.
        keys: that it must have, no more and no fewer; ``files`` (path → SHA-256) and ``relation`` among them, which is
            the digest of all the others.

    Raises:
        VerificationFailed: if it is missing, or anything of this does not hold.
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
