"""The configuration tree: one YAML file, validated here. Unknown keys are errors.

``privacy`` holds everything that the guarantee depends on, and becomes the plan. ``performance`` holds nothing that
could change it. The rest (model, data, training) is public context.
"""

from __future__ import annotations

from collections.abc import Iterator

from typing_extensions import override

from privtrain.config.canaries import AuditSection, CanariesSection
from privtrain.config.data import DataSection
from privtrain.config.model import LoraSection, ModelSection, PromptSection
from privtrain.config.privacy import PrivacySection
from privtrain.config.publishing import RegistrySection, ReleaseSection, RunSection, TrackingSection
from privtrain.config.section import Section
from privtrain.config.training import PerformanceSection, TrainingSection


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
        line = self.performance.microbatch_tokens
        if line is not None and line < self.data.max_length:
            yield (
                f"performance.microbatch_tokens={line} holds no record of data.max_length={self.data.max_length}; set "
                "one of the two"
            )
        method, selection = self.training.method, self.privacy.selection
        if self.training.num_averaged_steps > self.privacy.num_steps:
            yield (
                f"training.num_averaged_steps={self.training.num_averaged_steps} must be at most "
                f"privacy.num_steps={self.privacy.num_steps}"
            )
        if self.model.quantization is not None and self.training.releases_model:
            yield f"training.method: {method} trains weights that model.quantization freezes; use lora"
        if self.model.quantization == "int8" and method == "lora" and self.lora.use_dora:
            yield (
                "lora.use_dora reads the weights of a base that model.quantization: int8 holds, and PEFT loses their "
                "scales by that; use nf4, or leave lora.use_dora out"
            )
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
        # Without noise there is no ε whose unit could be contradicted.
        has_epsilon_for_records = self.privacy.protects_records and self.privacy.noise_multiplier != 0
        if has_epsilon_for_records and self.data.deduplicate != "none":
            yield (
                f"data.deduplicate: {self.data.deduplicate} lets one record of a user take another one's place, which "
                "ε for one record (privacy.unit: example) does not cover; set it to none, or deduplicate the rows "
                "before"
            )
        if self.privacy.noise == "banded" and self.audit.keep_noised_sums:
            yield (
                "audit.keep_noised_sums scores steps whose noise is independent; set privacy.noise: independent, or "
                "remove it"
            )
        if self.lora.freeze_a and self.lora.use_dora:
            yield "lora.freeze_a and lora.use_dora do not go together: DoRA trains A's direction"
        if self.privacy.tuning is not None and self.audit.keep_noised_sums:
            yield "audit.keep_noised_sums scores one run, and privacy.tuning chooses among several; remove one of them"
        if self.privacy.tuning is not None and self.data.evaluation is None:
            yield "privacy.tuning chooses by the loss on data.evaluation, public rows; give it"
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
