"""User inference: was the model fine-tuned on this person's documents?

The statistic of Kandpal et al. 2023 (arXiv 2310.09266, section 3, eq. 4): the attacker holds fresh documents x_1..x_m
of a user, none of them trained on, and averages log p_target(x_i) - log p_base(x_i). A model that learned the user
finds the documents likelier than its base does. Higher means more member-like; the direction is fixed before any data
is seen.

Eq. 4 writes log p(x) of the whole document, a sum over its tokens, yet the scale of the paper's figures fits only a
mean over tokens. The two rank users differently, so both are computed and named, and ``token_mean`` is the declared
headline.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attacks import signals

DEFINITIONS: Mapping[str, str] = {
    "token_mean": "mean over a user's documents of the mean over tokens of log p_target - log p_base (nats per token)",
    "sequence_sum": "mean over a user's documents of the sum over tokens of log p_target - log p_base (nats)",
}
"""The statistics of this attack, by name."""

HEADLINE = "token_mean"
"""Declared before any run is seen; the others are secondary."""


def document_log_ratios(row: signals.DocumentSignals) -> dict[str, float]:
    """Return one document's log-likelihood ratios in nats, by the keys of ``DEFINITIONS``."""
    # float64 before the difference: over a long document float32 sums lose the digits that the attack lives on.
    log_ratio = row.target_logp.astype(np.float64) - row.base_logp.astype(np.float64)
    return {"token_mean": float(log_ratio.mean()), "sequence_sum": float(log_ratio.sum())}
