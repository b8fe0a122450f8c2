"""The mirror in MLflow: one run, shown at the release; where it goes says ``MLFLOW_TRACKING_URI``."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from privtrain.config import Config, public_tree
from privtrain.errors import PrivtrainError
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.directory import RunDirectory
from privtrain.tracking.mirrors import Row
from privtrain.tracking.trackers import QuietTracker

#: Tag of MLflow's run that holds our run's id: by it a later job finds the one that an earlier job did not finish.
_TAG = "privtrain.run"

#: Most of each that a server takes at once, and the longest value of a parameter.
_MOST_METRICS, _MOST_PARAMETERS, _LONGEST = 1000, 100, 500


class MlflowTracker(QuietTracker):
    """Mirrors rows, parameters and the release; needs the package ``mlflow`` or ``mlflow-skinny``.

    The client is used by itself: MLflow's own ``start_run`` would add user, script and git commit.

    Args:
        config: only its public part is sent; ``tracking.wandb_project`` names the experiment.
        plan: the privacy plan.
        run_id: id of our run, the same on every resume.

    Raises:
        PrivtrainError: if the server does not answer; what was released stands.
    """

    def __init__(self, config: Config, plan: PrivacyPlan, run_id: str) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self._failure: type[Exception] = mlflow.exceptions.MlflowException
        self._client: Any = mlflow.MlflowClient()
        self._entities: Any = mlflow.entities
        with self._answered():
            self._id = self._found_or_made(config, run_id)
            tree = {**public_tree(config), "noise_multiplier": plan.noise_multiplier}
            shown = [self._entities.Param(name, str(value)[:_LONGEST]) for name, value in _flat(tree)]
            for start in range(0, len(shown), _MOST_PARAMETERS):
                self._client.log_batch(self._id, params=shown[start : start + _MOST_PARAMETERS])

    def log_rows(self, rows: Sequence[Row]) -> None:
        """Mirror rows, all under one time stamp."""
        now = int(time.time() * 1000)
        metrics: list[Any] = []
        for step, values in rows:
            for name, value in values.items():
                if value is not None:
                    metrics.append(self._entities.Metric(name, float(value), now, step))
        with self._answered():
            for start in range(0, len(metrics), _MOST_METRICS):
                self._client.log_batch(self._id, metrics=metrics[start : start + _MOST_METRICS])

    def publish(self, run: RunDirectory) -> None:
        """Log the statement, the adapter or model with its card, and ε as a tag."""
        statement = json.loads(run.privacy.read_text(encoding="utf-8"))
        epsilon = statement["epsilon"]
        with self._answered():
            self._client.set_tag(self._id, "privacy.epsilon", "not private" if epsilon is None else f"{epsilon:.6g}")
            self._client.set_tag(self._id, "privacy.delta", f"{statement['delta']:g}")
            self._client.log_artifact(self._id, str(run.privacy))
            self._client.log_artifacts(self._id, str(run.released), run.released.name)

    def close(self) -> None:
        """End the run."""
        with self._answered():
            self._client.set_terminated(self._id, "FINISHED")

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        """Turn a failure of MLflow within the block into a PrivtrainError that says what to do.

        MLflow's own message is left out: it may hold a password that is part of the URI.
        """
        try:
            yield
        except self._failure as error:
            remedy = "mend MLFLOW_TRACKING_URI, or set tracking.mlflow: false; then start the same command again"
            raise PrivtrainError(f"MLflow does not answer ({type(error).__name__}); {remedy}") from None

    def _found_or_made(self, config: Config, run_id: str) -> str:
        """Return the id of MLflow's run with this run's tag, made if there is none."""
        project = config.tracking.wandb_project
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        # The first that the search finds, if any.
        for run in self._client.search_runs([experiment_id], f"tags.`{_TAG}` = '{run_id}'"):
            return run.info.run_id
        made = self._client.create_run(experiment_id, tags={_TAG: run_id}, run_name=config.run.name)
        return made.info.run_id


def _flat(tree: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with dotted names: ``{"a": {"b": 1}}`` gives ``("a.b", 1)``."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value
