"""Values of the plan to start from, by the number of users: for ``privtrain init`` and ``privtrain from``."""

from __future__ import annotations

import math
from typing import Any

_EPSILON = 8.0
#: How often a user takes part, on average; noise grows with its square root.
_PARTICIPATIONS = 10
_STEPS = (20, 3000)


def rounded(num_users: int) -> int:
    """Return a number of users to one digit, downwards: what is published of it should be no more exact."""
    scale = 10 ** (len(str(num_users)) - 1)
    return max(1, num_users // scale * scale)


def plan_for(num_users: int, held_out_fraction: float) -> dict[str, Any]:
    """Return the keys of ``privacy`` for this many users.

    The batch grows with the square root of the number of users, so that noise per step and number of steps fall
    together; δ is a tenth of 1 / users or less.

    Args:
        num_users: a public number; the batch tells it.
        held_out_fraction: share that is not trained on.
    """
    num_training = max(1.0, num_users * (1 - held_out_fraction))
    batch = min(num_training, max(1.0, 2 * math.sqrt(num_training)))
    prob = float(f"{batch / num_training:.2g}")
    fewest, most = _STEPS
    return {
        "sampling_prob": prob,
        "expected_batch_size": float(f"{prob * num_training:.3g}"),
        "target_epsilon": _EPSILON,
        "target_delta": 10.0 ** -math.ceil(math.log10(10 * num_training)),
        "num_steps": min(most, max(fewest, round(_PARTICIPATIONS / prob))),
    }
