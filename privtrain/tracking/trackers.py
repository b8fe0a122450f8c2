"""Where metrics go: ``metrics.jsonl`` is the truth, others mirror what was released, ``secret/`` keeps the rest."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

from privtrain.config import Config
from privtrain.files.atomic import write_atomically
from privtrain.run.directory import RunDirectory
from privtrain.tracking.metrics import is_released
from privtrain.tracking.mirrors import Values

#: Share of the planned steps at which people are alerted, once so many are charged.
_ALERT_BUDGET_FRACTION = 0.9


class Tracker(Protocol):
    """Something that records the metrics of a step."""

    def log(self, step: int, values: Values) -> None:
        """Record ``values`` for ``step``."""
        ...

    def alert(self, title: str, text: str) -> None:
        """Alert people; both texts are public."""
        ...

    def publish(self, run: RunDirectory) -> None:
        """Record what the finished run released."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class QuietTracker:
    """Base of trackers that do nothing about alerts and releases."""

    def alert(self, title: str, text: str) -> None:
        """Do nothing."""

    def publish(self, run: RunDirectory) -> None:
        """Do nothing."""


class NullTracker(QuietTracker):
    """A tracker that records nothing, for every rank but the first."""

    def log(self, step: int, values: Values) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class CallbackTracker(QuietTracker):
    """A tracker that calls a function of the caller's own with (step, values)."""

    def __init__(self, on_step: Callable[[int, Values], None]) -> None:
        self._on_step = on_step

    def log(self, step: int, values: Values) -> None:
        """Call the function."""
        self._on_step(step, values)

    def close(self) -> None:
        """Do nothing."""


class JsonlTracker(QuietTracker):
    """Writes one JSON object a row. On resume, rows that will be logged again are dropped first.

    Args:
        path: the file.
        from_step: steps that are done as the job begins; rows of later steps are dropped, and so is an evaluation after
            exactly so many steps.
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
                # A row's step is the number of steps done. The row of the step that reached from_step is kept, but not
                # the evaluation of that model: the resumed job makes and logs it again.
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


class ReleaseGate:
    """A tracker that splits every row: what may be published goes to the public trackers, the rest to ``secret/``.

    Args:
        config: ``tracking`` says which kinds of metrics are published.
        public: trackers of published metrics.
        private: tracker of the others, in ``secret/``.
    """

    def __init__(self, config: Config, public: list[Tracker], private: Tracker) -> None:
        self._tracking = config.tracking
        self._public = public
        self._private = private
        self._budget_fraction: float | None = None

    def log(self, step: int, values: Values) -> None:
        """Send released metrics to the public trackers and the rest to ``secret/``."""
        released = {name: value for name, value in values.items() if is_released(name, self._tracking)}
        held_back = {name: value for name, value in values.items() if name not in released}
        if released:
            for tracker in self._public:
                tracker.log(step, released)
        if held_back:
            self._private.log(step, held_back)
        for title, text in self._alerts(released):
            self.alert(title, text)

    def alert(self, title: str, text: str) -> None:
        """Pass the alert on to the public trackers."""
        for tracker in self._public:
            tracker.alert(title, text)

    def publish(self, run: RunDirectory) -> None:
        """Pass the release on to the public trackers."""
        for tracker in self._public:
            tracker.publish(run)

    def _alerts(self, released: Values) -> list[tuple[str, str]]:
        """Return alerts (title, text) that follow from published metrics alone.

        A non-finite gradient, for one, tells something of private records, so it is alerted only where its count is
        published.
        """
        alerts = []
        before, now = self._budget_fraction, released.get("privacy/budget_fraction") or 0.0
        self._budget_fraction = now
        # Not at a job's first row, before which nothing is known: an earlier job may have alerted already.
        if before is not None and before < _ALERT_BUDGET_FRACTION <= now:
            alerts.append(("Privacy budget", f"{_ALERT_BUDGET_FRACTION:.0%} of the steps are charged"))
        if released.get("train/num_nonfinite_units"):
            alerts.append(("Non-finite gradients", f"{released['train/num_nonfinite_units']} units contributed zero"))
        return alerts

    def close(self) -> None:
        """Close all trackers."""
        for tracker in [*self._public, self._private]:
            tracker.close()
