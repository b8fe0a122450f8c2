"""The sealed coins: which users are trained on, and which of their records the attacker holds.

Flipped once, before training, from the run's root key, independently for every user, so that the attack job can treat
held-in and held-out users as exchangeable. Both sides pass through the same rules before anybody is selected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from privtrain.config.schema import DataSection
from privtrain.data.corpus import Corpus
from privtrain.secret import SecretKey

SCHEMA = "privtrain/manifest/1"


@dataclasses.dataclass(frozen=True)
class Split:
    """Who is trained on and who is held out.

    Attributes:
        training: held-in user → record indices that training may use (never empty).
        held_out: users that training never sees.
        attacker: user → record indices that only the attacker holds; users of both sides.
        evaluation: (held-out user, record index) pairs that perplexity is measured on.
    """

    training: Mapping[str, tuple[int, ...]]
    held_out: tuple[str, ...]
    attacker: Mapping[str, tuple[int, ...]]
    evaluation: tuple[tuple[str, int], ...]

    def manifest(self, corpus: Corpus) -> dict[str, Any]:
        """The sealed form, with a digest over its content. Names users: ``secret/`` only."""
        body = {
            "schema": SCHEMA,
            "data_sha256": corpus.manifest_sha256,
            "held_in": sorted(self.training),
            "held_out": sorted(self.held_out),
            "attacker": {user: list(indices) for user, indices in sorted(self.attacker.items())},
            "evaluation": [list(item) for item in self.evaluation],
        }
        return {**body, "sha256": seal(body)}


def seal(body: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of a manifest's body."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", errors="surrogatepass")).hexdigest()


def split_users(corpus: Corpus, data: DataSection, root_key: SecretKey) -> Split:
    """Flip every user's coin and draw the attacker's records.

    A user with fewer than ``attack_min_records`` records gives none to the attacker. Everybody else gives
    ``attack_fraction`` of theirs, at least one, at most ``attack_max_records``, and keeps at least one.
    """
    training: dict[str, tuple[int, ...]] = {}
    held_out: list[str] = []
    attacker: dict[str, tuple[int, ...]] = {}
    for user, texts in corpus.records.items():
        stream = root_key.stream("split", user)
        is_held_out = stream.uniform(1)[0] < data.held_out_fraction
        taken: set[int] = set()
        if data.attack_fraction > 0 and len(texts) >= data.attack_min_records:
            count = min(max(1, round(data.attack_fraction * len(texts))), data.attack_max_records, len(texts) - 1)
            taken = set(stream.choose(len(texts), count))
            attacker[user] = tuple(sorted(taken))
        if is_held_out:
            held_out.append(user)
        else:
            training[user] = tuple(i for i in range(len(texts)) if i not in taken)
    candidates = [(u, i) for u in held_out for i in range(len(corpus.records[u])) if i not in attacker.get(u, ())]
    chosen = root_key.stream("evaluation").choose(len(candidates), data.num_evaluation_records)
    return Split(training, tuple(held_out), attacker, tuple(candidates[i] for i in chosen))
