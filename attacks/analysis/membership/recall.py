"""ReCaLL: a non-member prefix hurts a text that was trained on most (Xie et al. 2024, arXiv 2406.15968)."""

from __future__ import annotations

from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals


def score(row: DocumentSignals) -> float:
    """Return a ratio of two negative means over the same tokens: above 1 where the prefix made the text less likely."""
    # A text of certain tokens has mean 0; nothing can be said of it.
    plain = row.variants["recall_plain"]
    return row.variants["recall"] / plain if plain < 0.0 else 1.0


ATTACK = DocumentAttack(
    "recall",
    "mean log p_target after a non-member prefix / without it (Xie et al. 2024)",
    score,
    needs=("variants.recall", "variants.recall_plain"),
)
