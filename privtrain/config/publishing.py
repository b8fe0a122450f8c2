"""Where a run lives, who sees it, which budget it spends, and how it is released."""

from __future__ import annotations

import pathlib
import urllib.parse
from collections.abc import Iterator
from typing import Literal

import pydantic
from pydantic import Field
from typing_extensions import override

from privtrain.config.section import Section, without_shell_names


class RunSection(Section):
    """Where the run lives."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its directory.")
    output_dir: pathlib.Path = Field(default=pathlib.Path("runs"), description="Parent of the run directory.")

    _without_shell_names = pydantic.field_validator("output_dir")(without_shell_names)

    @property
    def directory(self) -> pathlib.Path:
        """The run directory."""
        return self.output_dir / self.name


class TrackingSection(Section):
    """What is shown, and to whom."""

    wandb: bool = Field(default=True, description="Log to Weights & Biases, offline unless WANDB_MODE says otherwise.")
    wandb_project: str = Field(
        default="privtrain", description="Project name at Weights & Biases and trackio, experiment name at MLflow."
    )
    system_metrics: bool = Field(
        default=False,
        description="Also log every machine's load to W&B (its shared mode, online only). It varies with the sample "
        "that was drawn and is not covered by ε.",
    )
    tensorboard: bool = Field(default=False, description="Also write event files; needs the package tensorboard.")
    mlflow: bool = Field(
        default=False,
        description="Also show the run to MLflow (MLFLOW_TRACKING_URI) when it is released; needs the package mlflow.",
    )
    trackio: bool = Field(
        default=False, description="Also show the run to trackio when it is released; needs the package trackio."
    )
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
    """What is done with a release beside writing it; of these keys the license alone is published, in the card."""

    signing_key: pathlib.Path | None = Field(
        default=None,
        description="PEM file (mode 0600) of an elliptic-curve private key that signs the release; "
        "PRIVTRAIN_SIGNING_PASSWORD opens an encrypted one.",
    )
    signing_certificate: pathlib.Path | None = Field(default=None, description="PEM file of the key's certificate.")
    signing_chain: list[pathlib.Path] = Field(
        default=[], description="PEM files of the certificates above it, up to the root."
    )
    license: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][a-z0-9.+-]{0,63}$",
        description="License that the card names as hub pages do, e.g. apache-2.0; by default what the base model's "
        "own card (README.md beside its weights) says, and none if it says nothing.",
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
