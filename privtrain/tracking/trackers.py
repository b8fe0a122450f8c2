"""Where metrics go: ``metrics.jsonl`` is the truth, W&B mirrors what was released, ``secret/`` keeps the rest."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from privtrain.config import Config, public_tree
from privtrain.plan import PrivacyPlan
from privtrain.rundir import RunDirectory, write_atomically
from privtrain.tracking.metrics import is_released

Values = Mapping[str, float | int | None]


class Tracker(Protocol):
    """Something that records the metrics of a step."""

    def log(self, step: int, values: Values) -> None:
        """Record ``values`` for ``step``."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class NullTracker:
    """What every rank but the first has."""

    def log(self, step: int, values: Values) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class JsonlTracker:
    """One JSON object a step. On resume, rows of steps that will be replayed are dropped first.

    Args:
        path: the file.
        from_step: rows of steps and evaluations that come after this many steps are dropped.
        mode: permissions of a new file.
    """

    def __init__(self, path: pathlib.Path, from_step: int, mode: int = 0o644) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the torn last line of a killed run
                if row["train/step"] < from_step or (row["train/step"] == from_step and not _is_evaluation(row)):
                    kept.append(line)
        write_atomically(path, "".join(line + "\n" for line in kept), mode)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def log(self, step: int, values: Values) -> None:
        """Append a row."""
        self._file.write(json.dumps({"train/step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _is_evaluation(row: dict[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in row)


class WandbTracker:
    """One W&B run a job, on global rank 0 alone, offline unless ``WANDB_MODE`` says otherwise.

    Console capture, code saving, git and machine information are off: they can carry text and paths.
    """

    def __init__(self, config: Config, plan: PrivacyPlan, run: RunDirectory, run_id: str) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_git=True,
            save_code=False,
            disable_code=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            host="privtrain",
            init_timeout=120,
        )
        tags = [plan.unit, plan.sampling, *(["not private"] if plan.not_private_reasons else [])]
        self._run = wandb.init(
            project=config.tracking.wandb_project,
            name=config.run.name,
            id=run_id,
            resume="allow",
            job_type="train",
            dir=str(run.root),
            config={**public_tree(config), "noise_multiplier": plan.noise_multiplier},
            tags=tags,
            settings=settings,
        )
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")

    def log(self, step: int, values: Values) -> None:
        """Mirror a row."""
        self._run.log({"train/step": step, **values})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class ReleaseGate:
    """Splits every row into what may leave ``secret/`` and what may not."""

    def __init__(self, config: Config, public: list[Tracker], private: Tracker) -> None:
        self._tracking = config.tracking
        self._public = public
        self._private = private

    def log(self, step: int, values: Values) -> None:
        """Send released metrics to the public trackers and the rest to ``secret/``."""
        released = {name: value for name, value in values.items() if is_released(name, self._tracking)}
        held_back = {name: value for name, value in values.items() if name not in released}
        if released:
            for tracker in self._public:
                tracker.log(step, released)
        if held_back:
            self._private.log(step, held_back)

    def close(self) -> None:
        """Close them all."""
        for tracker in [*self._public, self._private]:
            tracker.close()


def open_tracker(config: Config, plan: PrivacyPlan, run: RunDirectory, *, run_id: str, from_step: int) -> Tracker:
    """The gate over all configured trackers; for rank 0."""
    public: list[Tracker] = [JsonlTracker(run.metrics, from_step)]
    if config.tracking.wandb:
        public.append(WandbTracker(config, plan, run, run_id))
    return ReleaseGate(config, public, JsonlTracker(run.private_metrics, from_step, mode=0o600))
