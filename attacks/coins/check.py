"""Check that the signals use the train/held-out split that the run committed to."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from attacks.errors import AttackInputError
from attacks.reporting.record import Scoring
from attacks.scoring import planned
from attacks.scoring.canaries import POOL
from attacks.scoring.documents import attack_pseudonym, read_manifest, read_used
from attacks.scoring.planned import DocumentKey
from attacks.signals import CANARY, CANARY_REFERENCE, FRESH, HELD_IN, HELD_OUT, TRAINING
from privtrain.data.canaries import TEMPLATE, canaries_of
from privtrain.privacy.secret import SecretKey


def check_documents(scoring: Scoring) -> int:
    """Raise unless the signals hold exactly the documents of the sealed split, each on its side.

    The attacker's documents and the canaries are derived from the split again. Training records are named only in the
    data, so their number per user is checked; which they are is checked against the sealed record, as are references.

    Returns:
        How many of the scored training records of held-in users no step could draw, because selection left them out.

    Raises:
        AttackInputError: if the coins were replaced, or the signals are of other coins or other documents.
    """
    run = scoring.run
    manifest, key = read_manifest(run), run.load_key("pseudonym")
    table = scoring.columns(["user", "document", "kind", "side", "user_num_records"])
    users, documents, kinds, sides, usable = (column.to_pylist() for column in table.columns)
    scored = [DocumentKey(*item) for item in zip(users, documents, kinds, sides, strict=True)]
    wrong = [
        planned.difference(_expected(manifest, key), [key for key in scored if key.kind in (FRESH, CANARY)]),
        _wrong_references(manifest, key, scored),
        planned.check_training(
            scored, _num_usable(manifest, key, users, usable), scoring.facts["options"]["num_training_records"]
        ),
        "" if planned.facts_of(scored) == scoring.facts["documents"] else "other documents than its record says",
    ]
    if any(wrong):
        raise AttackInputError(
            f"{scoring.path} does not hold the documents that {run.manifest} says, on its sides: "
            f"{'; '.join(filter(None, wrong))}; it was altered or belongs to other coins; {scoring.remedy}"
        )
    left_out = read_used(run)["left_out"]
    unused = {(attack_pseudonym(key, user), str(index)) for user, places in left_out.items() for index in places}
    return sum(item.kind == TRAINING and (item.user, item.document) in unused for item in scored)


def _side(manifest: Mapping[str, Any]) -> collections.defaultdict[str, str]:
    sides = collections.defaultdict(lambda: HELD_OUT)
    sides.update(dict.fromkeys(manifest["held_in"], HELD_IN))
    return sides


def _expected(manifest: Mapping[str, Any], key: SecretKey) -> list[DocumentKey]:
    """Return the attacker's documents and the planted ones."""
    sides, canaries = _side(manifest), canaries_of(manifest)
    planted = {canary.user for canary in canaries}
    places = [(user, FRESH, index) for user, fresh in manifest["attacker"].items() for index in fresh]
    places = [place for place in places if place[0] not in planted]
    for canary in filter(lambda canary: canary.is_text, canaries):
        indices = [0] if canary.is_invented else manifest["attacker"].get(canary.user, [])
        places += [(canary.user, CANARY, index) for index in indices]
    names = {user: attack_pseudonym(key, user) for user, _, _ in places}
    return [DocumentKey(names[user], str(index), kind, sides[user]) for user, kind, index in places]


def _wrong_references(manifest: Mapping[str, Any], key: SecretKey, scored: list[DocumentKey]) -> str:
    """Return what is wrong with the references: of somebody who is no canary, or not on its canary's side."""
    sides, canaries = _side(manifest), canaries_of(manifest)
    owners = {attack_pseudonym(key, canary.user): sides[canary.user] for canary in canaries if canary.kind == TEMPLATE}
    if any(canary.has_shared_references for canary in canaries):
        owners[attack_pseudonym(key, POOL)] = HELD_OUT
    wrong = sum(item.kind == CANARY_REFERENCE and owners.get(item.user) != item.side for item in scored)
    return f"{wrong} references of no canary" if wrong else ""


def _num_usable(manifest: Mapping[str, Any], key: SecretKey, users: list[str], usable: list[int]) -> dict[str, int]:
    """Return, by pseudonym of every attacked natural user, the number of records that training could use."""
    planted = {canary.user for canary in canaries_of(manifest)}
    natural = {attack_pseudonym(key, user) for user in manifest["attacker"] if user not in planted}
    return {user: count for user, count in zip(users, usable, strict=True) if user in natural}
