"""The mirror in trackio: shown at the release; in its local store, or in the Space that ``TRACKIO_SPACE_ID`` names."""

from __future__ import annotations

import json
from collections.abc import Sequence

from privtrain.config import Config, public_tree
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.directory import RunDirectory
from privtrain.tracking.mirrors import Row
from privtrain.tracking.trackers import QuietTracker


class TrackioTracker(QuietTracker):
    """Mirrors rows and ε; needs the package ``trackio``. The machine's load is not measured.

    Args:
        config: only its public part is shown.
        plan: the privacy plan.
        run_id: names the run with ``run.name``, the same on every resume.
    """

    def __init__(self, config: Config, plan: PrivacyPlan, run_id: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        trackio.init(
            project=config.tracking.wandb_project,
            name=f"{config.run.name}-{run_id}",
            config={**public_tree(config), "noise_multiplier": plan.noise_multiplier},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._last_step = 0
        self._is_open = True

    def log_rows(self, rows: Sequence[Row]) -> None:
        """Mirror rows."""
        for step, values in rows:
            self._last_step = max(self._last_step, step)
            self._trackio.log({name: value for name, value in values.items() if value is not None}, step=step)

    def alert(self, title: str, text: str) -> None:
        """Show an alert beside the run."""
        self._trackio.alert(title=title, text=text)

    def publish(self, run: RunDirectory) -> None:
        """Log ε and δ of the release at the last step."""
        statement = json.loads(run.privacy.read_text(encoding="utf-8"))
        guarantee = {f"privacy/released_{name}": statement[name] for name in ("epsilon", "delta")}
        self._trackio.log({name: value for name, value in guarantee.items() if value is not None}, step=self._last_step)

    def close(self) -> None:
        """End the run."""
        if self._is_open:
            self._trackio.finish()
        self._is_open = False
