"""The guarantee: every key here is part of the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from typing_extensions import override

from privtrain.config.schemes import (
    SCHEME_RULES,
    USER_ACCOUNTING_RULES,
    Accountant,
    Relation,
    SchemeName,
    UserAccountingName,
)
from privtrain.config.section import Section

#: Less noise than this gives an ε in the hundreds, which is no guarantee and takes minutes to account.
_SMALLEST_NOISE = 0.1
#: A larger ε is a slip of the pen: e^ε, by which it bounds what may be inferred, has hundreds of digits.
_LARGEST_EPSILON = 1000

#: Default number of records of a user in one step.
_RECORDS_PER_USER = 4

#: Most units of a step: the clipped sum is int64, and each unit adds at most 2**41 to a coordinate.
MAX_UNITS = 1 << 21

#: Most bands of correlated noise (steps that one step's noise is spread over): one vector is kept in memory for each.
MAX_BANDS = 128

Selection = Literal["random", "longest", "shortest", "highest_perplexity", "lowest_perplexity", "random_chunk"]


class AdaptiveClippingSection(Section):
    """Adaptive quantile clipping; privacy.clipping_norm is where it starts."""

    target_quantile: float = Field(default=0.5, gt=0, lt=1, description="Share of units whose norm is to be within C.")
    learning_rate: float = Field(default=0.2, gt=0, le=1, description="Learning rate of the logarithm of C.")
    count_noise: float | None = Field(
        default=None,
        gt=0,
        description="Standard deviation of the noise on the released count. Default: expected_batch_size / 20, at "
        "least twice the noise multiplier, which raises the gradient's noise by at most 3.3 %.",
    )


class TuningSection(Section):
    """Choosing the best of a random number of runs, for ``privtrain tune``: ε is that of the whole procedure."""

    mean_trials: float = Field(
        default=5.0, ge=1, le=1000, description="Expected number of trials; how many there are is drawn in secret."
    )
    distribution: Literal["geometric", "logarithmic"] = Field(
        default="geometric",
        description="Of that number. logarithmic needs less noise for the same mean, and draws one trial more often.",
    )


def _as_tuple(value: Any) -> Any:
    """Turn a list into a tuple, as a strict field needs it."""
    return tuple(value) if isinstance(value, list) else value


class NoisedMetricsSection(Section):
    """Metrics that the mechanism itself releases in every step: covered by ε, which does not change.

    Each is one more coordinate of the privatised vector; the gradient's noise rises so that all together have the
    plan's noise multiplier.
    """

    release: list[Literal["loss", "clip_fraction"]] = Field(
        default=["loss", "clip_fraction"],
        min_length=1,
        description="loss: mean over units, each unit's moved into loss_range; clip_fraction: share of units whose "
        "norm is above the clipping norm (with clipping_style: adaptive its own count tells, at no cost).",
    )
    # JSON has lists alone, and a strict field takes none for a tuple.
    loss_range: Annotated[tuple[float, float], pydantic.BeforeValidator(_as_tuple)] = Field(
        default=(0.0, 8.0), description="Public bounds of a unit's loss; narrower ones make it less noisy."
    )
    noise: float | None = Field(
        default=None,
        gt=0,
        description="Standard deviation of the noise on each sum over units, in ranges (a clip is 1). Default: "
        "expected_batch_size / 20, at least 2 sqrt(metrics) times the noise multiplier, which raises the gradient's "
        "noise by at most 3.3 %.",
    )

    @override
    def conflicts(self) -> Iterator[str]:
        low, high = self.loss_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            yield f"loss_range: given [{low:g}, {high:g}]; must be two finite numbers, smaller one first"
        if len(set(self.release)) < len(self.release):
            yield f"release={self.release} names a metric twice"


class PrivacySection(Section):
    """The guarantee. Every key here is part of the plan and of its fingerprint."""

    unit: Literal["user", "example"] = Field(
        default="user", description="Who is protected: a user with all of their records, or one record."
    )
    records_per_user: int | None = Field(
        default=None,
        ge=1,
        description="Most records k of one user: in one step with unit: user (default 4); in the whole training set "
        "with unit: example (default: no bound).",
    )
    user_accounting: UserAccountingName = Field(
        default="none",
        description="With unit: example, whom ε and δ are for: one record (none), or a user with at most k records, by "
        "group privacy or, with less noise, by a mixture of Gaussians.",
    )
    selection: Selection = Field(
        default="random",
        description="Which k records of a user are used. It depends on that user's records and on public things alone, "
        "so it costs no ε; perplexity is the base model's.",
    )
    neighboring_relation: Relation = Field(
        default="add_or_remove_one",
        description="How neighbouring data sets differ: one unit more or less; or one unit's records removed while its "
        "place stays (zero_out, the only relation of truncated_poisson and shuffle).",
    )
    noise: Literal["independent", "banded"] = Field(
        default="independent",
        description="independent: fresh noise in every step. banded: noise that later steps partly take back, so that "
        "the trained weights hold less of it at the same ε; it samples by cyclic_poisson.",
    )
    num_bands: Literal["auto"] | Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Steps that one step's banded noise is spread over, and groups that units are drawn from in turn; "
        "divides num_steps, at most 1 / sampling_prob. auto (default): the number with the least predicted noise in "
        "the trained weights, 1 included.",
    )
    sampling: SchemeName = Field(
        default="poisson",
        description="How the units of a step are chosen; cyclic_poisson goes with noise: banded, shuffle is accounted "
        "without amplification.",
    )
    sampling_prob: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Probability that a unit joins a step, for poisson, cyclic_poisson and truncated_poisson; a "
        "constant, not computed from the data.",
    )
    max_batch_size: int | None = Field(
        default=None, ge=1, description="truncated_poisson: most units of a step; a cut well above the mean costs no ε."
    )
    max_num_units: int | None = Field(
        default=None,
        ge=1,
        description="truncated_poisson, shuffle: public number of places, at least the number of units.",
    )
    steps_per_epoch: int | None = Field(
        default=None, ge=1, description="random_allocation, shuffle: steps over which a unit's turns are spread."
    )
    steps_per_unit: int | None = Field(
        default=None, ge=1, description="random_allocation: steps of an epoch that each unit joins (default 1)."
    )
    expected_batch_size: float = Field(
        gt=0, description=f"Constant that the noisy sum of a step is divided by; at most {MAX_UNITS:,}."
    )
    clipping_norm: float = Field(
        default=1.0, ge=1e-12, le=1e12, description="Norm C that each unit's gradient is clipped to."
    )
    clipping_style: Literal["flat", "per_layer", "automatic", "adaptive", "batch"] = Field(
        default="flat",
        description="flat: one norm over all tensors. per_layer: C/sqrt(layers) for each layer. automatic: every unit "
        "scaled to norm C. adaptive: flat, with a C that follows a quantile of the units' norms. batch: the step's "
        "mean gradient alone, which bounds no unit; for comparisons without noise.",
    )
    adaptive_clipping: AdaptiveClippingSection | None = Field(
        default=None, description="Settings of clipping_style: adaptive."
    )
    noised_metrics: NoisedMetricsSection | None = Field(
        default=None, description="Release loss and clip fraction through the mechanism; {} takes the defaults."
    )
    tuning: TuningSection | None = Field(
        default=None,
        description="Train a random number of trials and release the best on data.evaluation, within ε; {} takes the "
        "defaults. Started with privtrain tune.",
    )
    target_epsilon: float | None = Field(
        default=None,
        gt=0,
        description="ε that the noise is calibrated to, at most 1,000; or give noise_multiplier. 8 is common.",
    )
    noise_multiplier: float | None = Field(
        default=None,
        ge=0,
        description="Noise relative to the clipping norm; 0 trains without privacy and says so everywhere.",
    )
    target_delta: float = Field(
        gt=0, lt=1, description="δ; choose it below 1 / units. Below 1e-11 it needs accountant: tilted."
    )
    num_steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    accountant: Accountant | None = Field(
        default=None,
        description="Accountant that certifies ε, tilted also at tiny δ. Default: pld, or allocation for "
        "random_allocation (pip install 'privtrain[allocation]'), or rdp for tuning.",
    )
    insecure_seed: int | None = Field(
        default=None, ge=0, description="Seed for tests in place of a secret; marks the run as not private everywhere."
    )

    @pydantic.field_validator("expected_batch_size")
    @classmethod
    def _sum_fits(cls, value: float) -> float:
        if value > MAX_UNITS:
            raise ValueError(f"given {value:g}; integers hold the sum of {MAX_UNITS:,} units: lower it")
        return value

    @pydantic.field_validator("target_epsilon")
    @classmethod
    def _means_something(cls, value: float | None) -> float | None:
        if value is not None and value > _LARGEST_EPSILON:
            raise ValueError(
                f"given {value:g}, a guarantee that nobody could tell from none; 8 is common, 1 is strong, more than "
                f"{_LARGEST_EPSILON:,} is refused. To train without privacy give privacy.noise_multiplier: 0"
            )
        return value

    @pydantic.field_validator("noise_multiplier")
    @classmethod
    def _enough_noise(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < _SMALLEST_NOISE:
            raise ValueError(f"given {value}; must be 0 (no privacy) or at least {_SMALLEST_NOISE}")
        return value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _default_bound(cls, values: Any) -> Any:
        """Give records_per_user its default, which it has only where users are the unit."""
        if isinstance(values, dict) and values.get("unit", "user") == "user" and values.get("records_per_user") is None:
            return {**values, "records_per_user": _RECORDS_PER_USER}
        return values

    @pydantic.model_validator(mode="before")
    @classmethod
    def _default_accountant(cls, values: Any) -> Any:
        """Set accountant to rdp for tuning: no other accounts for choosing the best of several runs."""
        if isinstance(values, dict) and values.get("tuning") is not None and values.get("accountant") is None:
            return {**values, "accountant": "rdp"}
        return values

    @pydantic.model_validator(mode="before")
    @classmethod
    def _default_bands(cls, values: Any) -> Any:
        """Give num_bands and sampling the defaults that they have with noise: banded."""
        if not isinstance(values, dict) or values.get("noise") != "banded":
            return values
        bands = "auto" if values.get("num_bands") is None else values["num_bands"]
        return {"sampling": "cyclic_poisson", **values, "num_bands": bands}

    @property
    def protects_records(self) -> bool:
        """Whether ε is for one record. Then one record more or less must not change what is done with any other."""
        return self.unit == "example" and self.user_accounting == "none"

    @override
    def conflicts(self) -> Iterator[str]:
        yield from self._sampling_conflicts()
        yield from self._band_conflicts()
        yield from self._user_conflicts()
        if self.tuning is not None:
            yield from self._tuning_conflicts()
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            yield "give exactly one of privacy.target_epsilon and privacy.noise_multiplier"
        if self.clipping_style == "batch" and self.noise_multiplier != 0:
            yield "privacy.clipping_style: batch bounds no unit; it needs privacy.noise_multiplier: 0"
        if self.noised_metrics is not None and self.noise_multiplier == 0:
            yield "privacy.noised_metrics needs noise: with privacy.noise_multiplier: 0 it is the raw loss"
        if self.adaptive_clipping is not None and self.clipping_style != "adaptive":
            yield "privacy.adaptive_clipping belongs to privacy.clipping_style: adaptive"

    def _band_conflicts(self) -> Iterator[str]:
        """Yield what does not go with correlated noise (noise: banded).

        With b bands, units are split into b groups, which are drawn from in turn (sampling: cyclic_poisson).
        """
        is_cyclic = self.sampling == "cyclic_poisson"
        if self.noise == "banded" and not is_cyclic:
            yield f"privacy.noise: banded needs privacy.sampling: cyclic_poisson; given {self.sampling}"
        if self.noise != "banded" and is_cyclic:
            yield "privacy.sampling: cyclic_poisson needs privacy.noise: banded; with independent noise use poisson"
        if self.noise != "banded":
            return
        if self.noise_multiplier == 0:
            yield "privacy.noise: banded needs noise; privacy.noise_multiplier is 0"
        if self.clipping_style == "adaptive":
            yield (
                "privacy.noise: banded needs one clipping norm for all steps; given privacy.clipping_style: adaptive, "
                "use another one or privacy.noise: independent"
            )
        if self.num_bands == "auto":
            if self.noise_multiplier is not None:
                yield "privacy.num_bands: auto needs privacy.target_epsilon; with noise_multiplier give a number"
        elif self.num_bands is not None:
            if self.num_steps % self.num_bands:
                yield f"privacy.num_steps={self.num_steps} must be a multiple of privacy.num_bands={self.num_bands}"
            if self.num_bands > MAX_BANDS:
                yield f"privacy.num_bands={self.num_bands} must be at most {MAX_BANDS}"
            if self.sampling_prob is not None and self.num_bands * self.sampling_prob > 1:
                yield (
                    f"privacy.num_bands={self.num_bands} groups of which one is drawn from with probability "
                    f"num_bands * sampling_prob = {self.num_bands * self.sampling_prob:g} a step; at most 1, lower one"
                )

    def _tuning_conflicts(self) -> Iterator[str]:
        """Yield what does not go with choosing the best of several trials."""
        if self.sampling not in ("poisson", "cyclic_poisson") or self.user_accounting != "none":
            yield (
                "privacy.tuning needs privacy.sampling: poisson or privacy.noise: banded, and privacy.user_accounting: "
                "none"
            )
        if self.accountant != "rdp":
            yield f"privacy.tuning is accounted for by rdp; given privacy.accountant: {self.accountant}"
        if self.noise_multiplier == 0:
            yield "privacy.tuning needs noise; privacy.noise_multiplier is 0"

    def _user_conflicts(self) -> Iterator[str]:
        """Yield what contradicts who is protected (unit, user_accounting), and how many records a user may have."""
        rules = USER_ACCOUNTING_RULES[self.user_accounting]
        if rules is not None:
            given = f"privacy.user_accounting: {self.user_accounting}"
            if self.unit == "user":
                yield f"{given} is for privacy.unit: example; users are the unit already, set it to none"
            elif self.records_per_user is None:
                yield f"{given} needs privacy.records_per_user, the most records of a user in the training set"
            if self.sampling != rules.sampling:
                yield f"{given} needs privacy.sampling: {rules.sampling}; given {self.sampling}"
            if self.accountant is not None and self.accountant not in rules.accountants:
                yield f"privacy.accountant must be {' or '.join(rules.accountants)} for {given}"
        if self.protects_records and self.records_per_user is not None and self.noise_multiplier != 0:
            yield (
                f"privacy.records_per_user={self.records_per_user} lets one record of a user push another one out, "
                "which ε for one record does not cover; leave it out, or set privacy.user_accounting: mixture, which "
                "protects users"
            )
        if self.selection != "random" and self.records_per_user is None:
            yield f"privacy.selection: {self.selection} selects privacy.records_per_user records; give it"

    def _sampling_conflicts(self) -> Iterator[str]:
        """Yield keys that the sampling scheme lacks or does not use, and relations and accountants not known for it."""
        rules, given = SCHEME_RULES[self.sampling], f"privacy.sampling={self.sampling}"
        for key in rules.needs:
            if getattr(self, key) is None:
                yield f"privacy.{key} is required by {given}"
        keys_of_all_schemes = {key for scheme in SCHEME_RULES.values() for key in scheme.keys}
        for key in sorted(keys_of_all_schemes.difference(rules.keys)):
            if getattr(self, key) is not None:
                yield f"privacy.{key} is not used by {given}"
        if self.neighboring_relation not in rules.relations:
            yield f"privacy.neighboring_relation must be {' or '.join(rules.relations)} for {given}"
        if self.accountant is not None and self.accountant not in rules.accountants:
            yield f"privacy.accountant must be {' or '.join(rules.accountants)} for {given}"
        if self.steps_per_epoch is not None:
            if self.num_steps % self.steps_per_epoch:
                yield f"privacy.num_steps={self.num_steps} must be a multiple of privacy.steps_per_epoch"
            if (self.steps_per_unit or 1) > self.steps_per_epoch:
                yield "privacy.steps_per_unit must not exceed privacy.steps_per_epoch"
