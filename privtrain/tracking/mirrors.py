"""Mirrors see steps late: when a row arrives, or what time it bears, must not tell how long a step took.

A step takes as long as the records that were drawn, so whoever watches rows arrive one by one (W&B's server, anybody
with access to the project, a reader of TensorBoard's event files) learns who may have been in a step: seconds alone
found a user with long records in every step of its (measured: AUC 1.0 at ε 0.26). So a mirror that nobody can watch
(W&B offline) is opened when the run is released, and shown everything then. To one that people watch rows go a block of
steps at a time: W&B's server stamps them with the moment of the block, whoever watches TensorBoard's event files sees
them grow, and the privacy statement says so. Once closed, event files bear only the moment at which they were opened.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from privtrain.files.atomic import write_json
from privtrain.run.directory import RunDirectory

Values = Mapping[str, float | int | None]
Row = tuple[int, Values]


class Mirror(Protocol):
    """Something that shows released rows to people."""

    def log_rows(self, rows: Sequence[Row]) -> None:
        """Show rows of (step, values), all of them under one time stamp."""
        ...

    def alert(self, title: str, text: str) -> None:
        """Call somebody's attention. Both texts are public."""
        ...

    def publish(self, run: RunDirectory) -> None:
        """Take up what the finished run released."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class BlockedMirror:
    """A tracker that keeps rows and alerts back until a block of steps is whole, or the run ends or is pre-empted.

    ``metrics.jsonl`` is the source of truth: what a killed job kept back is read from there when it goes on.

    Args:
        mirror: where rows go.
        run: the run directory; ``secret/mirrored_NAME.json`` remembers the last step that was shown.
        name: of the mirror there.
        num_steps: steps of a block.
        from_step: steps behind the job as it begins; what comes after them is logged again.
        is_live: whether somebody may watch rows arrive, which is remembered beside the last step.
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
        #: The last step that people were shown.
        self._shown = min(note.get("step", -1), from_step)
        self._rows = [row for row in _rows_of(run) if row[0] > self._shown]
        if is_live:
            self._note()

    def log(self, step: int, values: Values) -> None:
        """Keep a row; show the block if this row begins another one."""
        if step - max(self._shown, 0) > self._num_steps and self._rows:
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
        """Show what was kept back, and note how far."""
        if self._rows:
            self._mirror.log_rows(self._rows)
            self._shown = max(step for step, _ in self._rows)
            self._note()
            self._rows = []
        for title, text in self._alerts:
            self._mirror.alert(title, text)
        self._alerts = []

    def _note(self, *, release: bool = False) -> None:
        write_json(self._path, {"step": self._shown, "release": release, "live": self._was_live}, mode=0o600)


class MirrorAtTheEnd:
    """A mirror that is opened when the run is released, and shown every row then."""

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
"""Beyond every step: nothing is logged again."""


def was_watched(run: RunDirectory, name: str) -> bool:
    """Return whether some job of the run showed rows to a mirror while it trained, which people could watch."""
    return _read(_note_path(run, name)).get("live", 0) == 1


def has_shown_release(run: RunDirectory, name: str) -> bool:
    """Return whether a mirror took up what a finished run released."""
    return _read(_note_path(run, name)).get("release", 0) == 1


def _note_path(run: RunDirectory, name: str) -> pathlib.Path:
    return run.secret / f"mirrored_{name}.json"


def _read(path: pathlib.Path) -> dict[str, int]:
    """Return the last step that was shown, and whether the release was; a torn or missing file shows them once more."""
    try:
        return {name: int(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _rows_of(run: RunDirectory) -> list[Row]:
    """Return the rows of ``metrics.jsonl``, whose opening cut it back to the checkpoint that training goes on from."""
    rows = []
    for line in run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else []:
        row = json.loads(line)
        step = row.pop("train/step")
        rows.append((step, row))
    return rows
