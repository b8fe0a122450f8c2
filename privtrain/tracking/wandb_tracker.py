"""The mirror in W&B: one run a job, on global rank 0 alone, offline unless ``WANDB_MODE`` says otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from privtrain.config import Config, public_tree
from privtrain.errors import PrivtrainError
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.directory import RunDirectory
from privtrain.tracking.mirrors import Row
from privtrain.tracking.trackers import NullTracker
from privtrain.tracking.wandb_settings import careful_settings, is_online


class WandbTracker:
    """Mirrors rows, tells people of alerts, and keeps the release as artifacts.

    Console capture, code saving, git and machine information are off: they can carry text and paths.

    Args:
        config: the resolved configuration; only its public part is sent.
        plan: the privacy plan.
        run: the run directory, where offline files are kept.
        run_id: W&B's id of the run, the same on every resume.

    Raises:
        PrivtrainError: if W&B cannot be opened; a release that it was to be shown stands.
    """

    def __init__(self, config: Config, plan: PrivacyPlan, run: RunDirectory, run_id: str) -> None:
        machine = machine_label(0) if config.tracking.system_metrics else None
        remedy = "mend it, or set tracking.wandb: false; then start the same command again"
        try:
            settings = careful_settings(machine)
        except ValueError as error:  # a variable of W&B's that it does not understand
            raise PrivtrainError(f"W&B's settings cannot be read: {' '.join(str(error).split())}; {remedy}") from None
        import wandb

        tags = [plan.unit, plan.sampling]
        if plan.not_private_reasons:
            tags.append("not private")
        self._name = config.run.name
        try:
            self._run = wandb.init(
                project=config.tracking.wandb_project,
                name=config.run.name,
                id=sweep_run_id() or run_id,
                resume=None if machine and is_online() else "allow",  # in shared mode every writer attaches by id
                job_type="train",
                dir=str(run.root),
                config={**public_tree(config), "noise_multiplier": plan.noise_multiplier},
                tags=tags,
                settings=settings,
            )
        except wandb.Error as error:
            raise PrivtrainError(f"W&B cannot be opened: {error}; {remedy}") from None
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")

    def log_rows(self, rows: Sequence[Row]) -> None:
        """Mirror rows. One time stamp is given with all: W&B would take the moment of each call."""
        timestamp = time.time()
        for step, values in rows:
            self._run.log({"train/step": step, **values, "_timestamp": timestamp})

    def alert(self, title: str, text: str) -> None:
        """Alert by mail or chat, as the project is set up."""
        self._run.alert(title, text)

    def publish(self, run: RunDirectory) -> None:
        """Put ε into the summary; online, log the adapter or model with its card and statement as an artifact.

        Offline no artifact is logged, since W&B's file would hold this machine's paths; ``privtrain track sync`` sends
        it later.
        """
        statement = json.loads(run.privacy.read_text(encoding="utf-8"))
        self._summarise(statement)
        if self._run.offline:
            return
        epsilon = statement["epsilon"]
        aliases = ["latest", "not-private" if epsilon is None else f"eps-{epsilon:.2f}"]
        artifact: Any = self._artifact(statement)
        artifact.add_dir(str(run.released))
        import wandb

        try:
            self._run.log_artifact(artifact, aliases=aliases)
        except wandb.Error as error:
            raise PrivtrainError(
                f"W&B did not take the released files: {error}; start the same command again"
            ) from None

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()

    def _summarise(self, statement: dict[str, Any]) -> None:
        self._run.summary["privacy/epsilon"] = statement["epsilon"]
        self._run.summary["privacy/delta"] = statement["delta"]
        self._run.summary["privacy/ledger_head"] = statement["ledger"]["head"]

    def _artifact(self, statement: dict[str, Any]) -> Any:
        import wandb

        keys = ("epsilon", "delta", "unit", "neighboring_relation", "private")
        return wandb.Artifact(self._name, type="model", metadata={key: statement[key] for key in keys})


class MachineTracker(NullTracker):
    """Adds the load of a machine to the job's one W&B run, and nothing else: it logs no metric of training.

    Args:
        config: names the project.
        run_id: W&B's id of the job's run.
        rank: this machine's first rank, which names the machine in W&B in place of its host name.
    """

    def __init__(self, config: Config, run_id: str, rank: int) -> None:
        settings = careful_settings(machine_label(rank), is_primary=False)
        import wandb

        self._directory = tempfile.TemporaryDirectory(prefix="privtrain-wandb-")
        self._run = wandb.init(
            project=config.tracking.wandb_project,
            id=sweep_run_id() or run_id,
            dir=self._directory.name,
            settings=settings,
        )

    def close(self) -> None:
        """Stop measuring."""
        self._run.finish()
        with contextlib.suppress(OSError):  # W&B's own process may still have it open
            self._directory.cleanup()


def machine_label(rank: int) -> str:
    """Return how a machine is called in W&B."""
    return f"rank-{rank}"


def sweep_run_id() -> str | None:
    """Return the run that a W&B sweep's agent gave this trial."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
