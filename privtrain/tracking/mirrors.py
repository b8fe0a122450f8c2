"""Mirrors see steps late: when a row arrives, or what time it bears, must not tell how long a step took.

A mirror is a tracking service (W&B, TensorBoard, MLflow, trackio) that is shown the released metrics, a row a step. A
step takes as long as the records that were drawn. So whoever watches rows arrive one by one (W&B's server, anybody with
access to the project, a reader of TensorBoard's event files) learns who may have been in a step: seconds alone found a
user with long records in every step that drew them (measured: AUC 1.0 at ε 0.26).

So a mirror that nobody can watch (W&B offline) is opened when the run is released, and shown everything then. A mirror
that people watch ("live") gets rows a block of steps at a time: W&B's server stamps them with the moment of the block,
whoever watches TensorBoard's event files sees them grow, and the privacy statement says so. Once closed, event files
bear only the moment at which they were opened.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from privtrain.files.atomic import write_json
from privtrain.run.directory import RunDirectory

Values = Mapping[str, float | int | None]
"""Name of a metric to its value."""

Row = tuple[int, Values]
"""(step, values)."""


class Mirror(Protocol):
    """A tracking service that shows rows of released metrics to people."""

    def log_rows(self, rows: Sequence[Row]) -> None:
        """Show rows of (step, values), all of them under one time stamp."""
        ...

    def alert(self, title: str, text: str) -> None:
        """Alert people; both texts are public."""
        ...

    def publish(self, run: RunDirectory) -> None:
        """Show what the finished run released: its statement, and the adapter or model if the service takes files."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class BlockedMirror:
    """A tracker that keeps rows and alerts back until a block of steps is whole, or the run ends or is pre-empted.

    ``metrics.jsonl`` is the source of truth: rows that a killed job had kept back are read from there on resume.

    Args:
        mirror: where rows go.
        run: the run directory; ``secret/mirrored_NAME.json`` remembers the last step that was shown.
        name: of the mirror there.
        num_steps: steps of a block.
        from_step: steps that are done as the job begins. Later ones, if a killed job did some, are done again, and
            their rows are shown again.
        is_live: whether somebody may watch rows arrive; the file remembers that, too.
    """

    def __init__(
        self, mirror: Mirror, run: RunDirectory, name: str, *, num_steps: int, from_step: int, is_live: bool = False
    ) -> None:
        self._mirror = mirror
        self._path = _note_path(run, name)
        self._num_steps = num_steps
        self._alerts: list[tuple[str, str]] = []
        note = _read(self._path)
        #: Whether some job of the run showed rows as they came.
        self._was_live = is_live or note.get("live", 0) == 1
        #: The last step that people were shown, of those that are not done again; -1 if none was.
        self._shown = min(note.get("step", -1), from_step)
        # What a killed job kept back. The file has no rows of steps that are done again: its writer, which is opened
        # first, dropped them.
        self._rows = [(step, values) for step, values in rows_of(run) if step > self._shown]
        if is_live:
            self._note()

    def log(self, step: int, values: Values) -> None:
        """Keep a row; if it begins a new block, show the rows of the last one first.

        Blocks of 3 steps have the rows 0 to 3, 4 to 6, 7 to 9: row 0, of the model before its first step, comes along.
        """
        last_of_block = max(self._shown, 0) + self._num_steps
        if step > last_of_block and self._rows:
            self._flush()
        self._rows.append((step, values))

    def alert(self, title: str, text: str) -> None:
        """Keep an alert until its block is shown."""
        self._alerts.append((title, text))

    def publish(self, run: RunDirectory) -> None:
        """Show everything, then what was released."""
        self._flush()
        self._mirror.publish(run)
        self._note(release=True)

    def close(self) -> None:
        """Show what is left and end."""
        self._flush()
        self._mirror.close()

    def _flush(self) -> None:
        """Show all rows and alerts that were kept back, and note the last step that was shown."""
        if self._rows:
            self._mirror.log_rows(self._rows)
            self._shown = max(step for step, _ in self._rows)
            self._note()
            self._rows = []
        for title, text in self._alerts:
            self._mirror.alert(title, text)
        self._alerts = []

    def _note(self, *, release: bool = False) -> None:
        """Write ``secret/mirrored_NAME.json``; ``release`` says whether the mirror was shown the release."""
        write_json(self._path, {"step": self._shown, "release": release, "live": self._was_live}, mode=0o600)


class MirrorAtTheEnd:
    """A tracker whose mirror is opened when the run is released, and shown every row then.

    Args:
        opened: opens the mirror.
        run: the run directory, whose ``metrics.jsonl`` holds the rows.
        name: of the mirror, for its file in ``secret/``.
    """

    def __init__(self, opened: Callable[[], Mirror], run: RunDirectory, name: str) -> None:
        self._opened = opened
        self._run = run
        self._name = name
        self._alerts: list[tuple[str, str]] = []

    def log(self, step: int, values: Values) -> None:
        """Do nothing: ``metrics.jsonl`` has it."""

    def alert(self, title: str, text: str) -> None:
        """Keep an alert until the end."""
        self._alerts.append((title, text))

    def publish(self, run: RunDirectory) -> None:
        """Open the mirror, show everything and what was released, and close it."""
        mirror = BlockedMirror(self._opened(), run, self._name, num_steps=1, from_step=_LAST)
        for title, text in self._alerts:
            mirror.alert(title, text)
        mirror.publish(run)
        mirror.close()

    def close(self) -> None:
        """Do nothing: a run that is not released is not shown yet."""


_LAST = 1 << 62
"""Beyond every step, as ``from_step``: no row is logged again."""


def was_watched(run: RunDirectory, name: str) -> bool:
    """Return whether some job of the run showed rows to a mirror while it trained, which people could watch."""
    return _read(_note_path(run, name)).get("live", 0) == 1


def has_shown_release(run: RunDirectory, name: str) -> bool:
    """Return whether a mirror took up what a finished run released."""
    return _read(_note_path(run, name)).get("release", 0) == 1


def _note_path(run: RunDirectory, name: str) -> pathlib.Path:
    return run.secret / f"mirrored_{name}.json"


def _read(path: pathlib.Path) -> dict[str, int]:
    """Return the content of a mirror's file in ``secret/``; empty if it is missing or torn.

    ``step`` is the last step that was shown; ``release`` and ``live`` are 0 or 1. Without the file everything is shown
    once more, which does no harm.
    """
    try:
        return {name: int(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def rows_of(run: RunDirectory) -> list[Row]:
    """Return the rows of ``metrics.jsonl``.

    The tracker that writes the file was opened before and dropped rows of steps that will be done again.
    """
    rows = []
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else []
    for line in lines:
        row = json.loads(line)
        step = row.pop("train/step")
        rows.append((step, row))
    return rows
