"""Open the trackers that a configuration asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from privtrain.config import Config
from privtrain.privacy.plan import PrivacyPlan
from privtrain.process.console import say
from privtrain.run.directory import RunDirectory
from privtrain.tracking.mirrors import BlockedMirror, Mirror, MirrorAtTheEnd, Values, has_shown_release, was_watched
from privtrain.tracking.trackers import CallbackTracker, JsonlTracker, NullTracker, ReleaseGate, Tracker
from privtrain.tracking.wandb_settings import is_online

#: Mirrors that are shown everything at the release, so that nobody watches rows arrive.
_NEVER_LIVE = ("mlflow", "trackio")


def open_tracker(
    config: Config,
    plan: PrivacyPlan,
    run: RunDirectory,
    *,
    run_id: str,
    from_step: int,
    on_step: Callable[[int, Values], None] | None = None,
) -> Tracker:
    """Return one tracker for rank 0, which hands metrics on to all configured ones.

    Metrics that may be published go to ``metrics.jsonl``, to the mirrors and to ``on_step``, all others to ``secret/``.

    Args:
        config: says which mirrors there are and what may be published.
        plan: the privacy plan, for the mirrors' description of the run.
        run: the run directory.
        run_id: id of the run in the mirrors, the same on every resume.
        from_step: steps that are done as the job begins; rows of later steps are dropped, as they will come again.
        on_step: called with each step and its published metrics.
    """
    public: list[Tracker] = [JsonlTracker(run.metrics, from_step)]
    # Where times are published anyway, there is nothing to hide by blocks.
    num_steps = 1 if config.tracking.release_measurements else config.tracking.mirror_block_steps
    for name, opened in _mirrors(config, plan, run, run_id):
        if name in _NEVER_LIVE or (name == "wandb" and not is_live(config)):
            public.append(MirrorAtTheEnd(opened, run, name))
        else:
            public.append(BlockedMirror(opened(), run, name, num_steps=num_steps, from_step=from_step, is_live=True))
    if on_step is not None:
        public.append(CallbackTracker(on_step))
    return ReleaseGate(config, public, JsonlTracker(run.private_metrics, from_step, mode=0o600))


def show_release(config: Config, plan: PrivacyPlan, run: RunDirectory, *, run_id: str) -> None:
    """Show the release to each mirror that has not seen it yet, after all rows that it was not shown.

    A job that dies right after the release leaves such mirrors; the same command started again calls this.
    """
    for name, opened in _mirrors(config, plan, run, run_id):
        if not has_shown_release(run, name):
            MirrorAtTheEnd(opened, run, name).publish(run)
            say(f"{name} was shown the release, which an earlier job did not live to do")


def is_live(config: Config) -> bool:
    """Return whether W&B is shown rows while the run trains, not only at its end.

    That is so if it is online, if it records the machines' load, or if times are published anyway.
    """
    return is_online() or config.tracking.system_metrics or config.tracking.release_measurements


def watched_mirrors(config: Config, run: RunDirectory) -> tuple[str, ...]:
    """Return the names of the mirrors that any job of the run showed rows to while it trained."""
    names = {"wandb": config.tracking.wandb and is_live(config), "tensorboard": config.tracking.tensorboard}
    return tuple(name for name, is_now in names.items() if is_now or was_watched(run, name))


def _mirrors(
    config: Config, plan: PrivacyPlan, run: RunDirectory, run_id: str
) -> Iterator[tuple[str, Callable[[], Mirror]]]:
    """Yield (name, function that opens it) of each configured mirror."""
    if config.tracking.wandb:
        from privtrain.tracking.wandb_tracker import WandbTracker

        yield "wandb", lambda: WandbTracker(config, plan, run, run_id)
    if config.tracking.tensorboard:
        from privtrain.tracking.tensorboard_tracker import TensorBoardTracker

        yield "tensorboard", lambda: TensorBoardTracker(run)
    if config.tracking.mlflow:
        from privtrain.tracking.mlflow_tracker import MlflowTracker

        yield "mlflow", lambda: MlflowTracker(config, plan, run_id)
    if config.tracking.trackio:
        from privtrain.tracking.trackio_tracker import TrackioTracker

        yield "trackio", lambda: TrackioTracker(config, plan, run_id)


def open_machine_tracker(config: Config, run_id: str, rank: int) -> Tracker:
    """Return a tracker that shows this machine's load in W&B, if that is asked for; else one that does nothing.

    It is for the first rank of each machine but rank 0's, whose own W&B run shows that machine's load.
    """
    is_wanted = config.tracking.wandb and config.tracking.system_metrics and is_online()
    if not is_wanted or rank == 0 or os.environ.get("LOCAL_RANK", "0") != "0":
        return NullTracker()
    import wandb

    from privtrain.tracking.wandb_tracker import MachineTracker

    try:
        return MachineTracker(config, run_id, rank)
    except wandb.Error as error:
        say(f"[yellow]warning[/]: the load of rank {rank}'s machine is not shown in W&B: {error}")
        return NullTracker()
