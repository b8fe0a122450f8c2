"""What a single user spent (Feldman and Zrnic 2021, arXiv 2008.11193): a report for the curator, never a guarantee.

The values depend on the data: releasing them is itself a release, and only a filter that stops at a bound set in
advance makes them a guarantee.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from accountants.answer import BoundKind, PrivacyAnswer
from accountants.events import phased_event
from accountants.methods.tilted import TiltedAccountant


def individual_epsilon(
    step_ratios: Sequence[float],
    *,
    noise_multiplier: float,
    delta: float,
    sampling_prob: float = 1.0,
    num_levels: int = 100,
) -> PrivacyAnswer:
    """Return what one user spent, given a bound on its contribution to every step; a report, not a guarantee.

    Args:
        step_ratios: per step, an upper bound on the norm of the user's clipped contribution over the clipping norm; 0
            for a step in which it could not contribute.
        noise_multiplier: relative to the clipping norm.
        delta: in (0, 1).
        sampling_prob: with which the user joined each of these steps, in secret. With 1, the default, the steps are
            those that the user is known to have joined (its participation count), and nothing is amplified.
        num_levels: ratios are rounded up to multiples of ``1 / num_levels``.

    Raises:
        ValueError: if a ratio is outside [0, 1].
    """
    if step_ratios and not (min(step_ratios) >= 0 and max(step_ratios) <= 1):
        raise ValueError("step_ratios must lie in [0, 1]")
    levels = Counter(math.ceil(ratio * num_levels - 1e-12) / num_levels for ratio in step_ratios)
    event = phased_event([(noise_multiplier / ratio, sampling_prob, n) for ratio, n in levels.items() if ratio > 0])
    answer = TiltedAccountant().epsilon(event, delta)
    # An estimate by construction: nobody may build a guarantee on a number that depends on the data.
    return dataclasses.replace(
        answer,
        lower=0.0,
        upper=math.inf,
        kind=BoundKind.ESTIMATE,
        note="individual report, not a guarantee",
        estimate=answer.upper,
    )
