"""Keyed seals: a JSON file in a run that only somebody with the run's root key can have written, for this place.

A plain digest in a file shows damage; whoever edits the file makes a new one. A seal is HMAC-SHA-256 under the root key
over the file's place in the run and its canonical content, so an edit, a file of another run and one file put in the
place of another are all found. It proves nothing to those without ``secret/``, and shows them nothing of the key.
"""

from __future__ import annotations

import hmac
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from privtrain.errors import DamagedFile
from privtrain.files import reading
from privtrain.files.atomic import json_pieces, write_json
from privtrain.run.directory import RunDirectory

SEAL = "seal"
"""The key of a sealed file that holds its seal."""

_PURPOSE = "sealed file"


def seal_of(run: RunDirectory, path: pathlib.Path, body: Mapping[str, Any]) -> str:
    """Return the seal of a file's content at a path in a run.

    Args:
        run: whose root key seals it.
        path: of the file; its place in the run enters the seal.
        body: content of the file; its key ``seal``, if it has one, is left out.

    Raises:
        GuaranteeLost: if the run's root key is gone.
    """
    bare = {name: value for name, value in body.items() if name != SEAL}
    canonical = json.dumps(bare, sort_keys=True, separators=(",", ":"), allow_nan=False)
    place = path.absolute().relative_to(run.root.absolute()).as_posix()
    return run.load_key("root").derive(_PURPOSE, place, canonical).hex()


def write_sealed(run: RunDirectory, path: pathlib.Path, body: Mapping[str, Any], mode: int = 0o600) -> dict[str, Any]:
    """Write ``body`` with its seal as a JSON file, whole or not at all; return the content as it will be read."""
    body = json.loads(json.dumps(body, allow_nan=False))  # tuples and number keys as the reader will see them
    sealed = {**body, SEAL: seal_of(run, path, body)}
    write_json(path, sealed, mode=mode)
    return sealed


def read_sealed_file(
    run: RunDirectory, path: pathlib.Path, *, schema: str | None = None, remedy: str = ""
) -> dict[str, Any]:
    """Return the content of a file that :func:`write_sealed` wrote, its seal included.

    Args:
        run: whose root key sealed it.
        path: of the file.
        schema: what its key ``schema`` must say; anything if None.
        remedy: what an error tells the user to do.

    Raises:
        DamagedFile: if it is missing, damaged, or not as it was sealed at this place in this run.
        GuaranteeLost: if the run's root key is gone.
    """
    content = reading.read_bytes(path, remedy=remedy)
    facts = reading.parse_json(content, path, remedy=remedy)
    if schema is not None and facts.get("schema") != schema:
        raise DamagedFile(path, f"has another schema than {schema!r}", remedy)
    if b"".join(json_pieces(facts)) != content:
        raise DamagedFile(path, "is not in the form in which it is written: it was altered or damaged", remedy)
    seal = facts.get(SEAL)
    if not isinstance(seal, str) or not hmac.compare_digest(seal.encode(), seal_of(run, path, facts).encode()):
        raise DamagedFile(path, "does not match its seal: it was altered, or belongs to another run or place", remedy)
    return facts
