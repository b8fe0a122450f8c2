"""Check that the scored documents are the planned ones: none missing, none added, none on the other side.

A report on a subset is a report on whom somebody chose. So the plan is written down before a token is scored, compared
with what was scored before the signals are sealed, and derived again from the sealed coins by whoever analyses them.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypedDict

from attacks.scoring.documents import Document, attack_pseudonym
from attacks.signals import CONTROL_PREFIX, FRESH, TRAINING
from privtrain.privacy.secret import SecretKey


class DocumentKey(NamedTuple):
    """A document as the signals name it: the owner's pseudonym, its name among the owner's, its kind and its side."""

    user: str
    document: str
    kind: str
    side: str


def keys_of(documents: Sequence[Document], sides: Mapping[str, str], key: SecretKey) -> list[DocumentKey]:
    """Return the keys that documents will have in the signals, in their order."""
    names = {user: attack_pseudonym(key, user) for user in {document.user for document in documents}}
    return [DocumentKey(names[d.user], d.name, d.kind, sides[d.user]) for d in documents]


def digest_of(keys: Iterable[DocumentKey]) -> str:
    """Return SHA-256 over the keys in any order."""
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()


class PlannedFacts(TypedDict):
    """What the record of a scoring says of the documents.

    Attributes:
        sha256: digest over their keys.
        num: "kind side", such as ``"fresh held_in"`` → number of documents.
        num_users: users that own one.
    """

    sha256: str
    num: dict[str, int]
    num_users: int


def facts_of(keys: Collection[DocumentKey]) -> PlannedFacts:
    """Return what a record says of the documents: their digest, and how many of each kind, side and user."""
    counts = collections.Counter(f"{key.kind} {key.side}" for key in keys)
    num_users = len({key.user for key in keys})
    return {"sha256": digest_of(keys), "num": dict(sorted(counts.items())), "num_users": num_users}


def difference(planned: Iterable[DocumentKey], scored: Iterable[DocumentKey]) -> str:
    """Return what is missing and what was added, in a few words without names; empty if nothing.

    A control document without anybody who could lend it a prompt may be missing; see ``attacks.scoring.variants``.
    """
    expected, present = collections.Counter(planned), collections.Counter(scored)
    missing = [key for key in (expected - present).elements() if key.kind != CONTROL_PREFIX]
    added = list((present - expected).elements())
    parts = []
    for keys, what in ((missing, "missing"), (added, "that were not planned")):
        if keys:
            kinds = ", ".join(sorted({f"{key.kind} {key.side}" for key in keys}))
            parts.append(f"{len(keys)} documents of {len({key.user for key in keys})} users {what} ({kinds})")
    return "; ".join(parts)


def check_training(scored: Iterable[DocumentKey], num_usable: Mapping[str, int], num_wanted: int) -> str:
    """Return what is wrong with the scored training records, by what can be checked without the data.

    Each user must have as many as were asked for, or all usable ones if those are fewer; a record must not be fresh as
    well; and a control (a training record after another user's first tokens) must be of a scored training record.

    Args:
        scored: keys of all scored documents.
        num_usable: pseudonym to number of records that training could use, of every attacked user.
        num_wanted: records of each user that scoring was asked for.

    Returns:
        A few words without names; empty if nothing is wrong.
    """
    records: dict[str, set[str]] = {user: set() for user in num_usable}
    fresh: dict[str, set[str]] = collections.defaultdict(set)
    controls: dict[str, set[str]] = collections.defaultdict(set)
    for key in scored:
        if key.kind == TRAINING:
            records.setdefault(key.user, set()).add(key.document)
        elif key.kind == FRESH:
            fresh[key.user].add(key.document)
        elif key.kind == CONTROL_PREFIX:
            # A control is named after its record, with its kind at the end: "7-control_prefix" is of record "7".
            controls[key.user].add(key.document.removesuffix(f"-{CONTROL_PREFIX}"))
    wrong = []
    for user, names in records.items():
        is_attacked = user in num_usable  # one who is not must have no record at all
        if not is_attacked or len(names) != min(num_wanted, num_usable[user]):
            wrong.append(user)
    mixed = [user for user in controls if user not in records]
    for user, names in records.items():
        is_fresh_too = not names.isdisjoint(fresh[user])
        has_stray_control = not controls[user] <= names
        if is_fresh_too or has_stray_control:
            mixed.append(user)
    parts = []
    if wrong:
        parts.append(f"{len(wrong)} users have another number of training records than planned")
    if mixed:
        parts.append(f"{len(mixed)} users have records of contradicting kinds")
    return "; ".join(parts)
