"""What follows a release and is no part of it: sign it, and show it to the mirrors (W&B and other trackers).

A crash, a lost key or a lost network may leave either undone. The release stands; the same command does what is left.
So errors here are returned instead of raised, and the job raises them after the registry has settled the run's budget.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from rich.markup import escape

from privtrain.config.publishing import ReleaseSection
from privtrain.errors import PrivtrainError, SigningFailed
from privtrain.inputs import Inputs
from privtrain.process.console import say
from privtrain.run.bundle import check_released
from privtrain.run.directory import RunDirectory
from privtrain.run.signing import SIGNATURE, Keys, password_from_environment, sign, signed_files
from privtrain.tracking import show_release


def sign_release(run: RunDirectory, section: ReleaseSection) -> SigningFailed | None:
    """Sign the released directory and the run directory, unless they are; return what failed, to raise later.

    ``None`` if all went well, or if the configuration names no signing key.
    """
    keys = Keys.of(section)
    unsigned = [place for place in (run.released, run.root) if not (place / SIGNATURE).exists()]
    if keys is None or not unsigned:
        return None
    try:
        check_released(run.root)
        for place in unsigned:
            sign(place, keys, signed_files(place), password_from_environment())
        missing = [place / SIGNATURE for place in unsigned if not (place / SIGNATURE).is_file()]
        if missing:
            raise SigningFailed(f"{missing[0]} was not written")
    except (PrivtrainError, OSError) as error:
        return SigningFailed(
            f"{run.root} is released and stays so, but is not signed ({' '.join(str(error).split())}). Mend that and "
            f"start the same command again, or for {run.released} and for {run.root}: privtrain sign DIRECTORY "
            f"--private-key {section.signing_key}"
        )
    say(f"signed {run.released} and {run.root} ({SIGNATURE})")
    return None


def after_release(run: RunDirectory, section: ReleaseSection, show: Callable[[], None]) -> PrivtrainError | None:
    """Sign a release and show it to the mirrors, on rank 0 alone; return what failed, to raise after settlement.

    Args:
        run: the run directory.
        section: ``release`` of the configuration, with the signing key.
        show: shows the release to the mirrors.
    """
    signing_error = sign_release(run, section)
    mirror_error = None
    try:
        show()
    except PrivtrainError as error:
        mirror_error = error
    if signing_error and mirror_error:  # only one can be raised
        say(f"[yellow]warning[/]: {escape(str(mirror_error))}")
    return signing_error or mirror_error


def finish(inputs: Inputs) -> PrivtrainError | None:
    """Do what :func:`after_release` does, for a released run that is started again: its job may have died before."""

    def show() -> None:
        tracker_id = json.loads(inputs.run.identity.read_text(encoding="utf-8"))["tracker_id"]
        show_release(inputs.config, inputs.plan, inputs.run, run_id=tracker_id)

    return after_release(inputs.run, inputs.config.release, show)
