"""WBC: votes of windows of many widths on whether the fine-tuned model finds them likelier than its base (2026)."""

from __future__ import annotations

import numpy as np

from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals

WIDTHS = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)


def score(row: DocumentSignals) -> float:
    """Return the share of windows likelier under the target than the base, averaged over widths (at most the text)."""
    gain = row.target_logp.astype(np.float64) - row.base_logp.astype(np.float64)
    total = np.concatenate([[0.0], gain.cumsum()])
    shares = [float((total[w:] - total[:-w] > 0.0).mean()) for w in (min(width, gain.size) for width in WIDTHS)]
    return float(np.mean(shares))


ATTACK = DocumentAttack(
    "wbc", "share of windows likelier under the target than under the base, mean over 10 widths (WBC, 2026)", score
)
