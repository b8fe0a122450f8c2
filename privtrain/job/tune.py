"""``privtrain tune``: a secret number of trials, of which the best on public rows is released.

Papernot and Steinke 2022 (arXiv 2110.03620), theorem 2: the whole procedure has the Rényi bound that
:class:`privtrain.privacy.plan.Tuning` accounts for, if

* the number of trials is drawn from the plan's distribution and stays secret;
* each trial is the same mechanism: settings drawn at random from a fixed list, then a run under secrets of its own.
  Every candidate therefore has the very plan of the others, and the list is fixed before the first trial;
* the choice is by a score of what a trial may release. The score is the loss on ``data.evaluation``: the rows are
  public, the models are not, so the choice among them is what the theorem is for;
* one trial is released and nothing else. Trials live in ``OUTPUT_DIR/NAME.tune``, closed to others for good, under one
  run name; they have no mirrors.

A tuning that is started again goes on: number, order and ties follow from one key, and a trial that was cut off is
resumed in its own directory, so none counts twice. One that fails releases nothing. The registry holds one reservation
for all trials, charged whole once any of them may have begun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import secrets
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from accountants.tuning import draw_num_runs
from privtrain.config import Config, load_config
from privtrain.config.load import layered
from privtrain.errors import ConfigError, Fault, GuaranteeLost, PlanMismatch, PrivtrainError, WorseThanBase
from privtrain.files.atomic import sync_directory, write_json
from privtrain.files.private import make_private_directory
from privtrain.inputs import Inputs, check_inputs, read_inputs
from privtrain.job.publish import set_file_times
from privtrain.job.reservation import BudgetReservation
from privtrain.job.stop import StopRequest, listening
from privtrain.job.train import Trial, train
from privtrain.ledger.log import verify_chain
from privtrain.privacy.plan import PrivacyPlan, Tuning
from privtrain.privacy.secret import SecretKey
from privtrain.process.console import say
from privtrain.process.group import num_launched
from privtrain.run.directory import RunDirectory

#: What candidates may differ in: all of it is post-processing of the noised sums.
_FREE_SECTIONS = ("lora", "prompt", "training")
_SCORE = "eval/loss"
#: Keys of ``tracking`` that show a run to others while it trains or when it is released: never a trial.
MIRRORS = ("wandb", "system_metrics", "tensorboard", "mlflow", "trackio")


def tune(path: pathlib.Path, overrides: Sequence[str], candidates: Sequence[str]) -> None:
    """Train the trials, or continue them, and release the best.

    Args:
        path: YAML file of the run, with ``privacy.tuning``.
        overrides: dotted assignments over the file.
        candidates: each a line of further assignments, of which a trial takes one at random.

    Raises:
        PrivtrainError: one of its kinds, for everything that a user can mend.
    """
    configs = _configs(path, overrides, candidates)
    inputs = read_inputs(configs[0])
    _check_same_mechanism(configs, inputs.plan)
    tuning = inputs.plan.tuning
    assert tuning is not None, "checked with the candidates"
    place = RunDirectory(inputs.run.root.with_name(f"{inputs.run.root.name}.tune"))
    with _locked_directory(place, inputs, candidates) as key, _reservation(inputs, place) as (reservation, stop):
        if not inputs.run.is_complete():
            trial = _trial(reservation)
            draw = Draw.of(key, tuning, len(candidates))
            for index, candidate in enumerate(draw.candidates):
                if stop.requested.is_set():
                    raise stop.preempted(f"{index} trials are complete")
                trial.check_release()  # from here on the reservation is charged
                _run_trial(configs[candidate], _directory(place, index), trial)
            _install(inputs.run, place, draw)
        if reservation is not None:
            chosen = json.loads(_chosen_path(place).read_text(encoding="utf-8"))
            reservation.settle_tuning(dataclasses.replace(inputs, config=configs[chosen["candidate"]]))
    say(f"released {inputs.run.released}; what it was chosen from stays in {place.root}")


@dataclasses.dataclass(frozen=True)
class Draw:
    """What chance decides, all of it by one key.

    Attributes:
        candidates: of each trial, the index of the settings that it takes.
        ties: of each trial, a number that decides between equal scores.
    """

    candidates: tuple[int, ...]
    ties: tuple[float, ...]

    @classmethod
    def of(cls, key: SecretKey, tuning: Tuning, num_candidates: int) -> Draw:
        """Return the draw of a key: the same whenever it is asked for."""
        (uniform,) = key.stream("number of trials").uniform(1)
        num_trials = draw_num_runs(float(uniform), mean_runs=tuning.mean_trials, shape=tuning.distribution)
        drawn = key.stream("candidates").uniform(num_trials)
        ties = key.stream("ties").uniform(num_trials)
        return cls(tuple(int(u * num_candidates) for u in drawn), tuple(map(float, ties)))


def best_trial(scores: Sequence[float], ties: Sequence[float]) -> int:
    """Return the index of the trial with the least score.

    A score that is not finite is worse than any other; of equal scores the one with the least of ``ties`` is taken.
    """

    def order(index: int) -> tuple[float, float]:
        score = scores[index] if math.isfinite(scores[index]) else math.inf
        return score, ties[index]

    return min(range(len(scores)), key=order)


def _configs(path: pathlib.Path, overrides: Sequence[str], candidates: Sequence[str]) -> list[Config]:
    """Return the configuration of each candidate, of trials that nobody is shown.

    Raises:
        ConfigError: with every fault.
    """
    base = load_config(path, overrides)
    faults = []
    if not candidates:
        faults.append(Fault("--try", "give the settings to choose from, each as one --try 'KEY=VALUE ...'"))
    if base.privacy.tuning is None:
        faults.append(Fault("privacy.tuning", "is not set; {} takes the defaults: five trials expected"))
    if num_launched() > 1:
        faults.append(Fault("launcher", "tune trains in one process; start it without a launcher"))
    if faults:
        raise ConfigError(faults)
    check_inputs(base)
    hidden = [f"tracking.{mirror}=false" for mirror in MIRRORS]
    return [load_config(path, layered(overrides, shlex.split(candidate), hidden)) for candidate in candidates]


def _check_same_mechanism(configs: Sequence[Config], plan: PrivacyPlan) -> None:
    """Raise unless all candidates have one plan, data set and way of publishing.

    Raises:
        ConfigError: with every key that differs and may not.
    """
    first, faults = configs[0], []
    for number, config in enumerate(configs[1:], start=2):
        for section in type(config).model_fields:
            if section not in _FREE_SECTIONS and getattr(config, section) != getattr(first, section):
                problem = f"candidate {number} changes {section}; they may differ in {', '.join(_FREE_SECTIONS)} alone"
                faults.append(Fault("--try", problem))
        if not faults and PrivacyPlan.build(config.privacy, config.training).fingerprint() != plan.fingerprint():
            problem = f"candidate {number} has another plan: banded noise follows the schedule; give privacy.num_bands"
            faults.append(Fault("--try", problem))
    if faults:
        raise ConfigError(faults)


@contextlib.contextmanager
def _locked_directory(place: RunDirectory, inputs: Inputs, candidates: Sequence[str]) -> Iterator[SecretKey]:
    """Create or check the directory of the trials, hold it, and yield its key.

    Raises:
        PlanMismatch: if it was begun with another plan, data set or list of candidates.
        RunBusy: if another process tunes here.
    """
    text = json.dumps([inputs.fingerprint, list(candidates)])
    identity = {"fingerprint": inputs.fingerprint, "candidates": hashlib.sha256(text.encode()).hexdigest()}
    # It exists from the moment that its identity is written: the directories alone may be of a start that crashed.
    if not place.exists():
        place.create()
    with place.locked():
        place.check_permissions()
        place.hide()
        if not place.exists():  # asked again under the lock: another tuning may have begun here meanwhile
            if inputs.run.exists():
                raise PrivtrainError(f"{inputs.run.root} is a run already; choose another run.name")
            # The key first: what was drawn with one is never drawn again with another.
            place.keep_key("tune", inputs.plan.insecure_seed)
            tracker_id = f"{inputs.config.run.name}-{secrets.token_hex(4)}"
            write_json(place.identity, {**identity, "tracker_id": tracker_id}, mode=0o600)
        known = json.loads(place.identity.read_text(encoding="utf-8"))
        if {name: known.get(name) for name in identity} != identity:
            raise PlanMismatch(
                f"{place.root} was begun with another plan, data set or list of candidates; nothing was done. Restore "
                "them, or set another run.name"
            )
        yield place.keep_key("tune", inputs.plan.insecure_seed, was_used=True)


@contextlib.contextmanager
def _reservation(inputs: Inputs, place: RunDirectory) -> Iterator[tuple[BudgetReservation | None, StopRequest]]:
    """Hold one reservation for all trials; it stays charged whatever becomes of them."""
    reservation = BudgetReservation.take(dataclasses.replace(inputs, run=place), chosen=inputs.run)
    with listening() as stop, reservation.heartbeat(stop) if reservation else contextlib.nullcontext():
        yield reservation, stop


def _trial(reservation: BudgetReservation | None) -> Trial:
    if reservation is None:
        return Trial((), lambda: None)
    return Trial(tuple(reservation.dropped_users()), reservation.check)


def _directory(place: RunDirectory, index: int) -> pathlib.Path:
    return place.root / "trials" / f"{index:04d}"


def _chosen_path(place: RunDirectory) -> pathlib.Path:
    """Return the file that holds the index of the chosen settings: ``{"candidate": 2}``."""
    return place.secret / "chosen.json"


def _run_trial(config: Config, directory: pathlib.Path, trial: Trial) -> None:
    """Train a trial, or continue it; one that is complete stays as it is.

    All have one run name, since the number of a trial says how many there were at least.
    """
    make_private_directory(directory)
    section = config.run.model_copy(update={"output_dir": directory})
    with contextlib.suppress(WorseThanBase):  # by public rows: the worst score, and no failure
        train(config.model_copy(update={"run": section}), trial=trial)


def _install(run: RunDirectory, place: RunDirectory, draw: Draw) -> None:
    """Move the best trial to its place.

    Raises:
        GuaranteeLost: if no trial may be released.
    """
    trials = [RunDirectory(_directory(place, index) / run.root.name) for index in range(len(draw.candidates))]
    best = best_trial([_score(trial) for trial in trials], draw.ties)
    if not trials[best].is_complete():
        raise GuaranteeLost(f"no trial in {place.root} is better than the base model; nothing is released")
    # Before the move: a start that finds the run in its place reads here which settings it has.
    write_json(_chosen_path(place), {"candidate": draw.candidates[best]}, mode=0o600)
    if run.root.exists():
        run.root.rmdir()  # empty, else another run began here, and this fails
    os.replace(trials[best].root, run.root)
    sync_directory(run.root.parent)
    _set_file_times(run)


def _set_file_times(run: RunDirectory) -> None:
    """Set released files' times to the hour of the choice: their own tell how many trials came after the best."""
    release = verify_chain(run.ledger).release
    assert release is not None, "a complete run's ledger shows its release"
    set_file_times(run, release.manifest)


def _score(trial: RunDirectory) -> float:
    """Return the last loss on public rows; infinite for a trial that released nothing."""
    if not trial.is_complete():
        return math.inf
    rows: list[dict[str, Any]] = [json.loads(line) for line in trial.metrics.read_text(encoding="utf-8").splitlines()]
    return next((float(row[_SCORE]) for row in reversed(rows) if row.get(_SCORE) is not None), math.inf)
