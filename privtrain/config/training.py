"""How the model is trained and how fast: nothing here changes the guarantee."""

from __future__ import annotations

import math
import pathlib
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from privtrain.config.section import Section, without_shell_names


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
    num_averaged_steps: int = Field(
        default=0,
        ge=0,
        description="Release the mean of the weights after each of the plan's last so many steps, in place of the last "
        "ones (0: the last ones). It costs no ε, and 4 bytes a trained weight.",
    )
    lora_b_rate_ratio: float = Field(
        default=1.0,
        gt=0,
        description="Learning rate of LoRA's B over that of everything else (LoRA+, Hayou et al. 2024, arXiv "
        "2402.12354).",
    )

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step (from 0): linear warm-up, then constant, or linear or cosine to zero."""
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
    packing: Literal["auto", "lines", "rows"] = Field(
        default="auto",
        description="How records share a forward pass. rows: one record a row, padded to one of four widths. lines: "
        "one line of at most microbatch_tokens that holds whole units, records apart in attention and positions. auto: "
        "lines where the self-test finds that a unit adds the same bits wherever it stands in a line, else rows.",
    )
    microbatch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of the longest line, at least data.max_length. Default: two of the longest records, at "
        "least 512 and at most 2048 unless one is longer, and no more than microbatch_size rows have. A unit of more "
        "than half of a shared line has one of its own, of its own length. Shared lines are as long as the longest, "
        "on a CPU at most 128 tokens, and hold at most two units a row of microbatch_size.",
    )
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
        "gradient_checkpointing, else batched. Where gradients are sharded, ranks work together on a unit that "
        "goes one by one, or has more records than a microbatch.",
    )
    reduce_once: bool = Field(
        default=False,
        description="Where gradients are sharded: each rank adds up its own users' clipped gradients whole (8 bytes a "
        "trained parameter) and sends them once a step, not once a microbatch. The sum has the same bits.",
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

    _without_shell_names = pydantic.field_validator("index_dir")(without_shell_names)
