"""A privacy plan to start from, by the number of users: for ``privtrain init`` and ``privtrain from``."""

from __future__ import annotations

import math
from typing import Any

_EPSILON = 8.0
#: In how many steps a user takes part, on average; noise at a fixed ε grows with the square root of this.
_PARTICIPATIONS = 10
#: Fewest and most steps.
_STEPS = (20, 3000)


def rounded(num_users: int) -> int:
    """Round a number of users down to one digit (4,711 → 4,000), since the plan made for it is published."""
    scale = 10 ** (len(str(num_users)) - 1)
    return max(1, num_users // scale * scale)


def plan_for(num_users: int, held_out_fraction: float) -> dict[str, Any]:
    """Return the keys of ``privacy`` for this many users.

    The batch is twice the square root of the number of users: more users mean larger batches, whose noise counts for
    less, and more steps. δ is a power of ten, at most a tenth of 1 / users.

    Args:
        num_users: a public number; the batch tells it.
        held_out_fraction: share of the users that is not trained on.
    """
    num_training = max(1.0, num_users * (1 - held_out_fraction))
    batch = min(num_training, max(1.0, 2 * math.sqrt(num_training)))
    prob = float(f"{batch / num_training:.2g}")  # two digits, for a configuration that is easy to read
    fewest, most = _STEPS
    return {
        "sampling_prob": prob,
        "expected_batch_size": float(f"{prob * num_training:.3g}"),
        "target_epsilon": _EPSILON,
        "target_delta": 10.0 ** -math.ceil(math.log10(10 * num_training)),
        "num_steps": min(most, max(fewest, round(_PARTICIPATIONS / prob))),
    }
