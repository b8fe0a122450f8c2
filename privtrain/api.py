"""privtrain from Python: the functions that ``import privtrain`` offers. The command line calls the same code.

A configuration is a :class:`~privtrain.config.Config`, a mapping of sections, or the path of a YAML file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from privtrain.config import Config, load_config
from privtrain.config.dotted import assigned
from privtrain.config.load import read_tree, validate
from privtrain.errors import ConfigError, Fault, PrivtrainError
from privtrain.files import reading
from privtrain.run.directory import RunDirectory
from privtrain.run.statement import PrivacyStatement

if TYPE_CHECKING:
    from privtrain.commands.verify import Verified
    from privtrain.data.look import Look
    from privtrain.privacy.plan import PrivacyPlan

AnyPath = str | os.PathLike[str]
AnyConfig = Config | Mapping[str, Any] | AnyPath
#: Rows as column → value; a ``datasets.Dataset`` yields such mappings.
Rows = Iterable[Mapping[str, Any]]
#: Called with the number of steps done and the metrics that were released then.
OnStep = Callable[[int, Mapping[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory that training began.

    Attributes:
        directory: where it is.
    """

    directory: pathlib.Path

    @property
    def is_complete(self) -> bool:
        """Whether the run is finished: it has released its adapter or model."""
        return RunDirectory(self.directory).is_complete()

    @property
    def statement(self) -> PrivacyStatement:
        """What is guaranteed, for whom, and on which assumptions.

        Raises:
            DamagedFile: if nothing was released yet, or the file is damaged.
        """
        path = RunDirectory(self.directory).privacy
        return PrivacyStatement.model_validate(reading.read_json(path, remedy="it is written at the release"))

    @property
    def epsilon(self) -> float | None:
        """ε of the released model for its privacy unit; ``None`` where it is infinite."""
        return self.statement.epsilon

    @property
    def delta(self) -> float:
        """δ that belongs to :attr:`epsilon`."""
        return self.statement.delta

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Released metrics: name → value for each step or measurement; empty where there are none yet."""
        path = RunDirectory(self.directory).metrics
        return [row for _, row in reading.read_json_lines(path)] if path.is_file() else []

    @property
    def released(self) -> pathlib.Path:
        """Directory of the adapter or model, for ``from_pretrained``."""
        return RunDirectory(self.directory).released


def configure(
    model: AnyPath,
    data: Rows | AnyPath,
    *,
    user_column: str | None = None,
    num_users: int | None = None,
    output_dir: AnyPath = "runs",
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """Return a configuration for a model and rows; format, columns and plan are guessed as ``privtrain init`` does.

    Args:
        model: directory or hub name of the base model.
        data: a JSONL, CSV or Parquet file or a pattern of such, or rows: mappings, or a ``datasets.Dataset``. Rows are
            kept in ``OUTPUT_DIR/rows`` (mode 0700), so that the run can be resumed and attacked.
        user_column: column of the user id; guessed by its name without it.
        num_users: a public number of users; without it the number in the data, rounded down to one digit. The plan is
            made for it and published with it.
        output_dir: parent of run directories.
        settings: dotted key → value, e.g. ``{"privacy.target_epsilon": 4}``; they override what was guessed.

    Raises:
        ConfigError: with every fault.
    """
    from privtrain.commands.init import guess_configuration
    from privtrain.data.store import store_rows

    parent = pathlib.Path(output_dir)
    path = pathlib.Path(data) if isinstance(data, str | os.PathLike) else store_rows(data, parent)
    guessed = guess_configuration(
        os.fspath(model),
        [path],
        user_column=user_column,
        num_users=num_users,
        held_out_fraction=(settings or {}).get("data.held_out_fraction"),  # the plan is made for those who are left
    )
    run_section = {"name": guessed.tree["run"]["name"], "output_dir": str(parent)}
    return _config({**guessed.tree, "run": run_section}, settings)


def plan(config: AnyConfig, settings: Mapping[str, Any] | None = None) -> PrivacyPlan:
    """Return everything that the guarantee depends on, ε and noise included. No data are read.

    Args:
        config: the configuration.
        settings: dotted key → value that overrides it.

    Raises:
        ConfigError: with every fault.
    """
    from privtrain.privacy.plan import PrivacyPlan

    checked = _config(config, settings)
    return PrivacyPlan.build(checked.privacy, checked.training)


def preview(config: AnyConfig, settings: Mapping[str, Any] | None = None) -> Look:
    """Return what a run would learn from: lengths, what is predicted, why records are useless. Private.

    Args:
        config: the configuration.
        settings: dotted key → value that overrides it.

    Raises:
        ConfigError: with every fault; what would stop a start is in ``faults`` of the answer.
    """
    from privtrain.commands.preview import seen
    from privtrain.inputs import check_inputs

    checked = _config(config, settings)
    check_inputs(checked)
    _, _, look = seen(checked)
    return look


def train(config: AnyConfig, settings: Mapping[str, Any] | None = None, *, on_step: OnStep | None = None) -> Run:
    """Train, or continue training, and release. In a job of several processes every process calls it.

    Args:
        config: the configuration.
        settings: dotted key → value that overrides it.
        on_step: called on the first process after each step and measurement, with released metrics alone. The values
            are released, the moment of the call is not: how long a step takes depends on the data, and ε does not cover
            it. A callback that forwards each row at once publishes every step's time; collect rows and send blocks, as
            is done for W&B and TensorBoard. If it raises, the job ends; the same call resumes it.

    Raises:
        PrivtrainError: a subclass of it (:mod:`privtrain.errors`), for everything that a user can mend.
    """
    from privtrain.job.train import train as run_job

    chosen = _config(config, settings)
    run_job(chosen, on_step=on_step)
    return Run(chosen.run.directory)


def resume(run: Run | AnyPath, *, on_step: OnStep | None = None) -> Run:
    """Continue a run from its last checkpoint, with the configuration that it was begun with.

    Args:
        run: the run, or its directory, which may have been moved.
        on_step: as of :func:`train`.

    Raises:
        PrivtrainError: as :func:`train`.
    """
    directory = open_run(run).directory
    where_it_is_now = {"run.name": directory.resolve().name, "run.output_dir": str(directory.resolve().parent)}
    return train(RunDirectory(directory).resolved_config, where_it_is_now, on_step=on_step)


def open_run(directory: Run | AnyPath) -> Run:
    """Return the run in a directory.

    Raises:
        ConfigError: if no run was begun there.
    """
    path = directory.directory if isinstance(directory, Run) else pathlib.Path(directory)
    run = RunDirectory(path)
    if not (run.exists() or run.is_complete()):
        raise ConfigError([Fault(str(path), "is not the directory of a run")])
    return Run(path)


def attack(run: Run | AnyPath) -> dict[str, Any]:
    """Score, analyse and report on a finished run, each in a process of its own; return ``report/attacks.json``.

    The split of the run decides how much can be said: ``data.held_out_fraction: 0.5`` says most.

    Raises:
        PrivtrainError: with the job's own message.
    """
    directory = open_run(run).directory
    for stage in ("score", "analyse", "report"):
        command = [sys.executable, "-m", "attacks", stage, str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PrivtrainError(f"attacks {stage} {directory} failed: {done.stderr.strip() or done.stdout.strip()}")
    return json.loads((RunDirectory(directory).report / "attacks.json").read_text(encoding="utf-8"))


def verify(directory: Run | AnyPath) -> Verified:
    """Check that a run, its adapter or model, or an export is what was released.

    Raises:
        VerificationFailed: naming every file and field that is not.
    """
    from privtrain.commands.verify import verify_directory

    return verify_directory(directory.directory if isinstance(directory, Run) else pathlib.Path(directory))


def export(run: Run | AnyPath, output: AnyPath, *, merge: bool = False, dtype: str = "bf16") -> pathlib.Path:
    """Copy what a finished run released, or merge it into one model for transformers.

    Args:
        run: a finished run.
        output: directory to make; must not exist.
        merge: put the adapter into its base model.
        dtype: of merged or full weights: fp32, bf16 or fp16.

    Raises:
        ConfigError: if the run is not finished, or it cannot be merged.
    """
    from privtrain.commands.export import export_run

    export_run(open_run(run).directory, pathlib.Path(output), merge=merge, dtype=dtype)
    return pathlib.Path(output)


def _config(config: AnyConfig, settings: Mapping[str, Any] | None) -> Config:
    """Return the validated configuration of a path, mapping or ``Config``, with dotted ``settings`` set in it."""
    if isinstance(config, str | os.PathLike):
        path = pathlib.Path(config)
        if not settings:
            return load_config(path)
        document = read_tree(path)
        if document.faults:
            load_config(path)  # raises the faults of the YAML, with their lines
        tree = document.value
    elif isinstance(config, Config):
        if not settings:
            return config
        tree = config.model_dump(mode="json")
    else:
        tree = dict(config)
    return validate(assigned(tree, settings or {}))
