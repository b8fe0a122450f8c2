"""Extraction: which training records a prompt with their first tokens gives back, from one teacher-forced pass.

* **Greedy** (Carlini et al. 2023, arXiv 2202.07646): the suffix comes back word for word by greedy decoding. Exact: if
  every token of the suffix is the most likely one after the true text before it, greedy decoding walks that very path.
* **Near match**: the greedy output agrees with the suffix for its first nine tenths, so that their edit distance is at
  most a tenth of its length. Certain where it is claimed; but after the first token that differs one forward pass does
  not see what would be said, so outputs that stray and come back are missed. The true rate is at least this one.
* **(n, p)-discoverable** (Hayes et al. 2024, arXiv 2410.19482): at least once in n samples with probability p, which is
  n >= log(1 - p) / log(1 - p_z). The probability p_z of the suffix is the product of its tokens' probabilities *under
  the sampling scheme*, so one pass says what n samples would, for every n.

Controls, by the same rule: held-out users' records (nobody trained on them), the base model, and, where they were
scored, training records after another user's first tokens. What those give back is predictable, not memorised.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from attacks.signals import DocumentSignals

PREFIX_LENGTHS = (8, 16, 32, 64, 128)
MIN_SUFFIX, MAX_SUFFIX = 8, 50
"""The suffix is the next 50 tokens, or what is left of the record if that is at least 8."""

NEAR_SHARE = 0.9

_LOWEST_LOG_PROB = -700.0
"""Below this exp underflows; no number of samples that anybody could draw would do."""


@dataclasses.dataclass(frozen=True)
class Recall:
    """What one model gives back of one record.

    Attributes:
        greedy: the suffix, word for word, by greedy decoding.
        near: an output within a tenth of its length in edit distance, for certain.
        log_prob: of drawing the suffix under the sampling scheme; None if it was not scored.
    """

    greedy: bool
    near: bool
    log_prob: float | None


def recall(row: DocumentSignals, model: str, prefix: int) -> Recall | None:
    """Return what a model gives back of a document after its first tokens.

    Args:
        row: the document's signals.
        model: ``"target"`` or ``"base"``.
        prefix: how many of its tokens are the prompt, the begin mark not counted.

    Returns:
        None if the document is too short, or its signals do not say which tokens are the most likely.
    """
    correct, sampled = getattr(row, f"{model}_correct"), getattr(row, f"{model}_sampled_logp")
    suffix = slice(prefix, min(prefix + MAX_SUFFIX, row.num_tokens))
    size = suffix.stop - prefix
    if correct is None or size < MIN_SUFFIX:
        return None
    wrong = np.flatnonzero(~correct[suffix])
    num_correct_in_a_row = size if wrong.size == 0 else int(wrong[0])
    log_prob = None if sampled is None else float(sampled[suffix].sum(dtype=np.float64))
    is_near = num_correct_in_a_row >= math.ceil(NEAR_SHARE * size)
    return Recall(greedy=wrong.size == 0, near=is_near, log_prob=log_prob)


def samples_needed(log_prob: float, probability: float) -> float:
    """Return the fewest samples n that make a suffix (n, p)-discoverable; infinity if it cannot be drawn.

    Args:
        log_prob: of one sample being the suffix.
        probability: p.
    """
    if log_prob < _LOWEST_LOG_PROB:
        return math.inf
    # log(1 - p_z), by the form that keeps its digits: p_z may be tiny, or all but one.
    log_miss = math.log1p(-math.exp(log_prob)) if log_prob < -1.0 else _log(-math.expm1(log_prob))
    return float(max(1, math.ceil(math.log1p(-probability) / log_miss)))


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf
