"""``privtrain plan``: what a run will guarantee and cost, before any weight is loaded."""

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
from privtrain.data.corpus import load_corpus
from privtrain.errors import ConfigError, Fault
from privtrain.inputs import load_checked
from privtrain.job.advice import expected_units, expected_users, learning_rate_warnings, warnings
from privtrain.models.memory import LaunchLayout, ModelSize, model_size
from privtrain.privacy.banded import tried_bands
from privtrain.privacy.plan import PrivacyPlan, fast_accountant, finite
from privtrain.privacy.sampling import check_step_size

#: Points of the run at which the spent budget is shown.
_MILESTONES = (0.1, 0.25, 0.5, 0.75, 1.0)
#: Accountants whose answers are shown side by side; the fast ones that need no further package.
_COMPARED = ("tilted", "pld", "rdp", "aea3", "gdp")
#: Sampling schemes whose rounds are Poisson-sampled Gaussian mechanisms.
_PRICED = ("poisson", "cyclic_poisson")


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What the command line adds to a config.

    Attributes:
        num_users: users of a data set that is not at hand; nothing is read then.
        accelerate: accelerate config of the launch, for memory and the command to type.
        tokens_per_second: throughput of one rank, for the time that training takes.
        prices: whether to calculate the price list.
        num_ranks: processes of the launch, where they are not the accelerate config's.
        optimize: whether to choose batch, steps, records, bands and learning rate for a compute budget.
        user_draws: that budget in users drawn, with the configuration's records of each; ``None`` with ``hours``, or
            where the plan's own compute is the budget.
        hours: that budget in hours at ``tokens_per_second``.
        cluster: GPUs that a step is predicted for, such as ``8xh100``; a launch has as many processes.

    Raises:
        ConfigError: if that budget is not stated in full.
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
    """Return the plan with what can be said about it from config and data alone.

    Raises:
        ConfigError: with every fault of the config and its inputs.
    """
    options = options or PlanOptions()
    is_at_hand = options.num_users is None
    config = load_checked(config_path, overrides) if is_at_hand else load_config(config_path, overrides)
    layout = options.layout()
    plan = PrivacyPlan.build(config.privacy, config.training)
    population = _population(config, options.num_users)
    check_step_size(plan.scheme, population["expected_training_units"])
    prices = price_list(config.privacy, plan, config.training) if options.prices else []
    cost = _cost(config, plan, layout, options)
    num_trained = cost["num_trained_parameters"]
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
        "warnings": warnings(config, plan, population["expected_training_units"], population["expected_training_users"])
        + (learning_rate_warnings(config, plan, num_trained) if num_trained else []),
        "launch": (
            _launch_command(config_path, overrides, options)
            if plan.tuning is None
            else shlex.join(["privtrain", "tune", str(config_path), *overrides, "--try", "KEY=VALUE ..."])
        ),
    }


def _population(config: Config, num_users: int | None) -> dict[str, Any]:
    """Return the users and records, read from the data or, where these are elsewhere, as stated."""
    if num_users is not None:
        training_users = round(num_users * (1 - config.data.held_out_fraction))
        bound = config.privacy.records_per_user if config.privacy.unit == "example" else None
        return {
            "num_users": num_users,
            "num_records": None,
            # How many records users have is not known here; where they are the units, all are taken to have k.
            "expected_training_units": training_users * (bound or 1),
            "expected_training_users": training_users,
        }
    corpus = load_corpus(config.data, config.performance.index_dir)
    sizes = sorted(map(len, corpus.records.values())) or [0]
    bound = config.privacy.records_per_user or sizes[-1]
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
    """Return the bands of the noise, and the predicted noise of the weights relative to one band at the same ε."""
    if plan.strategy is None or not math.isfinite(plan.epsilon):
        return dict.fromkeys(("num_bands", "column_norm", "relative_noise_of_one_band", "relative_noise_of_late_step"))
    alone = _rebuilt(config.privacy, plan, config.training, num_bands=1)
    return {
        "num_bands": plan.strategy.num_bands,
        "column_norm": plan.column_norm,
        "relative_noise_of_one_band": plan.noise_of_run(config.training) / alone.noise_of_run(config.training),
        "relative_noise_of_late_step": plan.largest_step_noise / alone.largest_step_noise,
    }


def _accountants(plan: PrivacyPlan) -> list[dict[str, Any]]:
    """Return ε of the whole run by each accountant; a refusal stands in its row."""
    if plan.not_private_reasons or not plan.user_accounting.follows_from_event:
        return []
    event = plan.event_of_steps(plan.num_steps)
    if plan.tuning is not None:
        return [row.to_json() for row in compare(event, plan.delta, ["rdp"])]  # no other knows the choice of a run
    names = _COMPARED if plan.sampling in _PRICED else plan.scheme.accountants
    return [row.to_json() for row in compare(event, plan.delta, names)]


def _cost(config: Config, plan: PrivacyPlan, layout: LaunchLayout, options: PlanOptions) -> dict[str, Any]:
    """Return the memory of one rank, time, and how the largest possible signal compares with the noise."""
    try:
        size, problem = model_size(config, layout, 1 if plan.strategy is None else plan.strategy.num_bands), ""
    except ConfigError as error:
        size, problem = ModelSize(0, {}), str(error)
    noise = plan.fresh_noise_multiplier * size.num_trained**0.5
    tokens_per_step = plan.expected_batch_size * plan.records_per_unit * config.data.max_length
    seconds = None
    if options.tokens_per_second:
        seconds = plan.num_steps * tokens_per_step / (options.tokens_per_second * layout.num_ranks)
    return {
        "num_trained_parameters": size.num_trained or None,
        "largest_signal_to_noise": plan.expected_batch_size / noise if noise else None,
        "num_ranks": layout.num_ranks,
        "memory_bytes_per_rank": size.memory_bytes,
        "memory_unknown_because": problem,
        "most_tokens_per_step": round(tokens_per_step),
        "most_training_seconds": seconds,
    }


def _optimum(
    config: Config, layout: LaunchLayout, options: PlanOptions, num_units: float, num_trained: int | None
) -> dict[str, Any] | None:
    """Return the best plans for a compute budget, if they are asked for.

    Raises:
        ConfigError: if the model is not at hand, whose trained weights count.
    """
    if not options.optimize:
        return None
    if num_trained is None:
        raise ConfigError([Fault("model", "--optimize needs to count the trained weights, and it is not at hand")])
    privacy = config.privacy
    draws = record_draws_of(privacy)
    if options.user_draws is not None:
        draws = options.user_draws * records_in_step(privacy)
    if options.hours is not None:
        assert options.tokens_per_second is not None, "looked at first"
        num_tokens = options.hours * 3600 * options.tokens_per_second * layout.num_ranks
        draws = num_tokens / config.data.max_length
    return optimize(config, num_units, num_trained, draws).to_json(config)


def _launch_command(config_path: pathlib.Path, overrides: Sequence[str], options: PlanOptions) -> str:
    launcher = options.accelerate or pathlib.Path("launch/accelerate/cpu.yaml")
    words = ["accelerate", "launch"]
    if launcher.is_file():  # outside a checkout accelerate's own defaults stand
        words += ["--config_file", str(launcher)]
    if options.num_ranks is not None or options.cluster is not None:
        words += ["--num_processes", str(options.layout().num_ranks)]
    return shlex.join([*words, "-m", "privtrain", "train", str(config_path), *overrides])


@dataclasses.dataclass(frozen=True)
class Price:
    """One way to change the plan, with the noise that it then needs.

    Attributes:
        change: what is changed, in words.
        epsilon: certified ε of the changed plan.
        noise_multiplier: calibrated again.
        relative_noise: fresh noise on a coordinate of the mean gradient of a step, relative to the plan as it stands.
        relative_noise_of_run: predicted noise of the trained weights relative to the signal, if the mean gradient stays
            as it is (:meth:`~privtrain.privacy.plan.PrivacyPlan.noise_of_run`), relative to the plan as it stands.
    """

    change: str
    epsilon: float
    noise_multiplier: float
    relative_noise: float
    relative_noise_of_run: float


def price_list(privacy: PrivacySection, plan: PrivacyPlan, training: TrainingSection | None = None) -> list[Price]:
    """Return what changes of ε, batch, steps and bands cost in noise; some of them keep the compute.

    Empty where ε is infinite, and for samplers that are not Poisson's.

    Args:
        privacy: the section that the plan was built from.
        plan: the plan.
        training: whose optimizer the noise of a run is predicted for.
    """
    if privacy.sampling not in _PRICED or not math.isfinite(plan.epsilon) or plan.epsilon <= 0:
        return []
    noise_of_run = plan.noise_of_run(training)
    return [
        _price(change, privacy, plan, training, noise_of_run, **values)
        for change, values in _changes(privacy, plan).items()
        if 0 < values.get("sampling_prob", 1) <= 1
    ]


def _changes(privacy: PrivacySection, plan: PrivacyPlan) -> dict[str, dict[str, Any]]:
    """Return a row's title → the values of the plan that it changes."""
    return {
        "ε ÷ 2": {"target_epsilon": plan.epsilon / 2},
        "ε × 2": {"target_epsilon": plan.epsilon * 2},
        **{f"{_bands_text(b)}, same ε and compute": {"num_bands": b} for b in _other_bands(plan)},
        "batch ÷ 2, same ε": _batch(privacy, 0.5),
        "batch × 2, same ε": _batch(privacy, 2),
        "batch × 4, same ε": _batch(privacy, 4),
        **{
            f"batch × {factor}, steps ÷ {factor}, same ε and compute": {
                **_batch(privacy, factor),
                "num_steps": round(privacy.num_steps / factor),
            }
            for factor in (4, 16)
            if privacy.num_steps >= 4 * factor  # fewer steps train nothing
        },
        "steps ÷ 2, same ε": {"num_steps": max(1, privacy.num_steps // 2)},
        "steps × 2, same ε": {"num_steps": privacy.num_steps * 2},
    }


def _other_bands(plan: PrivacyPlan) -> list[int]:
    """Return the numbers of bands to compare with; none for plans that cannot have them."""
    if plan.auxiliary_sums or plan.user_accounting.how:
        return []
    tried = tried_bands(plan.num_steps, plan.sampling_prob)
    near = {max(b for b in tried if b <= wanted) for wanted in BANDS}
    return sorted(near - {1 if plan.strategy is None else plan.strategy.num_bands})


def _bands_text(num_bands: int) -> str:
    return "independent noise" if num_bands == 1 else f"noise of {num_bands} bands"


def _batch(privacy: PrivacySection, factor: float) -> dict[str, Any]:
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
    """Return the plan with ``values`` changed, as noise relative to the plan as it stands."""
    other = _rebuilt(privacy, plan, training, **values)
    relative = (other.noise_stddev / other.expected_batch_size) / (plan.noise_stddev / plan.expected_batch_size)
    of_run = other.noise_of_run(training) / noise_of_run
    return Price(change, other.epsilon, other.noise_multiplier, relative, of_run)


def _rebuilt(
    privacy: PrivacySection, plan: PrivacyPlan, training: TrainingSection | None, **values: Any
) -> PrivacyPlan:
    """Return the plan with some values changed and the noise calibrated again, with as many bands as then fit."""
    update = {
        "target_epsilon": plan.epsilon,
        "noise_multiplier": None,
        "accountant": fast_accountant(plan.accountant),
        **values,
    }
    num_bands = values.get("num_bands", 1 if plan.strategy is None else plan.strategy.num_bands)
    if num_bands > 1 or plan.strategy is not None:
        num_steps, prob = (update.get(key, getattr(privacy, key)) for key in ("num_steps", "sampling_prob"))
        fitting = max(b for b in {*tried_bands(num_steps, prob), num_bands} if _fits(b, num_bands, num_steps, prob))
        update |= {"noise": "banded", "sampling": "cyclic_poisson", "num_bands": fitting}
    return PrivacyPlan.build(privacy.model_copy(update=update), training)


def _fits(num_bands: int, wanted: int, num_steps: int, sampling_prob: float) -> bool:
    return num_bands <= wanted and num_steps % num_bands == 0 and num_bands * sampling_prob <= 1
