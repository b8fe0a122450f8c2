"""``privtrain plan``: what a run will guarantee and cost, before any weight is loaded.

The answer is one dictionary, which is printed as JSON or by :mod:`privtrain.commands.plan_view` for people. Words: a
unit is what is sampled and clipped (a user or a record); k is the most records of a user that count; the bands are the
number of consecutive steps over which correlated noise cancels (1: independent noise in each step).
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from accountants.comparison import compare
from privtrain.commands.cluster import Cluster
from privtrain.commands.cluster_advice import describe_cluster
from privtrain.commands.optimize import BANDS, optimize, record_draws_of, records_in_step
from privtrain.config import Config, load_config
from privtrain.config.privacy import PrivacySection
from privtrain.config.training import TrainingSection
from privtrain.data.corpus import Corpus, load_corpus
from privtrain.errors import ConfigError, Fault
from privtrain.inputs import load_checked
from privtrain.job.advice import attack_warnings, expected_units, expected_users, learning_rate_warnings, warnings
from privtrain.models.memory import LaunchLayout, ModelSize, model_size
from privtrain.privacy.banded import tried_bands
from privtrain.privacy.plan import PrivacyPlan, fast_accountant, finite
from privtrain.privacy.sampling import check_step_size

#: Shares of the run's steps after which the ε spent so far is shown.
_MILESTONES = (0.1, 0.25, 0.5, 0.75, 1.0)
#: Accountants whose answers are shown side by side; the fast ones that need no further package.
_COMPARED = ("tilted", "pld", "rdp", "aea3", "gdp")
#: Sampling schemes in which each unit joins by a coin of its own, so that batch and steps can be varied freely; only
#: for these changes of the plan are priced, and accountants compared.
_PRICED = ("poisson", "cyclic_poisson")


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What the command line adds to a config.

    Attributes:
        num_users: users of a data set that is not at hand; no data are read then. ``None``: the data are read.
        accelerate: accelerate config of the launch, for memory and the command to type.
        tokens_per_second: throughput of one rank, for the time that training takes.
        prices: whether to calculate the price list: what changes of the plan cost in noise.
        num_ranks: processes of the launch; ``None``: as many as the accelerate config says.
        optimize: whether to choose batch, steps, records, bands and learning rate for a compute budget.
        user_draws: the compute budget of ``optimize``, in users drawn over all steps, each with as many records as
            configured. Without it and ``hours``, the budget is the compute of the plan as it stands.
        hours: the compute budget of ``optimize``, in hours at ``tokens_per_second``.
        cluster: GPUs that a step is predicted for, such as ``8xh100``; the launch then has a process for each.

    Raises:
        ConfigError: if options are given that need others, or exclude one another.
    """

    num_users: int | None = None
    accelerate: pathlib.Path | None = None
    tokens_per_second: float | None = None
    prices: bool = True
    num_ranks: int | None = None
    optimize: bool = False
    user_draws: float | None = None
    hours: float | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        budget = "--user-draws, --hours"
        if not self.optimize and (self.user_draws is not None or self.hours is not None):
            raise ConfigError([Fault(budget, "are the compute budget of --optimize; give it too")])
        if self.user_draws is not None and self.hours is not None:
            raise ConfigError([Fault(budget, "give one of the two")])
        if self.hours is not None and self.tokens_per_second is None:
            raise ConfigError([Fault("--hours", "needs --tokens-per-second, the throughput of one rank")])
        if self.cluster is not None and self.num_ranks is not None:
            raise ConfigError([Fault("--num-ranks", "give it or --cluster, which says how many GPUs there are")])

    def layout(self) -> LaunchLayout:
        """Return how the launch divides the model."""
        layout = LaunchLayout() if self.accelerate is None else LaunchLayout.from_accelerate(self.accelerate)
        num_ranks = self.num_ranks if self.cluster is None else Cluster.parse(self.cluster).num_ranks
        return layout if num_ranks is None else dataclasses.replace(layout, num_ranks=num_ranks)


def describe_plan(
    config_path: pathlib.Path, overrides: Sequence[str], options: PlanOptions | None = None
) -> dict[str, Any]:
    """Return the plan with what can be said about it from config and data alone, ready for JSON.

    Args:
        config_path: YAML file of the run.
        overrides: dotted assignments such as ``privacy.num_steps=500``.
        options: what the command line adds.

    Raises:
        ConfigError: with every fault of the config and its inputs.
    """
    options = options or PlanOptions()
    # With a stated number of users neither data nor model need be here, so only the configuration is checked.
    reads_data = options.num_users is None
    config = load_checked(config_path, overrides) if reads_data else load_config(config_path, overrides)
    layout = options.layout()
    plan = PrivacyPlan.build(config.privacy, config.training)
    corpus = load_corpus(config.data, config.performance.index_dir) if reads_data else None
    population = _population(config, corpus, options.num_users)
    check_step_size(plan.scheme, population["expected_training_units"])
    prices = price_list(config.privacy, plan, config.training) if options.prices else []
    cost = _cost(config, plan, layout, options)
    num_trained = cost["num_trained_parameters"]
    advice = warnings(config, plan, population["expected_training_units"], population["expected_training_users"])
    if corpus is not None:
        advice += attack_warnings(config, corpus)
    if num_trained:  # None where the model is not at hand
        advice += learning_rate_warnings(config, plan, num_trained)
    return {
        "run": str(config.run.directory),
        **population,
        **_guarantee(plan),
        **_correlation(config, plan),
        "accountants": _accountants(plan),
        "prices": [dataclasses.asdict(price) for price in prices],
        **cost,
        "cluster": None if options.cluster is None else describe_cluster(config, plan, layout, options.cluster),
        "optimum": _optimum(config, layout, options, population["expected_training_units"], num_trained),
        "not_private_reasons": list(plan.not_private_reasons),
        "warnings": advice,
        "launch": _launch_command(config_path, overrides, options, is_tuning=plan.tuning is not None),
    }


def _population(config: Config, corpus: Corpus | None, num_users: int | None) -> dict[str, Any]:
    """Return how many users and records there are, by key of the answer.

    Args:
        config: the configuration.
        corpus: the data, unless they are not at hand.
        num_users: users of data that are not at hand.
    """
    if corpus is None:
        assert num_users is not None
        training_users = round(num_users * (1 - config.data.held_out_fraction))
        bound = config.privacy.records_per_user if config.privacy.unit == "example" else None
        return {
            "num_users": num_users,
            "num_records": None,
            # How many records users have is not known here; where records are the units, all users are taken to have k.
            "expected_training_units": training_users * (bound or 1),
            "expected_training_users": training_users,
        }
    sizes = sorted(map(len, corpus.records.values())) or [0]  # records of each user
    bound = config.privacy.records_per_user or sizes[-1]  # k; None: all records of a user count
    return {
        "num_users": len(corpus.records),
        "num_records": corpus.num_records,
        "rows_without_user": corpus.counts.num_without_user,
        "rows_empty": corpus.counts.num_empty,
        "records_of_median_user": sizes[len(sizes) // 2],
        "records_of_largest_user": sizes[-1],
        "users_above_bound": sum(size > bound for size in sizes),
        "records_within_bound": sum(min(size, bound) for size in sizes),
        "expected_training_units": round(expected_units(config, corpus)),
        "expected_training_users": round(expected_users(config, corpus)),
        "rows_duplicate": corpus.counts.num_duplicates,
    }


def _guarantee(plan: PrivacyPlan) -> dict[str, Any]:
    """Return what the plan promises and how, by key of the answer; an infinite ε is None, as in JSON."""
    steps = sorted({max(1, round(share * plan.num_steps)) for share in _MILESTONES})
    return {
        "unit": plan.guaranteed_unit,
        "sampled_unit": plan.unit,
        "user_accounting": plan.user_accounting.name,
        "records_per_user_in_training_set": plan.records_per_user,
        "selection": plan.selection,
        "tuning": None if plan.tuning is None else dataclasses.asdict(plan.tuning),
        "records_per_unit": plan.records_per_unit,
        "neighboring_relation": plan.neighboring_relation,
        "sampling": plan.sampling,
        "sampling_prob": plan.sampling_prob,
        "expected_batch_size": plan.expected_batch_size,
        "num_steps": plan.num_steps,
        "expected_steps_per_unit": round(plan.num_steps * plan.sampling_prob, 2),
        "clipping_norm": plan.clipping_norm,
        "clipping_style": plan.clipping_style,
        "gradient_noise_multiplier": plan.gradient_noise_multiplier,
        "noised_metrics": plan.metric_stddevs,
        "noise_multiplier": plan.noise_multiplier,
        "noise_stddev_of_mean": plan.noise_stddev / plan.expected_batch_size,
        "accountant": plan.accountant,
        "epsilon": finite(plan.epsilon),
        "delta": plan.delta,
        "epsilon_after_steps": {str(n): finite(plan.epsilon_after(n)) for n in steps},
    }


def _correlation(config: Config, plan: PrivacyPlan) -> dict[str, Any]:
    """Return the bands of correlated noise, and its size relative to independent noise at the same ε.

    ``relative_noise_of_one_band`` compares the predicted noise in the trained weights, ``relative_noise_of_late_step``
    that of a single step. All are None where noise is independent.
    """
    if plan.strategy is None or not math.isfinite(plan.epsilon):
        return dict.fromkeys(("num_bands", "column_norm", "relative_noise_of_one_band", "relative_noise_of_late_step"))
    independent = _rebuilt(config.privacy, plan, config.training, num_bands=1)
    return {
        "num_bands": plan.strategy.num_bands,
        "column_norm": plan.column_norm,
        "relative_noise_of_one_band": plan.noise_of_run(config.training) / independent.noise_of_run(config.training),
        "relative_noise_of_late_step": plan.largest_step_noise / independent.largest_step_noise,
    }


def _accountants(plan: PrivacyPlan) -> list[dict[str, Any]]:
    """Return a row with the ε of the whole run for each accountant; one that cannot answer says so in its row.

    Empty where there is no ε, or where ε is not an accountant's own answer (group privacy derives it from that for one
    record).
    """
    if plan.not_private_reasons or not plan.user_accounting.follows_from_event:
        return []
    event = plan.event_of_steps(plan.num_steps)
    if plan.tuning is not None:  # only RDP can account for choosing the best of several trials
        return [row.to_json() for row in compare(event, plan.delta, ["rdp"])]
    # Most accountants know Poisson sampling alone; another scheme names those that know it.
    names = _COMPARED if plan.sampling in _PRICED else plan.scheme.accountants
    return [row.to_json() for row in compare(event, plan.delta, names)]


def _cost(config: Config, plan: PrivacyPlan, layout: LaunchLayout, options: PlanOptions) -> dict[str, Any]:
    """Return the memory of one rank, the time, and the largest possible signal of a step over the norm of its noise."""
    num_bands = 1 if plan.strategy is None else plan.strategy.num_bands
    try:
        size, problem = model_size(config, layout, num_bands), ""
    except ConfigError as error:
        if any(fault.path.startswith("lora.") for fault in error.faults):  # wrong for this model, as training will say
            raise
        # The plan is still worth showing where the model is not at hand.
        size, problem = ModelSize(0, {}), str(error)
    # Both relative to the clipping norm: noise is independent on every coordinate, and the sum is largest if all units
    # of a batch agree.
    noise_norm = plan.fresh_noise_multiplier * size.num_trained**0.5
    tokens_per_step = plan.expected_batch_size * plan.records_per_unit * config.data.max_length
    seconds = None
    if options.tokens_per_second:
        seconds = plan.num_steps * tokens_per_step / (options.tokens_per_second * layout.num_ranks)
    return {
        "num_trained_parameters": size.num_trained or None,
        "largest_signal_to_noise": plan.expected_batch_size / noise_norm if noise_norm else None,
        "num_ranks": layout.num_ranks,
        "memory_bytes_per_rank": size.memory_bytes,
        "memory_unknown_because": problem,
        "most_tokens_per_step": round(tokens_per_step),
        "most_training_seconds": seconds,
    }


def _optimum(
    config: Config, layout: LaunchLayout, options: PlanOptions, num_units: float, num_trained: int | None
) -> dict[str, Any] | None:
    """Return the best plans for a compute budget, if the options ask for them.

    Args:
        config: the configuration.
        layout: how the launch divides the model; ``hours`` are those of all its ranks.
        options: they state the budget.
        num_units: units that are trained on.
        num_trained: trained weights; None if the model is not at hand.

    Raises:
        ConfigError: if ``num_trained`` is None.
    """
    if not options.optimize:
        return None
    if num_trained is None:
        raise ConfigError([Fault("model", "--optimize needs to count the trained weights, and it is not at hand")])
    privacy = config.privacy
    # The budget: records that pass through the model over all steps.
    record_draws = record_draws_of(privacy)
    if options.user_draws is not None:
        record_draws = options.user_draws * records_in_step(privacy)
    if options.hours is not None:
        assert options.tokens_per_second is not None, "PlanOptions demands it"
        num_tokens = options.hours * 3600 * options.tokens_per_second * layout.num_ranks
        record_draws = num_tokens / config.data.max_length
    return optimize(config, num_units, num_trained, record_draws).to_json(config)


def _launch_command(
    config_path: pathlib.Path, overrides: Sequence[str], options: PlanOptions, *, is_tuning: bool
) -> str:
    """Return the command to type that starts this training, or this choice of the best of several trials."""
    if is_tuning:  # takes one process, and no launcher
        return shlex.join(["privtrain", "tune", str(config_path), *overrides, "--try", "KEY=VALUE ..."])
    launcher = options.accelerate or pathlib.Path("launch/accelerate/cpu.yaml")
    words = ["accelerate", "launch"]
    if launcher.is_file():  # outside a checkout accelerate's own defaults stand
        words += ["--config_file", str(launcher)]
    if options.num_ranks is not None or options.cluster is not None:
        words += ["--num_processes", str(options.layout().num_ranks)]
    return shlex.join([*words, "-m", "privtrain", "train", str(config_path), *overrides])


@dataclasses.dataclass(frozen=True)
class Price:
    """A row of the price list: one change of the plan, with the noise that the changed plan needs.

    Attributes:
        change: what is changed, in words.
        epsilon: certified ε of the changed plan.
        noise_multiplier: calibrated again.
        relative_noise: fresh noise on a coordinate of a step's mean gradient, as a multiple of that of the plan as it
            stands: below 1 is better.
        relative_noise_of_run: predicted noise over signal in the trained weights, if the mean gradient stays as it is
            (:meth:`~privtrain.privacy.plan.PrivacyPlan.noise_of_run`), as a multiple of that of the plan as it stands.
    """

    change: str
    epsilon: float
    noise_multiplier: float
    relative_noise: float
    relative_noise_of_run: float


def price_list(privacy: PrivacySection, plan: PrivacyPlan, training: TrainingSection | None = None) -> list[Price]:
    """Return what changes of ε, batch, steps and bands cost in noise, a row for each change.

    Empty where ε is infinite, and for samplers that are not Poisson's.

    Args:
        privacy: the section that the plan was built from.
        plan: the plan.
        training: its optimizer decides what noise of single steps amounts to in the trained weights.
    """
    if privacy.sampling not in _PRICED or not math.isfinite(plan.epsilon) or plan.epsilon <= 0:
        return []
    noise_of_run = plan.noise_of_run(training)
    return [
        _price(change, privacy, plan, training, noise_of_run, **values)
        for change, values in _changes(privacy, plan).items()
        if 0 < values.get("sampling_prob", 1) <= 1  # a larger batch than all units is no plan
    ]


def _changes(privacy: PrivacySection, plan: PrivacyPlan) -> dict[str, dict[str, Any]]:
    """Return what is changed, in words → keys of the ``privacy`` section with their new values."""
    changes: dict[str, dict[str, Any]] = {
        "ε ÷ 2": {"target_epsilon": plan.epsilon / 2},
        "ε × 2": {"target_epsilon": plan.epsilon * 2},
    }
    for num_bands in _other_bands(plan):
        changes[f"{_bands_text(num_bands)}, same ε and compute"] = {"num_bands": num_bands}
    changes["batch ÷ 2, same ε"] = _batch(privacy, 0.5)
    changes["batch × 2, same ε"] = _batch(privacy, 2)
    changes["batch × 4, same ε"] = _batch(privacy, 4)
    for factor in (4, 16):
        if privacy.num_steps >= 4 * factor:  # fewer than four steps train nothing
            change = f"batch × {factor}, steps ÷ {factor}, same ε and compute"
            changes[change] = {**_batch(privacy, factor), "num_steps": round(privacy.num_steps / factor)}
    changes["steps ÷ 2, same ε"] = {"num_steps": max(1, privacy.num_steps // 2)}
    changes["steps × 2, same ε"] = {"num_steps": privacy.num_steps * 2}
    return changes


def _other_bands(plan: PrivacyPlan) -> list[int]:
    """Return the numbers of bands to compare the plan with: for each of ``BANDS`` the largest possible up to it.

    None for plans whose noise cannot be correlated: with sums released beside the gradient, or where ε for users is
    derived from records that are sampled.
    """
    if plan.auxiliary_sums or plan.user_accounting.how:
        return []
    possible = tried_bands(plan.num_steps, plan.sampling_prob)
    others: set[int] = set()
    for wanted in BANDS:
        others.add(max(num_bands for num_bands in possible if num_bands <= wanted))
    current = 1 if plan.strategy is None else plan.strategy.num_bands
    return sorted(others - {current})


def _bands_text(num_bands: int) -> str:
    """Return the noise of so many bands in words."""
    return "independent noise" if num_bands == 1 else f"noise of {num_bands} bands"


def _batch(privacy: PrivacySection, factor: float) -> dict[str, Any]:
    """Return the keys of ``privacy`` that make the expected batch ``factor`` times as large."""
    assert privacy.sampling_prob is not None, "Poisson sampling has it"
    return {
        "sampling_prob": privacy.sampling_prob * factor,
        "expected_batch_size": privacy.expected_batch_size * factor,
    }


def _price(
    change: str,
    privacy: PrivacySection,
    plan: PrivacyPlan,
    training: TrainingSection | None,
    noise_of_run: float,
    **values: Any,
) -> Price:
    """Return the row of the price list for one change.

    Args:
        change: what is changed, in words.
        privacy: the section that the plan was built from.
        plan: the plan as it stands.
        training: its optimizer decides what noise of single steps amounts to in the trained weights.
        noise_of_run: of the plan as it stands.
        **values: keys of ``privacy`` with their new values.
    """
    changed = _rebuilt(privacy, plan, training, **values)
    noise_of_mean = changed.noise_stddev / changed.expected_batch_size
    noise_of_mean_now = plan.noise_stddev / plan.expected_batch_size
    return Price(
        change=change,
        epsilon=changed.epsilon,
        noise_multiplier=changed.noise_multiplier,
        relative_noise=noise_of_mean / noise_of_mean_now,
        relative_noise_of_run=changed.noise_of_run(training) / noise_of_run,
    )


def _rebuilt(
    privacy: PrivacySection, plan: PrivacyPlan, training: TrainingSection | None, **values: Any
) -> PrivacyPlan:
    """Return the plan with some keys of ``privacy`` changed, and the noise calibrated again.

    It keeps the plan's ε unless ``values`` hold another, and its number of bands as far as the changed steps and
    sampling allow.
    """
    update = {
        "target_epsilon": plan.epsilon,
        "noise_multiplier": None,
        "accountant": fast_accountant(plan.accountant),
        **values,
    }
    wanted_bands = values.get("num_bands", 1 if plan.strategy is None else plan.strategy.num_bands)
    if wanted_bands > 1 or plan.strategy is not None:
        num_steps = values.get("num_steps", privacy.num_steps)
        prob = values.get("sampling_prob", privacy.sampling_prob)
        candidates = {*tried_bands(num_steps, prob), wanted_bands}
        fitting = max(bands for bands in candidates if bands <= wanted_bands and _fits(bands, num_steps, prob))
        update |= {"noise": "banded", "sampling": "cyclic_poisson", "num_bands": fitting}
    return PrivacyPlan.build(privacy.model_copy(update=update), training)


def _fits(num_bands: int, num_steps: int, sampling_prob: float) -> bool:
    """Return whether bands divide the steps; with b bands, users are split into b groups that are sampled in turn.

    A user of the group whose turn it is joins with b times the sampling probability, which must be at most 1.
    """
    return num_steps % num_bands == 0 and num_bands * sampling_prob <= 1
