"""The price list: what ε, batch and steps trade for one another around a plan."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from privtrain.config.schema import PrivacySection
from privtrain.privacy.plan import PrivacyPlan


@dataclasses.dataclass(frozen=True)
class Price:
    """One way to change the plan, with the noise that it then needs.

    Attributes:
        change: what is changed, in words.
        epsilon: certified ε of the changed plan.
        noise_multiplier: calibrated again.
        relative_noise: noise on a coordinate of the mean gradient, relative to the plan as it stands.
    """

    change: str
    epsilon: float
    noise_multiplier: float
    relative_noise: float


def price_list(privacy: PrivacySection, plan: PrivacyPlan) -> list[Price]:
    """Noise for half and double ε, batch and steps; empty where ε is infinite, and for other samplers than Poisson.

    Args:
        privacy: the section that the plan was built from.
        plan: the plan.
    """
    if privacy.sampling != "poisson" or not math.isfinite(plan.epsilon) or plan.epsilon <= 0:
        return []
    return [
        _price(change, privacy, plan, **values)
        for change, values in _changes(privacy, plan.epsilon).items()
        if 0 < values.get("sampling_prob", 1) <= 1
    ]


def _changes(privacy: PrivacySection, epsilon: float) -> dict[str, dict[str, Any]]:
    return {
        "ε ÷ 2": {"target_epsilon": epsilon / 2},
        "ε × 2": {"target_epsilon": epsilon * 2},
        "batch ÷ 2, same ε": _batch(privacy, 0.5),
        "batch × 2, same ε": _batch(privacy, 2),
        "batch × 4, same ε": _batch(privacy, 4),
        "steps ÷ 2, same ε": {"num_steps": max(1, privacy.num_steps // 2)},
        "steps × 2, same ε": {"num_steps": privacy.num_steps * 2},
    }


def _batch(privacy: PrivacySection, factor: float) -> dict[str, Any]:
    assert privacy.sampling_prob is not None, "Poisson sampling has it"
    return {
        "sampling_prob": privacy.sampling_prob * factor,
        "expected_batch_size": privacy.expected_batch_size * factor,
    }


def _price(change: str, privacy: PrivacySection, plan: PrivacyPlan, **values: Any) -> Price:
    update = {"target_epsilon": plan.epsilon, "noise_multiplier": None, **values}
    if plan.accountant == "pld":
        update["accountant"] = "tilted"  # as certified, and several times faster
    other = PrivacyPlan.build(privacy.model_copy(update=update))
    relative = (other.noise_stddev / other.expected_batch_size) / (plan.noise_stddev / plan.expected_batch_size)
    return Price(change, other.epsilon, other.noise_multiplier, relative)
