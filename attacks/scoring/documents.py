"""Which documents are scored, in which order, and what is known of each before any model sees it.

A *coin* is a secret random choice before training, such as whether a user is held in (trained on) or held out. The
manifest is the sealed split, which the coins decided: it lists who is held in, and which records of whom the attacker
holds. Two kinds of documents are drawn by the same rule on both sides: the attacker's fresh documents, which nobody
trained on, and some of the records that training could use. Only users who have fresh documents are scored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.errors import AttackInputError
from attacks.evidence import verified_statement
from attacks.signals import CONTROL_PREFIX, FRESH, HELD_IN, HELD_OUT, TRAINING
from privtrain.config.data import DataSection
from privtrain.data.canaries import canaries_of
from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.manifest import USED_SCHEMA, read_sealed, split_commitment
from privtrain.errors import GuaranteeLost, PlanMismatch
from privtrain.privacy.secret import SecretKey
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import read_sealed_file

PSEUDONYM_PURPOSE = "attack pseudonym"

SPANS_PATH = pathlib.Path("secret/spans.json")
"""Labelled spans (:func:`read_spans`) that were sealed before training, where the data had them."""

SPANS_SCHEMA = "privtrain/spans/1"

DOCUMENTS_PER_PART = 128
"""Documents whose signals are written at once: what a killed job may have to do again on each rank."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A document that is to be scored.

    Attributes:
        user: its owner.
        index: of the record among the owner's.
        kind: one of ``attacks.signals.KINDS``.
        text: its text if it is not in the corpus, such as a canary; None of a record of the corpus.
    """

    user: str
    index: int
    kind: str
    text: str | None = None

    @property
    def name(self) -> str:
        """Its name in the signals, unique among its user's; a control has the index of a training record as well."""
        return f"{self.index}-{self.kind}" if self.kind == CONTROL_PREFIX else str(self.index)

    def text_in(self, corpus: Corpus) -> str:
        """Return what is scored."""
        return corpus.records[self.user][self.index] if self.text is None else self.text


def read_manifest(run: RunDirectory) -> dict[str, Any]:
    """Return the sealed split of a run: who was held in, what the attacker holds, which canaries were planted.

    Raises:
        AttackInputError: if the manifest is missing or was altered, or is not the one that the privacy statement
            commits to.
    """
    statement = verified_statement(run.root)
    if not os.path.lexists(run.manifest):
        raise AttackInputError(
            f"{run.root} has no {run.manifest.name} in secret/; restore it: nobody else knows the split"
        )
    try:
        manifest = read_sealed(run.manifest)
        commitment = split_commitment(run.load_key("root"), manifest["sha256"])
    except (PlanMismatch, GuaranteeLost) as error:
        raise AttackInputError(f"{error}; it was altered after training began") from None
    if commitment != statement.split_commitment:
        raise AttackInputError(
            f"{run.manifest} is not what {run.privacy} commits to: it, secret/root.key or the statement was replaced "
            f"after training began; restore them. Which of them it was: privtrain ledger verify {run.root}"
        )
    if read_used(run)["manifest_sha256"] != manifest["sha256"]:
        raise AttackInputError(f"{run.manifest} is not the one that {run.used} was written with; it was replaced")
    return manifest


def read_used(run: RunDirectory) -> dict[str, Any]:
    """Return training's own record of what it used: records left out by selection, and draws of each canary.

    Raises:
        DamagedFile: if the record is missing, or not as training sealed it.
    """
    return read_sealed_file(run, run.used, schema=USED_SCHEMA, remedy="restore it")


def read_spans(run: RunDirectory, manifest: Mapping[str, Any]) -> dict[str, dict[str, list[list[int]]]] | None:
    """Return the spans that ``attacks prepare --spans COLUMN`` sealed: sensitive text, as the data's owner marked it.

    Args:
        run: the attacked run.
        manifest: its sealed split.

    Returns:
        User → record's index, as text → [start, end) pairs in characters of the record; None if no spans were sealed.

    Raises:
        DamagedFile: if they are not as they were sealed.
        AttackInputError: if they were sealed with another split.
    """
    path = run.root / SPANS_PATH
    if not os.path.lexists(path):
        return None
    sealed = read_sealed_file(run, path, schema=SPANS_SCHEMA, remedy="restore it, or name --spans COLUMN")
    if sealed["manifest_sha256"] != manifest["sha256"]:
        raise AttackInputError(
            f"{path} was sealed with another split than this run's; restore it, or name --spans COLUMN"
        )
    return sealed["spans"]


def sides_of(own: Mapping[str, Any], attacked: Mapping[str, Any]) -> dict[str, str]:
    """Return the side that every scored user has in a run.

    Args:
        own: manifest of the run whose model is asked.
        attacked: manifest of the run whose documents are scored; the same one, except for shadows.
    """
    held_in = set(own["held_in"])
    users = {*attacked["attacker"], *(canary.user for canary in canaries_of(attacked))}
    return {user: HELD_IN if user in held_in else HELD_OUT for user in users}


def attack_pseudonym(key: SecretKey, user: str) -> str:
    """Return a user's name in signals, the same in every scoring of a run and of its shadows.

    It is not the user's pseudonym in the ledger. Signals hold token ids, so whoever has the data set can tell whose
    they are; a shared name would tell whose rows of the ledger are whose, even after the ledger's key was destroyed.

    Args:
        key: the run's pseudonym key.
        user: id in the data.

    Returns:
        32 hex digits of an HMAC-SHA-256 under the key, for a purpose of its own.
    """
    return key.derive(PSEUDONYM_PURPOSE, user).hex()[:32]


def plan_documents(
    manifest: Mapping[str, Any], corpus: Corpus, num_training_records: int, *, with_controls: bool = False
) -> list[Document]:
    """Return the documents in scoring order: longest text first.

    Args:
        manifest: of the attacked run.
        corpus: the run's data.
        num_training_records: how many records of each user, among those that training could use, at most.
        with_controls: also the same records after somebody else's first tokens.

    Raises:
        AttackInputError: if the data are not the ones that the split was drawn on, or the attacker has no document.
    """
    if corpus.manifest_sha256 != manifest["data_sha256"]:
        raise AttackInputError("the data changed since the split was sealed; restore the files named in config.yaml")
    canaries = {canary.user for canary in canaries_of(manifest)}
    documents = []
    for user, fresh in manifest["attacker"].items():
        if user in canaries:  # judged apart from natural users
            continue
        documents += [Document(user, index, FRESH) for index in fresh]
        usable = set(range(len(corpus.records[user]))) - set(fresh)
        chosen = sorted(usable, key=lambda index: _shuffle_key(user, index))[:num_training_records]
        documents += [Document(user, index, TRAINING) for index in chosen]
        if with_controls:
            documents += [Document(user, index, CONTROL_PREFIX) for index in chosen]
    if not documents:
        raise AttackInputError(
            "no record was set aside for the attacker: data.attack_fraction is 0, or no user has "
            "data.attack_min_records records. This is decided before training: set them for another run"
        )
    return in_order(documents, corpus)


def in_order(documents: Iterable[Document], corpus: Corpus) -> list[Document]:
    """Return the documents, longest text first."""
    return sorted(documents, key=lambda d: (-len(d.text_in(corpus)), d.user, d.name))


def in_parts(documents: Sequence[Document]) -> list[list[Document]]:
    """Cut the documents into parts, in their order; the cut does not depend on the number of ranks."""
    starts = range(0, len(documents), DOCUMENTS_PER_PART)
    return [list(documents[start : start + DOCUMENTS_PER_PART]) for start in starts]


def compose_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group sequences of similar length; no batch exceeds ``batch_tokens`` with padding, unless it is one sequence.

    Yields:
        Batches as indices into ``lengths``, longest sequence first.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first sequence of a batch is its longest, and all others are padded to it.
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def tokens_of(texts: Sequence[str], encoder: Encoder) -> list[npt.NDArray[np.int64]]:
    """Return token ids of each text, as training encodes it; prompt tokens, which training only conditions on, too.

    A text with ids that the model does not embed cannot be trained on; the begin and the end mark stand in its place,
    for held-in and held-out users alike.
    """
    blank = np.asarray(encoder.marks, dtype=np.int64)
    return [record.tokens if len(record) > 1 else blank for record in encoder.encode(texts).records]


def text_encoder(encoder: Encoder, max_length: int) -> Encoder:
    """Return an encoder of plain texts of another length than the run's, for the same model."""
    section = DataSection.model_construct(format="text", max_length=max_length)
    return Encoder(section, encoder.tokenizer, encoder.num_ids)


def sensitive_tokens(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, num_tokens: int
) -> npt.NDArray[np.bool_]:
    """Return whether any character of each scored token lies in a labelled span.

    Args:
        text: the document.
        spans: [start, end) in characters of ``text``.
        tokenizer: a fast tokenizer.
        num_tokens: scored tokens; the end mark, if it is there, is not sensitive.
    """
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    is_sensitive = np.zeros(max(num_tokens, len(offsets)), dtype=np.bool_)
    for token, (start, end) in enumerate(offsets):  # of the token's characters
        is_sensitive[token] = any(start < span_end and span_start < end for span_start, span_end in spans)
    return is_sensitive[:num_tokens]


def text_facts(text: str) -> dict[str, int]:
    """Return the size of a text in UTF-8 bytes and after compression by zlib."""
    encoded = text.encode("utf-8", errors="surrogatepass")
    return {"num_bytes": len(encoded), "zlib_bytes": len(zlib.compress(encoded))}


def user_facts(manifest: Mapping[str, Any], corpus: Corpus, user: str) -> dict[str, int]:
    """Return how many records, and how many bytes of text, of a user training could use: all but the attacker's.

    The rule is the same for held-in and held-out users; it gives zeros for a user who is not in the corpus.
    """
    fresh = set(manifest["attacker"].get(user, ()))
    texts = [text for index, text in enumerate(corpus.records.get(user, ())) if index not in fresh]
    return {
        "user_num_records": len(texts),
        "user_num_bytes": sum(len(text.encode("utf-8", errors="surrogatepass")) for text in texts),
    }


def _shuffle_key(user: str, index: int) -> bytes:
    """Return a key to sort records by, in random but public order: it must not depend on the user's side."""
    return hashlib.sha256(f"{user}\x1f{index}".encode("utf-8", errors="surrogatepass")).digest()
