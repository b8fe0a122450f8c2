"""Warnings about valid but questionable plans."""

from __future__ import annotations

import math

from privtrain.config import Config
from privtrain.data.corpus import Corpus
from privtrain.privacy import noise_law
from privtrain.privacy.plan import PrivacyPlan

#: Relative gap between expected batch size and sampling_prob times users that is worth a warning.
_BATCH_GAP = 0.25
#: Factor between learning rates that is worth a warning: within it, small trainings lost little.
_RATE_FACTOR = 4.0
#: Trained weights up to which the law's rate is a rate: it knows models of width 128 to 600, and wider ones like less.
MOST_TRAINED = 1_000_000
#: Mean of a rate that decays linearly to zero, over its first.
_MEAN_OF_DECAY = 0.5


def warnings(config: Config, plan: PrivacyPlan, num_units: float, num_users: float) -> list[str]:
    """Return warnings about a valid but questionable plan."""
    messages = []
    num_protected = num_users if plan.guaranteed_unit == "user" else num_units
    if plan.delta >= 1 / max(num_protected, 1):
        messages.append(
            f"privacy.target_delta={plan.delta:g} is not below 1/units = 1/{num_protected:.0f}: a mechanism that "
            "publishes one unit at random would pass; choose a smaller target_delta"
        )
    drawn = plan.sampling_prob * num_units
    if abs(drawn / plan.expected_batch_size - 1) > _BATCH_GAP:
        messages.append(
            f"privacy.sampling_prob draws about {drawn:.1f} units a step but the sum is divided by "
            f"privacy.expected_batch_size={plan.expected_batch_size:g}: privacy is unaffected, the step size is not"
        )
    if config.privacy.target_epsilon is not None and config.privacy.target_epsilon > 10:
        messages.append(f"privacy.target_epsilon={config.privacy.target_epsilon:g} is a weak guarantee on its own")
    if config.training.num_warmup_steps > plan.num_steps:
        messages.append(
            f"training.num_warmup_steps={config.training.num_warmup_steps} exceeds num_steps={plan.num_steps}: "
            "training.learning_rate is never reached"
        )
    return messages


def recommended_learning_rate(config: Config, plan: PrivacyPlan, num_trained: int) -> float:
    """Return AdamW's learning rate by :mod:`privtrain.privacy.noise_law`: by steps, noise and rank, never by data.

    The law was measured under a linear decay; a schedule that does not decay gets the same mean rate.
    """
    training, num_steps = config.training, plan.num_steps
    noise = plan.noise_of_run(training) * math.sqrt(num_trained)
    kept = plan.noise_kept(training)
    point = noise_law.Point(num_steps, noise, plan.records_per_unit, config.lora.rank, kept)
    factors = [training.learning_rate_at(step, num_steps) / training.learning_rate for step in range(num_steps)]
    return noise_law.fitted().learning_rate(point) * _MEAN_OF_DECAY / (sum(factors) / num_steps)


def learning_rate_warnings(config: Config, plan: PrivacyPlan, num_trained: int) -> list[str]:
    """Return a warning if the learning rate is far from what small trainings liked; for LoRA, which was measured."""
    if config.training.method != "lora" or config.data.is_classification or num_trained > MOST_TRAINED:
        return []
    rate, given = recommended_learning_rate(config, plan, num_trained), config.training.learning_rate
    if 1 / _RATE_FACTOR <= given / rate <= _RATE_FACTOR:
        return []
    side, factor = ("below", rate / given) if given < rate else ("above", given / rate)
    return [
        f"training.learning_rate={given:g} is {side} what small trainings with as many steps, as much noise and this "
        f"rank liked, by a factor of {factor:.0f}: about {rate:.1g}"
    ]


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
