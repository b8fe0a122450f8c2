"""Which canary documents are scored: the planted ones, and the secrets that they are compared with.

The comparison is fair because both come from one law: a canary's secret was drawn like its references, and which was
planted is the only difference. References are drawn from the run's root key, so every rank draws the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attacks.scoring.documents import Document
from attacks.signals import CANARY, CANARY_REFERENCE
from privtrain.config.canaries import CanariesSection
from privtrain.data.canaries import (
    SAMPLES,
    TEMPLATE,
    Canary,
    canaries_of,
    digits_of,
    draw_secret,
    shuffled_samples,
)
from privtrain.privacy.secret import SecretKey

POOL = "canary references"
"""Owner of references that all canaries of a kind share."""


def plan_canaries(
    manifest: Mapping[str, Any],
    section: CanariesSection,
    tokenizer: Any,
    root_key: SecretKey,
    num_references: int,
) -> list[Document]:
    """Return the documents of planted canaries and of the references that their secrets are ranked among.

    Args:
        manifest: the split of the attacked run; it lists its canaries.
        section: the run's ``canaries`` configuration, which says how they were drawn.
        tokenizer: the model's.
        root_key: the run's.
        num_references: secrets that a canary is compared with; fewer where there are no more.
    """
    canaries = [canary for canary in canaries_of(manifest) if canary.is_text]
    documents: list[Document] = []
    for canary in canaries:
        # Of a real user whose records were changed the fresh records are scored; an invented user has only one text.
        indices = [0] if canary.is_invented else manifest["attacker"].get(canary.user, [])
        documents += [Document(canary.user, index, CANARY, canary.records[index]) for index in indices]
        if canary.kind == TEMPLATE:
            secrets = _other_digits(canary, section, root_key, num_references)
            documents += _references(canary.user, [canary.prefix + secret for secret in secrets])
    if any(canary.has_shared_references for canary in canaries):
        taken = {canary.secret for canary in canaries}
        if section.kind == SAMPLES:
            pool = shuffled_samples(section, root_key)[len(canaries) :][:num_references]
        else:
            stream = root_key.stream("canary references")
            pool = [draw_secret(section, tokenizer, stream) for _ in range(num_references)]
        documents += _references(POOL, [text for text in dict.fromkeys(pool) if text not in taken])
    return documents


def _references(user: str, texts: list[str]) -> list[Document]:
    return [Document(user, number, CANARY_REFERENCE, text) for number, text in enumerate(texts, start=1)]


def _other_digits(canary: Canary, section: CanariesSection, root_key: SecretKey, count: int) -> list[str]:
    """Return ``count`` different secrets of the same number of digits, not the canary's own; all if there are fewer."""
    size = 10**section.num_digits  # how many secrets there are
    if size - 1 <= count:
        every = [digits_of(number, section.num_digits) for number in range(size)]
        return [text for text in every if text != canary.secret]
    stream = root_key.stream("canary references", canary.user)
    texts: dict[str, None] = {}
    while len(texts) < count:
        text = draw_secret(section, None, stream)
        if text != canary.secret:
            texts[text] = None
    return list(texts)
