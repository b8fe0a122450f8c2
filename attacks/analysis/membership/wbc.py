"""WBC: votes of windows of many widths on whether the fine-tuned model finds them likelier than its base (2026)."""

from __future__ import annotations

import numpy as np

from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals

WIDTHS = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)


def score(row: DocumentSignals) -> float:
    """Return the share of windows of tokens that are likelier under the target than under the base.

    A window is ``width`` tokens in a row, or the whole text if that is shorter; the share is averaged over ``WIDTHS``.
    """
    gain = row.target_logp.astype(np.float64) - row.base_logp.astype(np.float64)
    total = np.concatenate([[0.0], gain.cumsum()])
    shares = []
    for width in WIDTHS:
        size = min(width, gain.size)
        gains_of_windows = total[size:] - total[:-size]
        shares.append(float((gains_of_windows > 0.0).mean()))
    return float(np.mean(shares))


ATTACK = DocumentAttack(
    "wbc", "share of windows likelier under the target than under the base, mean over 10 widths (WBC, 2026)", score
)
