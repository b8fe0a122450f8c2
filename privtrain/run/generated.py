"""What a generated corpus says of itself, corpus.json: the release it was sampled from, and how.

ε of the run covers it: a text is a function of the released model, public prompts and public random numbers
(post-processing; Dwork and Roth 2014, proposition 2.1). That holds for any number of texts, and costs nothing more.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from privtrain.files.atomic import write_atomically
from privtrain.run import bundle
from privtrain.run.exported import read_bound, rendered

SCHEMA = "privtrain/corpus/1"
NAME = "corpus.json"
TEXTS = "corpus.jsonl"

COVERED = (
    "Every text is a function of the released model, of prompts and of random numbers, and nothing private was looked "
    "at when texts were drawn or left out. So ε and δ of privacy.json cover the whole corpus, however many texts it "
    "has (post-processing)."
)
NOT_COVERED = "The run is NOT PRIVATE, as privacy.json says why, and neither is the corpus."
ASSUMPTION = "Prompts and labels are public: none was taken from, or chosen by looking at, the private records."


def describe(
    manifest: bundle.ReleaseManifest, directory: pathlib.Path, facts: Mapping[str, Any], *, is_private: bool
) -> dict[str, Any]:
    """Write ``corpus.json`` and ``release.json`` beside the texts; return the content of ``corpus.json``.

    Args:
        manifest: of the release that was sampled from.
        directory: of the corpus, with all its other files, whose digests are taken.
        facts: how the texts were drawn.
        is_private: whether the run that was sampled from is.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "release": manifest.digest,
        "covered": COVERED if is_private else NOT_COVERED,
        "assumption": ASSUMPTION,
        **facts,
        "files": {path: bundle.sha256_of(directory / path) for path in bundle.files_under(directory)},
    }
    content["relation"] = bundle.digest_of(content)
    write_atomically(directory / NAME, rendered(content))
    write_atomically(directory / bundle.NAME, bundle.render(manifest, "corpus"))
    return content


_KEYS = (
    "schema",
    "release",
    "covered",
    "assumption",
    "num_texts",
    "conditions_sha256",
    "sampling",
    "files",
    "relation",
)


def read_description(directory: pathlib.Path) -> dict[str, Any]:
    """Return what ``corpus.json`` says.

    Raises:
        VerificationFailed: if it is missing, or not in the one form in which it is written.
    """
    return read_bound(directory, NAME, SCHEMA, _KEYS)
