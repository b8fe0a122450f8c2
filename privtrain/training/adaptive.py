"""Adaptive quantile clipping: the norm follows a quantile of the units' norms (Andrew et al. 2021, arXiv 1905.03871).

After a step with norm C, the count Σ_u (b_u - 1/2) is released with Gaussian noise of standard deviation
``count_noise``, where b_u says whether unit u's norm was within C. With b the released share, C is then multiplied by
exp(-learning_rate · (b - target_quantile)). The count rides on the step (:mod:`.riders`).

Every norm is a function of counts released before, so it is public, the same on all ranks and in a replay.
"""

from __future__ import annotations

import math

from privtrain.errors import GuaranteeLost
from privtrain.privacy.plan import AdaptiveClipping

#: The norm changes by at most a factor e in a step, whatever the noise.
_MOST_LOG_CHANGE = 1.0

#: A norm this many times the first one, or its share, is no clipping norm of anything.
_FURTHEST = 1e12


def next_norm(settings: AdaptiveClipping, clipping_norm: float, share: float, *, initial_norm: float) -> float:
    """The next step's clipping norm: post-processing of the released share.

    Raises:
        GuaranteeLost: if it has left [1e-12, 1e12] times ``initial_norm``, beyond which fp32 may lose noise or sum.
    """
    change = settings.learning_rate * (settings.target_quantile - share)
    norm = clipping_norm * math.exp(min(max(change, -_MOST_LOG_CHANGE), _MOST_LOG_CHANGE))
    if not initial_norm / _FURTHEST <= norm <= initial_norm * _FURTHEST:
        raise GuaranteeLost(
            f"the clipping norm went from privacy.clipping_norm {initial_norm:g} to {norm:g}, past a factor of "
            f"{_FURTHEST:g}; start a new run with another privacy.clipping_norm, a lower "
            "privacy.adaptive_clipping.learning_rate or a target_quantile nearer to 0.5"
        )
    return norm
