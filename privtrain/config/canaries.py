"""What is planted for the attack job, and what is kept for a white-box audit."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import override

from privtrain.config.section import Section


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
        needs_file = self.kind == "samples" and self.num_users > 0
        has_file = self.samples_file is not None
        if needs_file != has_file:
            yield "canaries.kind: samples with canaries.num_users needs canaries.samples_file; no other kind has one"

    @property
    def has_texts(self) -> bool:
        """Whether there are canaries whose secret is a text; a gradient canary has none."""
        return self.num_users > 0 or self.user_fraction > 0

    @property
    def are_planted(self) -> bool:
        """Whether the run has canaries of any kind."""
        return self.has_texts or self.num_gradient_users > 0


class AuditSection(Section):
    """What the owner keeps for a white-box audit."""

    keep_noised_sums: bool = Field(
        default=False,
        description="Keep the noised sum of every step in secret/noised_sums, readable by the owner alone and never "
        "published: 4 bytes a trained weight and step.",
    )
