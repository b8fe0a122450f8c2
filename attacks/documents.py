"""Which documents are scored, in which order, and what is known of each before any model sees it.

Two kinds, drawn by the same rule on both sides: the attacker's fresh documents, which the sealed manifest names, and
some of the records that training could use. Only users who have fresh documents are scored at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.errors import AttackInputError
from attacks.signals import FRESH, HELD_IN, HELD_OUT, TRAINING
from privtrain.config.schema import DataSection
from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.split import seal
from privtrain.rundir import RunDirectory

DOCUMENTS_PER_PART = 128
"""Documents whose signals are written at once: what a killed job may have to do again on each rank."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A document that is to be scored."""

    user: str
    index: int
    side: str
    kind: str


def read_manifest(run: RunDirectory) -> dict[str, Any]:
    """The sealed coins of a run.

    Raises:
        AttackInputError: if they are missing or were altered.
    """
    if not run.manifest.is_file():
        raise AttackInputError(
            f"{run.root} has no {run.manifest.name} in secret/; restore it: nobody else knows the split"
        )
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    if seal(body) != manifest["sha256"]:
        raise AttackInputError(f"{run.manifest} does not match its seal; it was altered after training began")
    return manifest


def plan_documents(manifest: Mapping[str, Any], corpus: Corpus, num_training_records: int) -> list[Document]:
    """The documents in scoring order: longest text first.

    Args:
        manifest: of the attacked run.
        corpus: the run's data.
        num_training_records: how many records of each user, among those that training could use, at most.

    Raises:
        AttackInputError: if the data are not the ones that the split was drawn on, or the attacker has no document.
    """
    if corpus.manifest_sha256 != manifest["data_sha256"]:
        raise AttackInputError("the data changed since the split was sealed; restore the files named in config.yaml")
    held_in = set(manifest["held_in"])
    found = []
    for user, fresh in manifest["attacker"].items():
        side = HELD_IN if user in held_in else HELD_OUT
        found += [Document(user, index, side, FRESH) for index in fresh]
        usable = sorted(set(range(len(corpus.records[user]))) - set(fresh), key=lambda index: _order(user, index))
        found += [Document(user, index, side, TRAINING) for index in usable[:num_training_records]]
    if not found:
        raise AttackInputError(
            "the manifest gives the attacker no document; see data.attack_fraction and attack_min_records"
        )
    return sorted(found, key=lambda d: (-len(corpus.records[d.user][d.index]), d.user, d.index))


def in_parts(documents: Sequence[Document]) -> list[list[Document]]:
    """Neighbours in length together; the cut depends on nothing but the documents."""
    return [
        list(documents[start : start + DOCUMENTS_PER_PART]) for start in range(0, len(documents), DOCUMENTS_PER_PART)
    ]


def compose_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Groups sequences of similar length; no batch exceeds ``batch_tokens`` with padding, unless it is one sequence.

    Args:
        lengths: tokens of each sequence.
        batch_tokens: tokens in one forward pass.

    Yields:
        Places in ``lengths``, longest first.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def tokens_of(texts: Sequence[str], encoder: Encoder) -> list[npt.NDArray[np.int64]]:
    """Token ids of each record, as training encodes it; every token is scored, also those only conditioned on."""
    return [record.tokens for record in encoder.encode(texts).records]


def text_encoder(tokenizer: Any, max_length: int) -> Encoder:
    """Encodes plain texts of another length than the run's."""
    return Encoder(DataSection.model_construct(format="text", max_length=max_length), tokenizer)


def sensitive_tokens(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, num_tokens: int
) -> npt.NDArray[np.bool_]:
    """Whether any character of each scored token lies in a labelled span.

    Args:
        text: the document.
        spans: [start, end) in characters of ``text``.
        tokenizer: a fast tokenizer.
        num_tokens: scored tokens; the end mark, if it is there, is not sensitive.
    """
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    is_sensitive = np.zeros(max(num_tokens, len(offsets)), dtype=np.bool_)
    for number, (start, end) in enumerate(offsets):
        is_sensitive[number] = any(start < last and first < end for first, last in spans)
    return is_sensitive[:num_tokens]


def text_facts(text: str) -> dict[str, int]:
    """Sizes that attacks compare a likelihood with."""
    encoded = text.encode("utf-8", errors="surrogatepass")
    return {"num_bytes": len(encoded), "zlib_bytes": len(zlib.compress(encoded))}


def user_facts(manifest: Mapping[str, Any], corpus: Corpus, user: str) -> dict[str, int]:
    """How much of a user training could use; the same rule on both sides."""
    fresh = set(manifest["attacker"].get(user, ()))
    texts = [text for index, text in enumerate(corpus.records[user]) if index not in fresh]
    return {
        "user_num_records": len(texts),
        "user_num_bytes": sum(len(text.encode("utf-8", errors="surrogatepass")) for text in texts),
    }


def _order(user: str, index: int) -> bytes:
    """A public shuffle: which records are scored must not depend on the side."""
    return hashlib.sha256(f"{user}\x1f{index}".encode("utf-8", errors="surrogatepass")).digest()
