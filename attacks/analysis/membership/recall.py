"""ReCaLL: a prefix that was not trained on lowers the likelihood of trained texts most (Xie et al. 2024).

arXiv 2406.15968.
"""

from __future__ import annotations

from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals


def score(row: DocumentSignals) -> float:
    """Return mean log p after the prefix / mean log p without it, over the same tokens.

    Both means are negative, so the ratio is above 1 where the prefix made the text less likely.
    """
    # A text that the model is certain of has mean 0; the score is then 1, as if the prefix changed nothing.
    plain = row.variants["recall_plain"]
    return row.variants["recall"] / plain if plain < 0.0 else 1.0


ATTACK = DocumentAttack(
    "recall",
    "mean log p_target after a non-member prefix / without it (Xie et al. 2024)",
    score,
    needs=("variants.recall", "variants.recall_plain"),
)
