"""What a terminal or a log shows while a run trains: only what is public."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from privtrain.process import console


def test_a_log_shows_budget_speed_and_time_left(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    lines = []
    monkeypatch.setattr(console, "say", lines.append)
    with console.Progress(3, 7, True, units_per_step=50.0, unit="user") as progress:
        progress.advance(4, "ε 1.0/4.0")
        progress.advance(7, "ε 4.0/4.0")
    assert lines == ["step 4/7  ε 1.0/4.0  about 5 users/s  ETA 30 s", "step 7/7  ε 4.0/4.0  about 10 users/s  ETA 0 s"]


def test_a_terminal_shows_them_in_a_bar(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "_console", Console(file=shown, force_terminal=True, width=120))
    with console.Progress(0, 2, True, units_per_step=50.0, unit="user") as progress:
        progress.advance(2, "ε 4.0/4.0")
    assert all(part in shown.getvalue() for part in ("2/2", "ε 4.0/4.0", "users/s", "ETA"))


def test_other_ranks_show_nothing(monkeypatch):
    monkeypatch.setattr(console, "say", pytest.fail)
    with console.Progress(0, 1, False, units_per_step=1.0, unit="user") as progress:
        progress.advance(1, "")
