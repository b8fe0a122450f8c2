"""The split: which users are trained on (held in) and which are not (held out), and which records the attacker holds.

The attacker's records are set aside for the attack job, which plays somebody who has a few texts of a user and asks
whether training saw that user. Training never sees these records.

The split is drawn once, before training, from the run's root key, by a coin for every user, so that the attack job can
treat held-in and held-out users as exchangeable. Both sides pass through the same rules before anybody is selected.

What of a user is trained on is a function of that user's records and coins alone. Where ε is for one record, it must be
a function of that record and its coin: else one more record would change which of the others are trained on, and move a
step's sum by several units where one is accounted for. So the attacker's records are then chosen one by one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from privtrain.config.data import DataSection
from privtrain.data.canaries import Canary
from privtrain.data.corpus import Corpus
from privtrain.data.packed import Names, UserIndices
from privtrain.privacy.secret import KeyStream, SecretKey

SCHEMA = "privtrain/manifest/2"

CANARY_COIN = 0.5
"""Chance that a canary is held out: what one-run audits assume."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Who is trained on and who is held out.

    Attributes:
        training: held-in user → indices of the records that training may use (never empty).
        held_out: users that training never sees.
        attacker: user, held in or held out → indices of the records that only the attacker holds.
        evaluation: (held-out user, record index) pairs that perplexity is measured on; never a canary's.
        canaries: planted users; they stand in ``training`` or ``held_out`` too. The attacker holds no records of
            invented ones.
    """

    training: Mapping[str, tuple[int, ...]]
    held_out: Sequence[str]
    attacker: Mapping[str, tuple[int, ...]]
    evaluation: tuple[tuple[str, int], ...]
    canaries: tuple[Canary, ...] = ()

    def manifest(self, corpus: Corpus) -> dict[str, Any]:
        """Return the split's manifest with a digest over its content. Names users: ``secret/`` only."""
        body = {
            "schema": SCHEMA,
            "data_sha256": corpus.manifest_sha256,
            "held_in": sorted(self.training),
            "held_out": sorted(self.held_out),
            "attacker": {user: list(indices) for user, indices in sorted(self.attacker.items())},
            "evaluation": [list(item) for item in self.evaluation],
            "canaries": [canary.to_json() for canary in self.canaries],
        }
        return {**body, "sha256": seal(body)}


def seal(body: Mapping[str, Any]) -> str:
    """Return SHA-256 over the canonical JSON of a manifest's body."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", errors="surrogatepass")).hexdigest()


def split_users(
    corpus: Corpus,
    data: DataSection,
    root_key: SecretKey,
    canaries: Sequence[Canary] = (),
    *,
    by_record: bool = False,
) -> Split:
    """Draw which users are held out, and which of each user's records only the attacker holds.

    Users are held out with chance ``data.held_out_fraction``, canaries with chance one half. A user with fewer than
    ``attack_min_records`` records gives none to the attacker. Everybody else gives ``attack_fraction`` of theirs, at
    least one, at most ``attack_max_records``, and keeps at least one.

    With ``by_record``, each record goes to the attacker by a coin of its own, with chance ``attack_fraction``, whatever
    else its user has. A user may then keep no record: such a user is not trained on, and not attacked.

    Args:
        corpus: the kept records, without canaries.
        data: the rules.
        root_key: the run's; a user's coin depends on it and on the user's id alone.
        canaries: of :func:`privtrain.data.canaries.draw_canaries`.
        by_record: whether ε is for one record.
    """
    training, attacker, held_out = UserIndices(), UserIndices(), Names()
    evaluation_candidates = UserIndices()
    real_canaries = {canary.user for canary in canaries if not canary.is_invented}

    # The users of the data.
    for user, texts in corpus.records.items():
        stream = root_key.stream("split", user)
        (coin,) = stream.uniform(1)
        is_held_out = coin < (CANARY_COIN if user in real_canaries else data.held_out_fraction)
        if by_record:
            taken = set(np.flatnonzero(stream.uniform(len(texts)) < data.attack_fraction).tolist())
        else:
            taken = _attacker_records(stream, len(texts), data)
        kept = tuple(i for i in range(len(texts)) if i not in taken)
        if taken and kept:
            attacker.add(user, sorted(taken))
        if not is_held_out:
            if kept:
                training.add(user, kept)
            continue
        held_out.add(user)
        if kept and user not in real_canaries:
            evaluation_candidates.add(user, kept)

    # The held-out records that perplexity is measured on.
    chosen = root_key.stream("evaluation").choose(evaluation_candidates.num_indices, data.num_evaluation_records)
    evaluation = []
    for entry in chosen:
        place, index = evaluation_candidates.owner(entry)
        evaluation.append((evaluation_candidates.names[place], index))

    # The invented users, who are not in the data: they give no record to the attacker.
    for canary in canaries:
        if not canary.is_invented:
            continue
        (coin,) = root_key.stream("split", canary.user).uniform(1)
        if coin < CANARY_COIN:
            held_out.add(canary.user)
        else:
            training.add(canary.user, range(len(canary.records)))
    return Split(training, held_out, attacker, tuple(evaluation), tuple(canaries))


def _attacker_records(stream: KeyStream, num_records: int, data: DataSection) -> set[int]:
    """Return the indices of one user's records that only the attacker holds; the user keeps at least one."""
    if data.attack_fraction == 0 or num_records < data.attack_min_records:
        return set()
    count = min(max(1, round(data.attack_fraction * num_records)), data.attack_max_records, num_records - 1)
    return set(stream.choose(num_records, count))
