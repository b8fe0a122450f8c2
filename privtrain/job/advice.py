"""Warnings about valid but questionable plans."""

from __future__ import annotations

import math

from privtrain.config import Config
from privtrain.data.corpus import Corpus
from privtrain.privacy.plan import PrivacyPlan

#: Relative gap between expected batch size and sampling_prob times users that is worth a warning.
_BATCH_GAP = 0.25


def warnings(config: Config, plan: PrivacyPlan, num_units: float, num_users: float) -> list[str]:
    """Return warnings about a valid but questionable plan."""
    found = []
    num_protected = num_users if plan.guaranteed_unit == "user" else num_units
    if plan.delta >= 1 / max(num_protected, 1):
        found.append(
            f"privacy.target_delta={plan.delta:g} is not below 1/units = 1/{num_protected:.0f}: a mechanism that "
            "publishes one unit at random would pass; choose a smaller target_delta"
        )
    drawn = plan.sampling_prob * num_units
    if abs(drawn / plan.expected_batch_size - 1) > _BATCH_GAP:
        found.append(
            f"privacy.sampling_prob draws about {drawn:.1f} units a step but the sum is divided by "
            f"privacy.expected_batch_size={plan.expected_batch_size:g}: privacy is unaffected, the step size is not"
        )
    if config.privacy.target_epsilon is not None and config.privacy.target_epsilon > 10:
        found.append(f"privacy.target_epsilon={config.privacy.target_epsilon:g} is a weak guarantee on its own")
    return found


def expected_units(config: Config, corpus: Corpus) -> float:
    """Return the expected number of training units after the split, planted canaries included."""
    num_canaries, num_directions = config.canaries.num_users / 2, config.canaries.num_gradient_users / 2
    if config.privacy.unit == "user":
        return expected_users(config, corpus) + num_canaries + num_directions
    bound = config.privacy.records_per_user or math.inf
    num = sum(min(len(records), bound) for records in corpus.records.values())
    repetitions = [min(number, bound) for number in config.canaries.repetitions]
    num_of_canaries = num_canaries * sum(repetitions) / len(repetitions) + num_directions
    return num * (1 - config.data.held_out_fraction) + num_of_canaries


def expected_users(config: Config, corpus: Corpus) -> float:
    """Return the expected number of training users after the split, without canaries."""
    return len(corpus.records) * (1 - config.data.held_out_fraction)
