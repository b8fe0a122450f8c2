"""Run a study: expand its grid, start the jobs that are not complete, continue after failures, and write the report.

A *cell* is a combination of the grid's axis values and a seed. Cells whose configurations are equal share a *job*: a
training and the commands that follow it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.progress
import rich.table
from rich.console import Console

from privtrain.errors import ConfigError, Fault, Preempted, PrivtrainError, RunBusy
from privtrain.files.atomic import write_atomically
from privtrain.studies.jobs import Job, Processes, State, jobs_of, run_job, thread_environment
from privtrain.studies.recipe import Cell, Recipe, expand, fill, module_of, read_recipe, recipe_path
from privtrain.studies.report import Run, write_report
from privtrain.studies.results import CellResult, Results

_console = Console(highlight=False, soft_wrap=True)


class StudyIncompleteError(PrivtrainError):
    """Some cells failed; the others are complete and reported."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """What the command line says.

    Attributes:
        scale: ``"small"`` or ``"paper"``.
        recipe: file that takes the place of the shipped recipe.
        output: directory of the study; default ``runs/studies/NAME-SCALE``.
        num_jobs: cells that run at the same time.
        num_threads: CPU threads of each.
        only: shell patterns of cell names; the others stay as they are.
        dry_run: show the grid, start nothing.
        here: start the cells of a paper-scale study on this machine.
        submit: command that takes a job array, e.g. ``sbatch``.
    """

    scale: str = "small"
    recipe: pathlib.Path | None = None
    output: pathlib.Path | None = None
    num_jobs: int = 1
    num_threads: int = 1
    only: tuple[str, ...] = ()
    dry_run: bool = False
    here: bool = False
    submit: str | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """A study on disk.

    Attributes:
        recipe: base configuration, axes and seeds.
        module: the study's Python module, which may complete cells (``settle``) and reads results (``find``).
        root: directory of the study.
        data: directory of the prepared files that all jobs read.
        recipe_directory: where the recipe lies.
        cells: of the grid.
        jobs: of the cells.
    """

    recipe: Recipe
    module: Any
    root: pathlib.Path
    data: pathlib.Path
    recipe_directory: pathlib.Path
    cells: tuple[Cell, ...]
    jobs: tuple[Job, ...]

    @classmethod
    def open(cls, name: str, options: StudyOptions) -> Study:
        """Read the recipe and expand its grid; touches no file.

        Raises:
            ConfigError: with every fault of the recipe and of every cell.
        """
        path = options.recipe or recipe_path(name, options.scale)
        recipe = read_recipe(path)
        if recipe.study != name:
            raise ConfigError([Fault("study", f"the recipe is of {recipe.study!r}, not of {name!r}")])
        module = module_of(recipe)
        cells = expand(recipe, getattr(module, "settle", None))
        root = options.output or pathlib.Path("runs/studies") / f"{name}-{options.scale}"
        # Another recipe of the data gets another directory, so that no job reads files that were made otherwise.
        recipe_of_data = json.dumps(recipe.prepare, sort_keys=True).encode()
        data = root / "data" / hashlib.sha256(recipe_of_data).hexdigest()[:16]
        jobs = jobs_of(cells, root, data, path.parent)
        return cls(recipe, module, root, data, path.parent, tuple(cells), tuple(jobs))

    def chosen(self, only: Sequence[str]) -> list[Job]:
        """Return the jobs with a cell whose name matches one of the shell patterns; all jobs without a pattern.

        Raises:
            ConfigError: if a pattern matches no cell.
        """
        if not only:
            return list(self.jobs)
        wanted: set[str] = set()
        faults = []
        for pattern in only:
            matching = fnmatch.filter([cell.name for cell in self.cells], pattern)
            wanted.update(matching)
            if not matching:
                faults.append(Fault("--only", f"no cell is named {pattern}; see --dry-run"))
        if faults:
            raise ConfigError(faults)
        return [job for job in self.jobs if any(cell.name in wanted for cell in job.cells)]

    def results(self) -> Results:
        """Return what is complete, in the order of the grid."""
        runs = {job.digest: job.run for job in self.jobs if job.state() == "complete"}
        complete = [CellResult(cell, runs[cell.digest]) for cell in self.cells if cell.digest in runs]
        return Results(self.recipe, complete, self.cells)


def run_study(name: str, options: StudyOptions) -> None:
    """Show a study's grid, or run its jobs (at paper scale: list or submit them) and write the report.

    Args:
        name: of the study.
        options: what the command line says.

    Raises:
        ConfigError: for a recipe that cannot be run; nothing was started.
        StudyIncompleteError: if cells failed; the others are complete and the report is written.
        Preempted: if the study was asked to stop; the same command goes on.
    """
    study = Study.open(name, options)
    chosen = study.chosen(options.only)
    if options.dry_run:
        _show_grid(study, chosen)
        return
    to_run = [job for job in chosen if job.state() != "complete"]
    if options.scale == "paper" and not options.here:
        _hand_out(study, to_run, options)
    elif to_run:
        _prepare(study, options.num_threads)
        _run_all(to_run, options, len(chosen) - len(to_run))
    _report(study, chosen, options)


def _report(study: Study, chosen: Sequence[Job], options: StudyOptions) -> None:
    """Write the report of what is complete.

    Raises:
        StudyIncompleteError: if a chosen job failed; the report is written all the same.
    """
    failed = [job for job in study.jobs if job.state() == "failed"]
    open_jobs = [job for job in study.jobs if job.state() == "open"]
    results = study.results()
    if not results.cells and not failed:
        return
    records = [job.record() or {} for job in study.jobs]
    run = Run(
        recipe=study.recipe,
        module=study.module,
        scale=options.scale,
        root=study.root,
        results=results,
        failed=[(job.name, job.record() or {}) for job in failed],
        num_open=len(open_jobs),
        seconds=sum(record.get("seconds_of_last_start", 0.0) for record in records),
        num_jobs=len(study.jobs),
        software=_software(study.jobs),
        command=_command(study, options),
    )
    page = write_report(run)
    _console.print(f"report: {page}")
    lost = [job.name for job in chosen if job.state() == "failed"]
    if lost:
        raise StudyIncompleteError(
            f"{len(lost)} of {len(chosen)} jobs failed: {', '.join(lost)}; the same command runs them again"
        )


def _software(jobs: Sequence[Job]) -> list[Mapping[str, Any]]:
    """Return the software that complete jobs recorded, each combination of versions once."""
    combinations: list[Mapping[str, Any]] = []
    for job in jobs:
        if job.state() != "complete":
            continue
        facts = (job.record() or {}).get("software")
        if facts is not None and facts not in combinations:
            combinations.append(facts)
    return combinations


def _command(study: Study, options: StudyOptions) -> str:
    """Return the command line that continues the study, with the options that decide what it does."""
    recipe = [] if options.recipe is None else ["--recipe", str(options.recipe)]
    here = ["--here"] if options.scale == "paper" else []
    words = ["privtrain", "study", study.recipe.study, "--scale", options.scale, "--output", str(study.root)]
    return shlex.join([*words, *recipe, *here])


def _prepare(study: Study, num_threads: int) -> None:
    """Write the study's data files by the recipe's commands, each once; a file is there whole or not at all.

    Raises:
        ConfigError: if a command fails, with the end of what it printed.
    """
    for file_name, command in study.recipe.prepare.items():
        target = study.data / file_name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".part-{target.name}")
        # What a command that was cut off has left: a file, or a directory of files.
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
        log = study.data / "log.txt"
        _console.print(f"preparing {target}")
        places = {"file": str(temporary), "data": str(study.data), "recipe": str(study.recipe_directory)}
        words = fill(command, places)
        code = Processes(thread_environment(num_threads)).run(words, log)
        if code != 0 or not temporary.exists():
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            problem = f"{command!r} ended with {code}: {' | '.join(last)}"
            raise ConfigError([Fault(f"prepare.{file_name}", problem)])
        os.replace(temporary, target)


def _run_all(jobs: Sequence[Job], options: StudyOptions, num_complete: int) -> None:
    """Run the jobs, ``options.num_jobs`` at a time, with a progress bar; a job that fails does not stop the others.

    Raises:
        Preempted: if the study was asked to stop.
    """
    processes = Processes(thread_environment(options.num_threads))
    bar = rich.progress.Progress(
        rich.progress.TextColumn("cells"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("ETA"),
        rich.progress.TimeRemainingColumn(),
        console=_console,
        disable=not _console.is_terminal,
    )
    if num_complete:
        _console.print(f"{num_complete} jobs are complete and stay as they are")
    pool = concurrent.futures.ThreadPoolExecutor(options.num_jobs)
    with bar, _passing_signals(processes), pool:
        task = bar.add_task("cells", total=len(jobs))
        futures = {pool.submit(_outcome, job, processes): job for job in jobs}
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            job = futures[future]
            state, note = future.result()
            bar.advance(task)
            if state != "open":
                _console.print(f"[{number}/{len(jobs)}] {state}: {job.name}{note}", markup=False)
    if processes.stopping.is_set():
        raise Preempted("asked to stop; complete cells are recorded, the same command goes on")


def _outcome(job: Job, processes: Processes) -> tuple[State | str, str]:
    """Run a job; return how it ended, and a note for people."""
    try:
        state = run_job(job, processes)
    except RunBusy as error:
        return "left out", f" ({error})"
    record = job.record() or {}
    if state == "failed":
        return state, f": {record['command']} ended with {record['exit_code']}; see {job.log}"
    return state, f" ({record.get('seconds_of_last_start', 0)} s)"


@contextlib.contextmanager
def _passing_signals(processes: Processes) -> Iterator[None]:
    """Stop the started jobs on SIGTERM and Ctrl-C within the block: they save themselves, then the study ends."""
    previous = {
        number: signal.signal(number, lambda *_: processes.stop()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _show_grid(study: Study, chosen: Sequence[Job]) -> None:
    """Print the cells of the chosen jobs with their states, and the commands of the first job."""
    table = rich.table.Table(title=f"{study.recipe.study}: {len(study.cells)} cells, {len(study.jobs)} jobs")
    for column in ("cell", "job", "state"):
        table.add_column(column, overflow="fold")
    for job in chosen:
        for cell in job.cells:
            shared = "" if cell is job.cells[0] else " (shared)"
            table.add_row(cell.name, f"{job.directory.name}{shared}", job.state())
    _console.print(table)
    for command in chosen[0].commands():
        _console.print(f"  {shlex.join(command)}", markup=False)


def _hand_out(study: Study, jobs: Sequence[Job], options: StudyOptions) -> None:
    """Write the list of cells for a job array; then submit it, or print the commands that run the cells.

    Args:
        study: at paper scale.
        jobs: to be run.
        options: ``submit`` is the scheduler's command, e.g. ``sbatch``; without it nothing is submitted.
    """
    if not jobs:
        return
    study.root.mkdir(parents=True, exist_ok=True)
    names = study.root / "cells.txt"
    write_atomically(names, "".join(f"{job.name}\n" for job in jobs))
    recipe = [] if options.recipe is None else ["--recipe", str(options.recipe)]
    arguments = [study.recipe.study, "--scale", "paper", "--output", str(study.root), *recipe]
    # study.sbatch takes the list of cells, then what follows "privtrain study"; each task runs the cell of its number.
    array = ["--array", f"0-{len(jobs) - 1}", "launch/slurm/study.sbatch", str(names), *arguments]
    if options.submit is not None:
        done = subprocess.run([*shlex.split(options.submit), *array], check=False)
        if done.returncode:
            raise PrivtrainError(f"{options.submit} ended with {done.returncode}; nothing was submitted")
        return
    _console.print(f"{len(jobs)} cells are to be run. One by one, on a machine that has the devices:")
    for job in jobs:
        command = ["privtrain", "study", *arguments, "--here", "--only", job.name]
        _console.print(f"  {shlex.join(command)}", markup=False)
    _console.print(f"or all of them: sbatch {shlex.join(array)}", markup=False)
    _console.print("then the command that you gave writes the report")
