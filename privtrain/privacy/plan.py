"""The privacy plan: one frozen value that holds everything the guarantee depends on, and nothing else.

Made from the config before any process group exists, calibrated by :mod:`accountants`, and passed whole to the trainer.
``sampling_prob``, ``expected_batch_size`` and ``delta`` are constants of the plan; none is ever computed from the data
of a step or from the number of users, so neighbouring data sets have the same plan.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

import accountants
from accountants.tuning import tuning_event
from privtrain.config.privacy import AdaptiveClippingSection, PrivacySection
from privtrain.config.training import TrainingSection
from privtrain.errors import ConfigError, Fault
from privtrain.privacy.banded import INDEPENDENT, Strategy, Workload, best_strategy, relative_error, tried_bands
from privtrain.privacy.fixed_point import SLACK
from privtrain.privacy.sampling import SCHEMES, CyclicPoisson, Scheme, relation_of, scheme_of
from privtrain.privacy.user_level import USER_ACCOUNTING, Terms, UserAccounting

SCHEMA = "privtrain/plan/1"


#: Default noise of an auxiliary sum: this fraction of the batch size, at least this multiple of the noise multiplier.
_AUXILIARY_NOISE_OF_BATCH = 1 / 20
_AUXILIARY_NOISE_OF_MULTIPLIER = 2.0

#: Names of the auxiliary sums: the number of units within the clipping norm, and their losses.
WITHIN_NORM, LOSS = "within_norm", "loss"


@dataclasses.dataclass(frozen=True)
class AuxiliarySum:
    """A sum over a step's units, released with the gradient in the same Gaussian mechanism.

    Attributes:
        name: what a unit adds to it, always within [-1/2, 1/2]: one unit moves the sum by at most 1/2.
        noise: standard deviation of its noise, whose multiplier is therefore ``2 * noise``.
    """

    name: str
    noise: float


@dataclasses.dataclass(frozen=True)
class AdaptiveClipping:
    """How the clipping norm follows a quantile (Andrew et al. 2021, arXiv 1905.03871).

    Attributes:
        target_quantile: share of units whose norm is to be within the clipping norm.
        learning_rate: of the norm's logarithm.
        count_noise: standard deviation of the noise on the released count, whose sensitivity is 1/2.
    """

    target_quantile: float
    learning_rate: float
    count_noise: float


@dataclasses.dataclass(frozen=True)
class NoisedMetrics:
    """Metrics that are released through the mechanism.

    Attributes:
        release: ``"loss"`` and ``"clip_fraction"``, or one of them.
        loss_range: public bounds that a unit's loss is moved into.
        noise: standard deviation of the noise on each sum over units, whose sensitivity is 1/2.
    """

    release: tuple[str, ...]
    loss_range: tuple[float, float]
    noise: float


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the released run is chosen among several (Papernot and Steinke 2022, arXiv 2110.03620).

    A secret, random number of trials is trained, each from settings that are drawn at random from a fixed list; the one
    with the best score is released and nothing is known of the others. Theorem 2 bounds the whole for any score that is
    a function of what a trial may release, such as its loss on public rows, if every trial has the plan's event.

    Attributes:
        mean_trials: expected number of trials.
        distribution: ``"geometric"`` or ``"logarithmic"``.
    """

    mean_trials: float
    distribution: str

    def event(self, event: Any) -> Any:
        """Return the event of the whole procedure, given that of one trial."""
        return tuning_event(event, mean_runs=self.mean_trials, shape=self.distribution)


@dataclasses.dataclass(frozen=True)
class PrivacyPlan:
    """Everything that the guarantee depends on.

    Words. A *step* is one update of the model. An *epoch* is the sampling scheme's period, some number of steps. An
    *auxiliary sum* is released beside a step's gradient. *Bands* are those of a matrix that correlates the noise of
    steps (:mod:`privtrain.privacy.banded`).

    The guarantee: after ``num_steps`` steps the released adapter is (``epsilon``, ``delta``)-differentially private for
    adding or removing one ``guaranteed_unit`` with all its records, provided that the secret keys stay secret and that
    ChaCha20 and HMAC-SHA-256 look random. What is released is exactly a rounded Gaussian
    (:mod:`privtrain.privacy.noise`).

    Attributes:
        unit: ``"user"`` or ``"example"``: what is sampled and clipped.
        records_per_unit: the most records of a unit in one step.
        selection: how a user's records are chosen (:mod:`privtrain.data.selection`).
        neighboring_relation: ``"add_or_remove_one"`` or ``"zero_out"``.
        scheme: how units are chosen for steps; it gives both the sampler and the event that is accounted.
        expected_batch_size: constant divisor of the noisy sum.
        clipping_norm: bound on the L2 norm of a unit's contribution: the sensitivity of the sum. With adaptive clipping
            the first step's; the others follow from released counts.
        clipping_style: how a unit is brought to that bound: ``"flat"``, ``"per_layer"``, ``"automatic"`` or
            ``"adaptive"``; without noise also ``"batch"``, which bounds the mean of a step instead.
        noise_multiplier: noise standard deviation over sensitivity, of a step's whole release: what is accounted for.
            Where noise is correlated the sensitivity is the strategy's column norm times the clipping norm.
        num_steps: logical steps that are charged.
        delta: the δ of the guarantee.
        epsilon: certified ε at ``delta`` after ``num_steps``; infinite without noise.
        accountant: name of the accountant that certified ``epsilon``.
        insecure_seed: not ``None`` only in tests; voids the guarantee.
        user_accounting: whom ε protects where the unit is the example: one record, or a user with a bounded number.
        adaptive_clipping: not ``None`` where ``clipping_style`` is ``"adaptive"``.
        noised_metrics: metrics that are released through the mechanism, if any.
        strategy: how the noise of steps is correlated; ``None`` where it is independent. It has as many bands as the
            scheme has groups: the steps of a unit are so far apart.
        tuning: how the run is chosen among several, if it is: ``epsilon`` is then that of the whole procedure.

    Raises:
        ValueError: if scheme and strategy do not go together.
    """

    unit: str
    records_per_unit: int
    selection: str
    neighboring_relation: str
    scheme: Scheme
    expected_batch_size: float
    clipping_norm: float
    clipping_style: str
    noise_multiplier: float
    num_steps: int
    delta: float
    epsilon: float
    accountant: str
    insecure_seed: int | None
    user_accounting: UserAccounting
    adaptive_clipping: AdaptiveClipping | None = None
    noised_metrics: NoisedMetrics | None = None
    strategy: Strategy | None = None
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        # Bands of noise need the steps of a unit to be as far apart, which groups of units see to.
        num_groups = self.scheme.num_bands if isinstance(self.scheme, CyclicPoisson) else None
        num_bands = None if self.strategy is None else self.strategy.num_bands
        if num_groups != num_bands:
            raise ValueError(f"{num_bands} bands of noise and {num_groups} groups of units do not go together")
        # `how` is empty where ε protects the sampled unit itself.
        if self.tuning is not None and self.user_accounting.how:
            raise ValueError("tuning is accounted for where the unit is sampled itself")
        if num_bands is not None and self.clipping_style == "adaptive":
            raise ValueError("correlated noise needs one clipping norm for all steps")

    @classmethod
    def build(cls, privacy: PrivacySection, training: TrainingSection | None = None) -> PrivacyPlan:
        """Calibrate the noise (or account for the noise given) and freeze.

        Args:
            privacy: the section.
            training: whose optimizer banded noise is made for; plain sums over steps without it.

        Raises:
            ConfigError: if no noise multiplier meets the target, or the accountant cannot certify the plan.
        """
        try:
            plan = cls.uncertified(privacy, training)
            # The noise was calibrated to the target, so the target is an ε that holds; the answer may be less.
            known = math.inf if privacy.target_epsilon is None else privacy.target_epsilon
            answer = _answer(dataclasses.replace(plan, epsilon=known), privacy.num_steps)
        except accountants.CalibrationError as error:
            raise ConfigError([Fault("privacy.target_epsilon", str(error))]) from None
        except ValueError as error:
            raise ConfigError([Fault("privacy.accountant", str(error))]) from None
        plan = dataclasses.replace(plan, epsilon=plan.terms.certified(answer))
        _check_room(plan)
        return plan

    @classmethod
    def uncertified(
        cls, privacy: PrivacySection, training: TrainingSection | None = None, *, strategy: Strategy | None = None
    ) -> PrivacyPlan:
        """Return the plan of a configuration before anything is accounted for: its ε is infinite.

        Args:
            privacy: the section.
            training: whose optimizer banded noise is made for; plain sums over steps without it.
            strategy: in place of the best one, of a configuration with banded noise.
        """
        if privacy.noise == "banded":
            strategy = strategy or _chosen_strategy(privacy, Workload.of(privacy.num_steps, training))
            privacy = privacy.model_copy(update={"num_bands": strategy.num_bands})
        scheme = scheme_of(privacy)

        # The key `records_per_user`: where the unit is the example, how many records a user may own at all; else how
        # many of a user's records a step takes.
        if privacy.unit == "example":
            records_per_unit, most_owned = 1, privacy.records_per_user
        else:
            assert privacy.records_per_user is not None, "the schema has a default"
            records_per_unit, most_owned = privacy.records_per_user, None
        user_accounting = USER_ACCOUNTING[privacy.user_accounting](most_owned)
        accountant = privacy.accountant or user_accounting.accountants_for(scheme)[0]

        tuning = None if privacy.tuning is None else Tuning(privacy.tuning.mean_trials, privacy.tuning.distribution)
        noise_multiplier = privacy.noise_multiplier
        if noise_multiplier is None:  # the least that meets the target
            assert privacy.target_epsilon is not None, "the schema asks for one of the two"
            terms = Terms(privacy.target_delta, accountant, privacy.neighboring_relation)
            if tuning is None:
                noise_multiplier = user_accounting.noise_for(scheme, privacy.num_steps, privacy.target_epsilon, terms)
            else:
                noise_multiplier = _noise_of_tuning(tuning, scheme, privacy.num_steps, privacy.target_epsilon, terms)
        return cls(
            unit=privacy.unit,
            records_per_unit=records_per_unit,
            user_accounting=user_accounting,
            selection=privacy.selection,
            neighboring_relation=privacy.neighboring_relation,
            scheme=scheme,
            expected_batch_size=privacy.expected_batch_size,
            clipping_norm=privacy.clipping_norm,
            clipping_style=privacy.clipping_style,
            noise_multiplier=noise_multiplier,
            num_steps=privacy.num_steps,
            delta=privacy.target_delta,
            epsilon=math.inf,
            accountant=accountant,
            insecure_seed=privacy.insecure_seed,
            adaptive_clipping=_adaptive_clipping(privacy, noise_multiplier),
            noised_metrics=_noised_metrics(privacy, noise_multiplier),
            strategy=strategy,
            tuning=tuning,
        )

    @property
    def auxiliary_sums(self) -> tuple[AuxiliarySum, ...]:
        """Sums released in every step beside the gradient; adaptive clipping's count also gives the clip fraction."""
        noise: dict[str, float] = {}  # name → standard deviation
        if self.adaptive_clipping is not None:
            noise[WITHIN_NORM] = self.adaptive_clipping.count_noise
        if self.noised_metrics is not None:
            for metric in self.noised_metrics.release:
                name = LOSS if metric == "loss" else WITHIN_NORM
                # Adaptive clipping's count serves both, with its own noise.
                noise.setdefault(name, self.noised_metrics.noise)
        return tuple(AuxiliarySum(name, stddev) for name, stddev in noise.items())

    @property
    def guaranteed_unit(self) -> str:
        """Whom ``epsilon`` protects, ``"user"`` or ``"example"``: the sampled unit, or a user with so many examples."""
        return self.user_accounting.guaranteed_unit(self.unit)

    @property
    def records_per_user(self) -> int | None:
        """Where the unit is the example, the most records of a user in the training set; ``None`` for any number."""
        return self.user_accounting.records_per_user

    @property
    def terms(self) -> Terms:
        """What certifies ``epsilon``: δ, accountant and relation."""
        return Terms(self.delta, self.accountant, self.neighboring_relation)

    def event_of_steps(self, num_steps: int) -> Any:
        """Return the exact DP event of ``num_steps`` steps for one ``guaranteed_unit``.

        Where the run is chosen among several trials, the event of all of them.
        """
        event = self.user_accounting.event(self.scheme, self.noise_multiplier, num_steps)
        return event if self.tuning is None else self.tuning.event(event)

    def record_event_of_steps(self, num_steps: int) -> Any:
        """Return the DP event of ``num_steps`` steps for one sampled unit."""
        return self.scheme.event_of_steps(self.noise_multiplier, num_steps)

    def unit_epsilon_after(self, num_steps: int) -> float:
        """Return the certified ε of one sampled unit; ``epsilon_after`` may be for a user's k records instead."""
        return self.terms.certified(self.terms.epsilon(self.record_event_of_steps(num_steps)))

    @property
    def gradient_noise_multiplier(self) -> float:
        """Noise standard deviation over clipping norm of the clipped sum alone.

        Larger than ``noise_multiplier`` where auxiliary sums are released beside the gradient, since that is of all of
        them together. The same for correlated noise: see :mod:`privtrain.privacy.banded`.
        """
        if not self.auxiliary_sums or self.noise_multiplier == 0:
            return self.noise_multiplier
        # All auxiliary sums count as one with this noise; the function takes noise on a count, of sensitivity 1/2.
        joint = accountants.joint_noise_multiplier(*(auxiliary_sum.noise for auxiliary_sum in self.auxiliary_sums))
        return accountants.adaptive_clipping_noise(self.noise_multiplier, joint)

    @property
    def has_room(self) -> bool:
        """Whether any amount of gradient noise is enough for ``noise_multiplier``.

        Not if the auxiliary sums by themselves, each of noise multiplier ``2 * noise``, release too much.
        """
        if self.noise_multiplier == 0:
            return True
        return math.fsum((2 * one.noise) ** -2 for one in self.auxiliary_sums) < self.noise_multiplier**-2

    @property
    def correlated(self) -> Strategy | None:
        """The strategy if it correlates the noise of steps; ``None`` for independent noise, also of a single band."""
        return self.strategy if self.strategy is not None and self.strategy.num_bands > 1 else None

    @property
    def column_norm(self) -> float:
        """Sensitivity of the strategy's matrix, by which noise is larger; 1 where noise is independent."""
        return 1.0 if self.strategy is None else self.strategy.column_norm

    @property
    def fresh_noise_multiplier(self) -> float:
        """Standard deviation of a step's fresh noise over the clipping norm, on every coordinate of the sum.

        Where noise is correlated, a step takes back part of the earlier steps' noise besides.
        """
        return self.gradient_noise_multiplier * self.column_norm

    @property
    def largest_step_noise(self) -> float:
        """Standard deviation of a late step's whole noise over the clipping norm: fresh and taken back."""
        inverse = (self.strategy or INDEPENDENT).inverse_column(self.num_steps)
        return self.fresh_noise_multiplier * math.hypot(*inverse)

    def noise_of_run(self, training: TrainingSection | None = None) -> float:
        """Return the predicted noise of the trained weights over the signal, both as root mean squares over steps.

        What the optimizer's linear part makes of the noise of all steps, per coordinate, over what it would make of a
        mean gradient that stays the same.
        """
        workload = Workload.of(self.num_steps, training)
        error = (self.strategy or INDEPENDENT).error(workload) * self.fresh_noise_multiplier
        # Long runs are predicted from fewer steps: noise grows with the root of their number, the signal with it.
        error /= math.sqrt(self.num_steps / workload.num_steps)
        return error / (self.expected_batch_size * workload.signal)

    def noise_kept(self, training: TrainingSection | None = None) -> float:
        """Return :meth:`~privtrain.privacy.banded.Strategy.noise_kept` of the run: 1 for independent noise."""
        return (self.strategy or INDEPENDENT).noise_kept(Workload.of(self.num_steps, training))

    @property
    def metric_stddevs(self) -> dict[str, float]:
        """Noised metric → standard deviation of the noise in it, in the metric's own unit."""
        if self.noised_metrics is None:
            return {}
        low, high = self.noised_metrics.loss_range
        noise_of_mean = {one.name: one.noise / self.expected_batch_size for one in self.auxiliary_sums}
        stddevs: dict[str, float] = {}
        for metric in self.noised_metrics.release:
            if metric == "loss":
                # A unit adds its loss to the sum as a share of the range.
                stddevs[metric] = (high - low) * noise_of_mean[LOSS]
            else:
                stddevs[metric] = noise_of_mean[WITHIN_NORM]
        return stddevs

    @property
    def sampling(self) -> str:
        """Name of the sampling scheme."""
        return self.scheme.name

    @property
    def sampling_prob(self) -> float:
        """Chance that a unit joins a step."""
        return self.scheme.rate

    def accounted_steps(self, begun: Iterable[tuple[int, int]]) -> int:
        """Return the steps to account for, given (generation, step) of all steps that were begun.

        A generation is a stretch of the run under one secret key. An epoch of it that was begun counts whole.
        """
        return self.scheme.accounted_steps(generation for generation, _ in begun)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on every coordinate of the (first) sum."""
        return self.fresh_noise_multiplier * (self.clipping_norm * (1 + SLACK))

    @property
    def not_private_reasons(self) -> tuple[str, ...]:
        """Why this plan gives no privacy; empty if it does."""
        reasons = []
        if self.noise_multiplier == 0:
            reasons.append("noise_multiplier is 0: no noise is added")
        if self.insecure_seed is not None:
            reasons.append("insecure_seed is set: whoever knows it can subtract the noise")
        if not reasons and math.isinf(self.epsilon):
            reasons.append("epsilon is infinite")
        return tuple(reasons)

    def epsilon_after(self, num_steps: int) -> float:
        """Return the certified ε spent by ``num_steps`` charged steps; part of an epoch of the scheme counts whole."""
        num_steps = self.scheme.whole_steps(num_steps)
        if num_steps == self.num_steps or math.isinf(self.epsilon):
            return self.epsilon
        try:
            value = self.terms.certified(_answer_after(self, num_steps))
        except ValueError:
            if num_steps > self.num_steps:
                raise
            # The accountant cannot resolve so few steps. ε grows with them, so the whole plan's ε bounds theirs.
            return self.epsilon
        # Fewer steps spend no more than all, whatever the accountant's slack says.
        return min(value, self.epsilon) if num_steps < self.num_steps else value

    def answer_after(self, num_steps: int) -> accountants.PrivacyAnswer:
        """Return the accountant's whole answer for ``num_steps`` charged steps."""
        return _answer_after(self, num_steps)

    def recomputed_epsilon(self) -> float:
        """Return the certified ε after all of the plan's steps, recomputed from the event without using ``epsilon``."""
        return self.terms.certified(_answer(dataclasses.replace(self, epsilon=math.inf), self.num_steps))

    def epsilon_agrees_with(self, recomputed: float) -> bool:
        """Return whether ``epsilon`` matches a recomputed value, up to rounding or the search for it, and holds."""
        accounting = self.user_accounting
        # Both may be infinite, which is not close to itself.
        is_close = math.isclose(self.epsilon, recomputed, rel_tol=accounting.epsilon_tolerance)
        if self.epsilon != recomputed and not is_close:
            return False
        return accounting.certifies(self.scheme, self.noise_multiplier, self.num_steps, self.epsilon, self.terms)

    def fingerprint(self, data_sha256: str | None = None) -> str:
        """Return SHA-256 over the plan's canonical JSON, with the data manifest's digest for the run's own use.

        Publish it without the digest only: with it, whoever knows all records but one could test a guess of that one.
        """
        body = {"schema": SCHEMA, "data_sha256": data_sha256, **self.body()}
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def body(self) -> dict[str, Any]:
        """Return every value of the plan as JSON; a reader of the privacy statement can rebuild the plan from it."""
        body = {**dataclasses.asdict(self), "scheme": self.scheme.parameters(), "epsilon": finite(self.epsilon)}
        del body["user_accounting"]
        body |= {"records_per_user": self.records_per_user, "user_accounting": self.user_accounting.name}
        return json.loads(json.dumps(body, allow_nan=False))

    @classmethod
    def from_body(cls, body: Any) -> PrivacyPlan:
        """Return the plan of which :meth:`body` gave ``body``; nothing is calibrated or accounted for.

        Raises:
            ValueError: if ``body`` describes no plan, or describes one in another form than :meth:`body` does.
        """
        try:
            values = dict(body)
            scheme = dict(values["scheme"])
            scheme_class = SCHEMES[scheme.pop("scheme")]
            # `parameters` has the scheme's fields, and derived values beside them.
            fields = {field.name for field in dataclasses.fields(scheme_class)}
            values["scheme"] = scheme_class(**{name: value for name, value in scheme.items() if name in fields})
            values["user_accounting"] = USER_ACCOUNTING[values["user_accounting"]](values.pop("records_per_user"))
            if values["epsilon"] is None:
                values["epsilon"] = math.inf
            if values["adaptive_clipping"] is not None:
                values["adaptive_clipping"] = AdaptiveClipping(**values["adaptive_clipping"])
            if values["noised_metrics"] is not None:
                noised = values["noised_metrics"]
                low, high = noised["loss_range"]
                values["noised_metrics"] = NoisedMetrics(tuple(noised["release"]), (low, high), noised["noise"])
            if values["tuning"] is not None:
                values["tuning"] = Tuning(**values["tuning"])
            if values["strategy"] is not None:
                values["strategy"] = Strategy(tuple(values["strategy"]["coefficients"]))
            plan = cls(**values)
            is_canonical = plan.body() == body
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"no plan can be rebuilt from it ({type(error).__name__})") from None
        if not is_canonical:
            raise ValueError("it does not describe a plan in the one form")
        return plan


def finite(value: float) -> float | None:
    """Return the value, or ``None`` if it is infinite or NaN, which JSON lacks."""
    return value if math.isfinite(value) else None


def _chosen_strategy(privacy: PrivacySection, workload: Workload) -> Strategy:
    """Return the best strategy of ``privacy.num_bands`` bands; if that is ``auto``, of all numbers of bands tried.

    Best is the least noise predicted in the trained weights at the same ε. One band (independent noise) is tried first
    and stays where more are no better.
    """
    assert privacy.sampling_prob is not None, "the schema asks for it"
    if isinstance(privacy.num_bands, int):
        return best_strategy(privacy.num_bands, workload)
    tried = tried_bands(privacy.num_steps, privacy.sampling_prob)
    strategies = [best_strategy(num_bands, workload) for num_bands in tried]
    return min(strategies, key=lambda strategy: _predicted_noise(privacy, strategy, workload))


def _predicted_noise(privacy: PrivacySection, strategy: Strategy, workload: Workload) -> float:
    """Return the noise that a strategy leaves in the trained weights at the ε wanted; infinite if none is enough."""
    # A quick accountant will do to compare strategies: the plan is certified by its own.
    update = {"num_bands": strategy.num_bands, "accountant": fast_accountant(privacy.accountant or "pld")}
    try:
        plan = PrivacyPlan.uncertified(privacy.model_copy(update=update), strategy=strategy)
    except accountants.CalibrationError:
        return math.inf
    if not plan.has_room:
        return math.inf
    return plan.gradient_noise_multiplier * relative_error(strategy, workload)


def fast_accountant(name: str) -> str:
    """Return an accountant as tight as the named one, and several times faster where there is one."""
    return "tilted" if name == "pld" else name


def _noise_of_tuning(tuning: Tuning, scheme: Scheme, num_steps: int, epsilon: float, terms: Terms) -> float:
    """Return the smallest noise multiplier with which all trials together are certified to be within ``epsilon``."""
    return accountants.calibrate_noise(
        lambda noise: tuning.event(scheme.event_of_steps(noise, num_steps)),
        target_epsilon=epsilon,
        target_delta=terms.delta,
        accountant=terms.accountant,
        relation=relation_of(terms.relation),
    )


def _adaptive_clipping(privacy: PrivacySection, noise_multiplier: float) -> AdaptiveClipping | None:
    """Return the configured adaptive clipping with its noise chosen; ``None`` with another clipping style."""
    if privacy.clipping_style != "adaptive":
        return None
    given = privacy.adaptive_clipping or AdaptiveClippingSection()
    noise = _auxiliary_noise(given.count_noise, privacy.expected_batch_size, noise_multiplier, num_sums=1)
    return AdaptiveClipping(given.target_quantile, given.learning_rate, noise)


def _noised_metrics(privacy: PrivacySection, noise_multiplier: float) -> NoisedMetrics | None:
    """Return the configured metrics with their noise chosen; ``None`` if there are none."""
    given = privacy.noised_metrics
    if given is None:
        return None
    noise = _auxiliary_noise(given.noise, privacy.expected_batch_size, noise_multiplier, num_sums=len(given.release))
    return NoisedMetrics(tuple(given.release), given.loss_range, noise)


def _auxiliary_noise(given: float | None, batch_size: float, noise_multiplier: float, num_sums: int) -> float:
    """Return the standard deviation of the noise on each of ``num_sums`` auxiliary sums.

    The one given or, if that is ``None``, so much that the gradient needs hardly more noise for them.
    """
    if noise_multiplier == 0:
        return 0.0
    if given is not None:
        return given
    least = _AUXILIARY_NOISE_OF_MULTIPLIER * noise_multiplier * math.sqrt(num_sums)
    return max(_AUXILIARY_NOISE_OF_BATCH * batch_size, least)


def _check_room(plan: PrivacyPlan) -> None:
    """Raise if auxiliary sums have so little noise that no gradient noise makes up for it; name the keys to raise."""
    if plan.has_room:
        return
    # Noise s on each of n sums leaves room if n / (2 s)² < 1 / noise_multiplier².
    num_sums = len(plan.auxiliary_sums)
    least = plan.noise_multiplier / 2 * math.sqrt(num_sums)
    noise_by_key: dict[str, float] = {}
    if plan.adaptive_clipping is not None:
        noise_by_key["privacy.adaptive_clipping.count_noise"] = plan.adaptive_clipping.count_noise
    if plan.noised_metrics is not None:
        noise_by_key["privacy.noised_metrics.noise"] = plan.noised_metrics.noise
    what = "half the noise multiplier" if num_sums == 1 else f"{math.sqrt(num_sums) / 2:.3g} of it"
    faults: list[Fault] = []
    for key, noise in noise_by_key.items():
        if noise <= least:
            faults.append(Fault(key, f"given {noise:g}; must exceed {what}, {least:g}"))
    raise ConfigError(faults)


def _answer(plan: PrivacyPlan, num_steps: int) -> accountants.PrivacyAnswer:
    """Return the answer about ε of ``num_steps`` steps; ``plan.epsilon`` is taken for an ε that holds for all steps."""
    if plan.tuning is not None:
        return plan.terms.epsilon(plan.event_of_steps(num_steps))
    # What holds for all steps holds for fewer.
    known = plan.epsilon if num_steps <= plan.num_steps else math.inf
    return plan.user_accounting.answer(plan.scheme, plan.noise_multiplier, num_steps, plan.terms, known=known)


_answer_after = functools.lru_cache(maxsize=4096)(_answer)
