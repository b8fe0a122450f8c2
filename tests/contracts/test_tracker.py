"""Every tracker takes what a run tells it, shows rows in order and once, and ends twice without harm."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil

import pytest

from privtrain import tracking
from privtrain.config import validate
from privtrain.run.directory import RunDirectory
from privtrain.tracking import NullTracker
from privtrain.tracking.mirrors import BlockedMirror, Mirror, MirrorAtTheEnd
from privtrain.tracking.mlflow_tracker import MlflowTracker
from privtrain.tracking.tensorboard_tracker import TensorBoardTracker
from privtrain.tracking.trackers import CallbackTracker, JsonlTracker, QuietTracker, ReleaseGate, Tracker
from privtrain.tracking.trackio_tracker import TrackioTracker
from privtrain.tracking.wandb_tracker import MachineTracker, WandbTracker

IMPLEMENTATIONS = {
    Tracker: [NullTracker, CallbackTracker, JsonlTracker, ReleaseGate, BlockedMirror, MirrorAtTheEnd, MachineTracker],
    Mirror: [MlflowTracker, TensorBoardTracker, TrackioTracker, WandbTracker],
}


class Kept(QuietTracker):
    """A mirror, and a tracker, that keeps the steps that it is shown."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_rows(self, rows) -> None:
        self.steps += [step for step, _ in rows]

    def log(self, step, values) -> None:
        self.steps.append(step)

    def close(self) -> None:
        pass


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.secret.mkdir(mode=0o700, parents=True)
    return directory


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture(
    params=["NullTracker", "CallbackTracker", "JsonlTracker", "ReleaseGate", "BlockedMirror", "MirrorAtTheEnd"]
)
def tracker(request, tree, run, kept) -> Tracker:
    """Each tracker; what it shows to others ends in ``kept``."""
    made = {
        "NullTracker": NullTracker,
        "CallbackTracker": lambda: CallbackTracker(kept.log),
        "JsonlTracker": lambda: JsonlTracker(run.root / "rows.jsonl", 0),
        "ReleaseGate": lambda: ReleaseGate(validate(tree), [kept], JsonlTracker(run.secret / "rows.jsonl", 0)),
        "BlockedMirror": lambda: BlockedMirror(kept, run, "kept", num_steps=2, from_step=0),
        "MirrorAtTheEnd": lambda: MirrorAtTheEnd(lambda: kept, run, "kept"),
    }
    return made[request.param]()


def test_every_implementation_is_held_to_the_contract():
    names = [f"{tracking.__name__}.{module.name}" for module in pkgutil.iter_modules(tracking.__path__)]
    found = {kind for name in names for _, kind in inspect.getmembers(importlib.import_module(name), inspect.isclass)}
    classes = {kind for kind in found if not getattr(kind, "_is_protocol", False)}
    for protocol, method in ((Tracker, "log"), (Mirror, "log_rows")):
        assert {c for c in classes if hasattr(c, method)} == set(IMPLEMENTATIONS[protocol])


@pytest.mark.parametrize(
    ("protocol", "kind"), [(protocol, kind) for protocol, kinds in IMPLEMENTATIONS.items() for kind in kinds]
)
def test_methods_take_what_the_protocol_says(protocol, kind):
    for name, declared in inspect.getmembers(protocol, inspect.isfunction):
        if name.startswith("_"):
            continue
        names = [list(inspect.signature(method).parameters) for method in (declared, getattr(kind, name))]
        assert names[0] == names[1], name


def test_rows_in_order_once_and_a_second_end_is_no_fault(tracker, run, kept):
    run.metrics.write_text("".join(json.dumps({"train/step": step, "train/lr": 0.1}) + "\n" for step in range(1, 6)))
    for step in range(1, 6):
        tracker.log(step, {"train/lr": 0.1, "privacy/epsilon": None})
    tracker.alert("title", "text")
    tracker.publish(run)
    tracker.close()
    tracker.close()
    if isinstance(tracker, JsonlTracker):
        kept.steps = [json.loads(line)["train/step"] for line in (run.root / "rows.jsonl").read_text().splitlines()]
    assert kept.steps == ([] if isinstance(tracker, NullTracker) else [1, 2, 3, 4, 5])
