"""Check that the signals use the train/held-out split that the run committed to.

The split manifest (``secret/``) says who is held in (trained on), who is held out, which records the attacker holds and
which canaries were planted. Signals name users by the attack's own pseudonyms, which follow from a key of the run.
"""

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

    The attacker's documents and the canaries are derived from the split again and compared one by one. Which training
    records were scored does not follow from the split, so only their number per user is compared with it. The digest in
    the sealed record of the scoring covers which they are, and which references of canaries.

    Returns:
        How many scored training records of held-in users were never trained on, since the selection of records left
        them out.

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
    left_out = read_used(run)["left_out"]  # user -> indices of records
    unused: set[tuple[str, str]] = set()  # (pseudonym, document) as the signals name them
    for user, indices in left_out.items():
        unused |= {(attack_pseudonym(key, user), str(index)) for index in indices}
    return sum(item.kind == TRAINING and (item.user, item.document) in unused for item in scored)


def _side(manifest: Mapping[str, Any]) -> collections.defaultdict[str, str]:
    """Return user to side; whoever the manifest does not list as held in is held out."""
    sides = collections.defaultdict(lambda: HELD_OUT)
    sides.update(dict.fromkeys(manifest["held_in"], HELD_IN))
    return sides


def _expected(manifest: Mapping[str, Any], key: SecretKey) -> list[DocumentKey]:
    """Return the fresh documents of natural users and the canaries' documents, as the signals must name them."""
    sides, canaries = _side(manifest), canaries_of(manifest)
    planted = {canary.user for canary in canaries}
    expected = []  # (user, kind, index of the record)
    for user, fresh in manifest["attacker"].items():
        if user not in planted:
            expected += [(user, FRESH, index) for index in fresh]
    for canary in canaries:
        if canary.is_text:
            # All records of an invented user are one text, scored once; of a changed user the fresh records are scored.
            indices = [0] if canary.is_invented else manifest["attacker"].get(canary.user, [])
            expected += [(canary.user, CANARY, index) for index in indices]
    names = {user: attack_pseudonym(key, user) for user, _, _ in expected}
    return [DocumentKey(names[user], str(index), kind, sides[user]) for user, kind, index in expected]


def _wrong_references(manifest: Mapping[str, Any], key: SecretKey, scored: list[DocumentKey]) -> str:
    """Return what is wrong with the canaries' references, in words: an owner that has none, or another side than its.

    References are secrets that were not planted, to rank a canary's secret among.
    """
    sides, canaries = _side(manifest), canaries_of(manifest)
    # A canary made from a template owns its references, which are its text with other digits, and they bear its side.
    side_of_owner = {
        attack_pseudonym(key, canary.user): sides[canary.user] for canary in canaries if canary.kind == TEMPLATE
    }
    # Canaries of some other kinds share a pool, which stands for one more owner; nobody trained on its texts.
    if any(canary.has_shared_references for canary in canaries):
        side_of_owner[attack_pseudonym(key, POOL)] = HELD_OUT
    wrong = sum(item.kind == CANARY_REFERENCE and side_of_owner.get(item.user) != item.side for item in scored)
    return f"{wrong} references of no canary, or on another side than their owner" if wrong else ""


def _num_usable(manifest: Mapping[str, Any], key: SecretKey, users: list[str], usable: list[int]) -> dict[str, int]:
    """Return pseudonym to number of records that training could use, of every attacked user who is no canary.

    Args:
        manifest: of the split.
        key: of the attack's pseudonyms.
        users: pseudonym in each row of the signals.
        usable: the number that the same row states for its user.
    """
    planted = {canary.user for canary in canaries_of(manifest)}
    natural = {attack_pseudonym(key, user) for user in manifest["attacker"] if user not in planted}
    return {user: count for user, count in zip(users, usable, strict=True) if user in natural}
