"""Kill a writer at random moments and look at what it left: ``python -m tests.privtrain.ledger_crash DIR TRIALS SEED``.

One process imports everything, then forks a writer a trial. The writer tells over a pipe what it was told is on disk.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import sys
import time

import numpy as np

from privtrain.errors import LedgerCorrupt
from privtrain.files.private import make_private_directory
from privtrain.ledger.log import verify
from tests.privtrain.ledgers import by_pseudonym, contents, opened, units_of

_SEGMENT_ROWS = 25
_TRIALS_OF_A_LOG = 25


def write_until_killed(path: pathlib.Path, pipe: int) -> None:
    with opened(path, segment_rows=_SEGMENT_ROWS) as ledger:
        state = ledger.state
        ledger.begin_session(generation=0, from_step=len(state.path), environment="e")
        step = len(state.path)
        if step and (0, step - 1) not in state.commits:
            step -= 1
        while True:
            units = units_of(step)
            ledger.intend(0, step, units)
            os.write(pipe, b"i")
            ledger.commit(0, step, f"sum-{step}", [name for name, _ in units[: step % 3 == 1]])
            os.write(pipe, b"c")
            step += 1


def one_trial(path: pathlib.Path, num_acknowledged: int, delay_seconds: float) -> str:
    """Kill a writer that was told of so many writes; return all that it was told."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        try:
            write_until_killed(path, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    told = b""
    while len(told) < num_acknowledged:
        more = os.read(read_end, num_acknowledged - len(told))
        assert more, "the writer died by itself"
        told += more
    time.sleep(delay_seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer died by itself"
    while more := os.read(read_end, 1 << 16):
        told += more
    os.close(read_end)
    return told.decode()


def check(path: pathlib.Path, aside: pathlib.Path, charged: int, committed: int) -> str:
    """Look at a copy, so that the next writer finds the original as the crash left it; return what it was like."""
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(path.parent, aside)
    copy = aside / path.name
    found = "whole"
    try:
        if copy.exists():
            verify(copy)
    except LedgerCorrupt as error:
        found = "torn" if "torn" in str(error) else str(error)
    assert found in ("whole", "torn"), found
    before = copy.read_bytes() if copy.exists() else b""
    with opened(copy, segment_rows=_SEGMENT_ROWS) as ledger:
        state = ledger.state
        assert charged <= state.num_charged <= charged + 1, (charged, state.num_charged)
        assert committed <= len(state.commits) <= committed + 1, (committed, len(state.commits))
    assert copy.read_bytes().startswith(before[: before.rfind(b"\n") + 1]), "a whole record was changed"
    assert verify(copy).num_charged == state.num_charged
    bodies = contents(copy)
    assert bodies == {(0, step): by_pseudonym(units_of(step)) for step in range(state.num_charged)}
    return found if state.num_charged == charged and len(state.commits) == committed else f"{found}, one more"


def main(place: pathlib.Path, num_trials: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outcomes: dict[str, int] = {}
    path, charged, committed = place, 0, 0
    for trial in range(num_trials):
        if trial % _TRIALS_OF_A_LOG == 0:
            path, charged, committed = place / f"log-{trial}" / "ledger.jsonl", 0, 0
            make_private_directory(path.parent)
        delay = float(rng.uniform(0, 0.004)) * bool(rng.integers(4))
        one = one_trial(path, int(rng.integers(0, 9)), delay)
        # An intent that an earlier writer left open is told again when it is begun again, so count what is on disk.
        charged, committed = _told(path, charged, committed, one)
        outcome = check(path, place / "aside", charged, committed)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        state = verify_or_repair(path, place / "aside")
        charged, committed = state
    print(json.dumps(outcomes))


def _told(path: pathlib.Path, charged: int, committed: int, told: str) -> tuple[int, int]:
    """What must be on disk after a writer that started from ``charged`` and ``committed`` was told this."""
    if charged > committed and told.startswith("i"):
        told = told[1:]  # the open intent of the writer before
    return charged + told.count("i"), committed + told.count("c")


def verify_or_repair(path: pathlib.Path, aside: pathlib.Path) -> tuple[int, int]:
    """What is on disk now, by the repaired copy."""
    state = verify(aside / path.name)
    return state.num_charged, len(state.commits)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # a process that forked while libraries had threads may abort as it takes them down
