"""Likelihood against what a compressor makes of the text (Carlini et al. 2021, arXiv 2012.07805)."""

from __future__ import annotations

import numpy as np

from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals


def score(row: DocumentSignals) -> float:
    """Return the mean log-probability per token over the text's compressed size in bytes; near 0 for members."""
    return float(row.target_logp.mean(dtype=np.float64)) / max(row.zlib_bytes, 1)


ATTACK = DocumentAttack("zlib", "mean log p_target per token / zlib bytes of the text (Carlini et al. 2021)", score)
