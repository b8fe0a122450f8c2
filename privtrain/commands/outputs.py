"""What must hold of a run and of a new directory that a command writes from it."""

from __future__ import annotations

import pathlib

from privtrain.errors import Fault
from privtrain.files.writable import why_unwritable
from privtrain.run.directory import RunDirectory


def output_faults(run: RunDirectory, output: pathlib.Path) -> list[Fault]:
    """Return why nothing can be written from ``run`` to ``output``; empty if it can."""
    faults = []
    if not run.is_complete():
        problem = f"{run.root} holds no finished run (no release.json); finish it with privtrain train"
        faults.append(Fault("RUN", problem))
    if output.exists():
        faults.append(Fault("OUTPUT", f"{output} exists; choose another directory or remove it"))
    elif problem := why_unwritable(output.parent):
        faults.append(Fault("OUTPUT", problem))
    elif run.holds(output):
        faults.append(Fault("OUTPUT", f"{output} is inside the run, where it would be no part of the release"))
    return faults
