"""Warnings about valid but questionable plans."""

from __future__ import annotations

import math
import statistics

from privtrain.config import Config
from privtrain.config.model import LoraSection, PromptSection
from privtrain.config.training import TrainingSection
from privtrain.data.corpus import Corpus
from privtrain.privacy import noise_law
from privtrain.privacy.plan import PrivacyPlan

#: Relative gap between expected batch size and sampling_prob times units that is worth a warning.
_BATCH_GAP = 0.25
#: Factor between learning rates that is worth a warning: within it, small trainings lost little.
_RATE_FACTOR = 4.0
#: Most trained weights for which the law recommends a rate: it was measured on models of width 128 to 600, and wider
#: models need smaller rates than it says.
MOST_TRAINED = 1_000_000
#: Users with enough records for the attack job, below which a warning is worth while.
_FEW_ATTACKED = 20
#: Mean learning rate over its first one, where it decays linearly to zero.
_MEAN_OF_DECAY = 0.5


def warnings(config: Config, plan: PrivacyPlan, num_units: float, num_users: float) -> list[str]:
    """Return warnings about a valid but questionable plan.

    Args:
        config: the run's.
        plan: the run's.
        num_units: expected number of units (users or records, by ``privacy.unit``) that are trained on.
        num_users: expected number of users that are trained on.
    """
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
            f"privacy.expected_batch_size={plan.expected_batch_size:g}: privacy is unaffected, the step size is not. "
            f"Set privacy.expected_batch_size={drawn:.2g}"
        )
    if config.privacy.target_epsilon is not None and config.privacy.target_epsilon > 10:
        messages.append(f"privacy.target_epsilon={config.privacy.target_epsilon:g} is a weak guarantee on its own")
    if config.training.num_warmup_steps > plan.num_steps:
        messages.append(
            f"training.num_warmup_steps={config.training.num_warmup_steps} exceeds num_steps={plan.num_steps}: "
            "training.learning_rate is never reached"
        )
    method = config.training.method
    if method != "lora" and config.lora != LoraSection():
        messages.append(f"the keys under lora are not read: training.method is {method}")
    if not config.training.has_virtual_tokens and config.prompt != PromptSection():
        messages.append(f"the keys under prompt are not read: training.method is {method}")
    return messages


def recommended_learning_rate(config: Config, plan: PrivacyPlan, num_trained: int) -> float:
    """Return AdamW's learning rate by :mod:`privtrain.privacy.noise_law`: by steps, noise and rank, never by data.

    The law was measured under a linear decay. Under another schedule the rate is such that its mean over the steps is
    the mean of the law's.

    Args:
        config: the run's, with its schedule and LoRA's rank.
        plan: the run's.
        num_trained: trained weights of the model.
    """
    return law_learning_rate(law_point(config, plan, num_trained), config.training)


def law_point(config: Config, plan: PrivacyPlan, num_trained: int) -> noise_law.Point:
    """Return a plan as :mod:`privtrain.privacy.noise_law` sees it; arguments as for the recommended rate."""
    return noise_law.Point(
        num_steps=plan.num_steps,
        relative_noise=plan.noise_of_run(config.training) * math.sqrt(num_trained),
        records_per_user=plan.records_per_unit,
        rank=config.lora.rank,
        noise_kept=plan.noise_kept(config.training),
    )


def law_learning_rate(point: noise_law.Point, training: TrainingSection) -> float:
    """Return the law's rate at a point, with the mean over the steps that it has under a linear decay."""
    num_steps = point.num_steps
    factors = [training.learning_rate_at(step, num_steps) / training.learning_rate for step in range(num_steps)]
    mean_factor = sum(factors) / num_steps
    return noise_law.fitted().learning_rate(point) * _MEAN_OF_DECAY / mean_factor


def learning_rate_warnings(config: Config, plan: PrivacyPlan, num_trained: int) -> list[str]:
    """Return a warning if the learning rate is far from :func:`recommended_learning_rate`, otherwise nothing.

    Only for LoRA on texts, which is what the recommendation was measured on.
    """
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


def attack_warnings(config: Config, corpus: Corpus) -> list[str]:
    """Return a warning if hardly a user has enough records for the attack job, which is told only after training."""
    data = config.data
    if data.is_classification or data.attack_fraction == 0:  # attacks score no classifier; none is wanted
        return []
    if config.privacy.unit == "example":  # each record has a coin of its own
        return []
    num_attackable, sizes = 0, []  # records of each user
    for records in corpus.records.values():  # of ten million users on disk, most often the first few are enough
        sizes.append(len(records))
        num_attackable += sizes[-1] >= data.attack_min_records
        if num_attackable == _FEW_ATTACKED:
            return []
    found = f"{num_attackable} users have data.attack_min_records={data.attack_min_records} records or more: "
    median = statistics.median_low(sizes)
    if median == 1 or max(2, median) >= data.attack_min_records:
        return [f"{found}the attack job will find little or nothing to score, since users have too few records"]
    return [
        f"{found}the attack job will find little or nothing to score. If the run is to be attacked, set "
        f"data.attack_min_records={max(2, median)} before training; of each such user a record or more is set aside"
    ]


def expected_units(config: Config, corpus: Corpus) -> float:
    """Return the expected number of training units after the split, planted canaries included."""
    # A fair coin holds half of the planted users out.
    num_canaries, num_gradient_canaries = config.canaries.num_users / 2, config.canaries.num_gradient_users / 2
    if config.privacy.unit == "user":
        return expected_users(config, corpus) + num_canaries + num_gradient_canaries
    most_per_user = config.privacy.records_per_user or math.inf
    num_records = sum(min(len(records), most_per_user) for records in corpus.records.values())
    # The canaries take the numbers of repetitions in turn, so on average each has their mean.
    repetitions = [min(number, most_per_user) for number in config.canaries.repetitions]
    records_per_canary = sum(repetitions) / len(repetitions)
    num_planted = num_canaries * records_per_canary + num_gradient_canaries
    return num_records * (1 - config.data.held_out_fraction) + num_planted


def expected_users(config: Config, corpus: Corpus) -> float:
    """Return the expected number of training users after the split, without canaries."""
    return len(corpus.records) * (1 - config.data.held_out_fraction)
