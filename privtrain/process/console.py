"""What people see: one line at a time, and a progress bar where there is a terminal."""

from __future__ import annotations

import sys
import time
import types

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_console = Console(highlight=False, soft_wrap=True)

#: Seconds between plain progress lines where there is no terminal.
_LINE_INTERVAL_SECONDS = 15.0


def say(message: str) -> None:
    """Print one message."""
    _console.print(message)


class Progress:
    """Steps done, ε spent, speed and time left: a bar in a terminal, a line now and then elsewhere.

    Speed is in the units that the plan expects a step to draw. How many were drawn is private, and so is how many
    tokens they had.

    Args:
        start: steps that were done before this job.
        total: steps of the run.
        visible: whether to show anything; True on rank 0 alone.
        units_per_step: units (users or records) that a step is expected to draw.
        unit: their name, ``"user"`` or ``"example"``.
    """

    def __init__(self, start: int, total: int, visible: bool, *, units_per_step: float, unit: str) -> None:
        self._units_per_step = units_per_step
        self._unit = unit
        self._total = total
        self._start = start
        self._visible = visible
        self._began = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        if visible and sys.stdout.isatty():
            self._bar = RichProgress(
                TextColumn("steps"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=_console,
            )
            self._task = self._bar.add_task("steps", total=total, completed=start, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int, note: str) -> None:
        """Show that ``done`` steps of the run are done, with a note such as the ε spent so far."""
        if not self._visible:
            return
        now = time.monotonic()
        num_units = self._units_per_step * (done - self._start)
        note = f"{note}  about {num_units / max(now - self._began, 1e-9):.3g} {self._unit}s/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        is_first_or_last = done in (self._start + 1, self._total)
        if is_first_or_last or now - self._last_line > _LINE_INTERVAL_SECONDS:
            self._last_line = now
            eta_seconds = (now - self._began) / max(done - self._start, 1) * (self._total - done)
            say(f"step {done}/{self._total}  {note}  ETA {eta_seconds:.0f} s")
