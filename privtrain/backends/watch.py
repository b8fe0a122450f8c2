"""Signs of life: every rank knows within a stated time that another one is gone, and which.

A collective that waits for a dead rank says at best that something timed out, and on GPUs after many minutes. So every
rank beats in the key-value store that the launcher keeps for the job; rank 0 looks at all the beats, the others at rank
0's and at its verdict. Threads do this beside the collectives. It costs a few messages a rank every few seconds.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from privtrain.backends.base import Backend
from privtrain.errors import EXIT_MACHINE_FAILED, PrivtrainError, RankLost, is_of_a_collective
from privtrain.process.exit import leave_at_once

#: Beats in a time-out; a beat a few seconds late must not end a job.
_BEATS_PER_TIMEOUT = 10
_LONGEST_INTERVAL_SECONDS = 5.0
#: Once it is known that the job is over, the main thread has so long to end by itself, with its own message.
_GRACE_SECONDS = 5.0
#: A store that is gone for so long counts as a loss. Rank 0 takes the store along when it ends well, too.
_STORE_GONE_SECONDS = 10.0


class Watch:
    """One rank's part in the watch. All ranks must make it, and close it, at the same place.

    In the store every rank has a *beat*, a number that grows, and who it is. The *verdict* is one for the job: which
    ranks are lost (kind ``"lost"``), which one failed (``"failed"``) or that the store is gone (``"store"``), and the
    exit code. The first verdict that is written stands.

    Args:
        backend: gives rank, device and collectives.
        timeout_seconds: silence after which a rank counts as lost.
    """

    def __init__(self, backend: Backend, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._rank, self._world_size = backend.rank, backend.world_size
        self._interval = min(_LONGEST_INTERVAL_SECONDS, timeout_seconds / _BEATS_PER_TIMEOUT)
        self._patience_seconds = timeout_seconds  # silence that is borne; less once a collective has failed
        self._closing = threading.Event()
        self._decided = threading.Event()  # set once there is a verdict
        self._verdict: dict[str, Any] = {}
        self._num_rounds = 0  # of the heartbeat thread
        self._roster = [_describe(backend.device)]  # who each rank is, in words
        self._is_alone = backend.world_size == 1
        if self._is_alone:
            return
        nonce = backend.from_main(lambda: os.urandom(8)).hex()  # the store may hold keys of an earlier watch
        self._store = _connect(timeout_seconds)
        self._prefix = f"privtrain/{nonce}"
        self._store.set(self._key("who", self._rank), self._roster[0])
        self._store.set(self._key("beat", self._rank), "0")
        backend.barrier()
        self._roster = self._read("who", range(self._world_size))
        for target in (self._heartbeat_loop, self._guard):
            threading.Thread(target=target, name=f"watch{target.__name__}", daemon=True).start()

    def close(self) -> None:
        """End the watch: from here on silence is no loss."""
        self._closing.set()

    def announce(self, message: str, exit_code: int) -> None:
        """Tell the other ranks that this one is leaving because of an error, so that they need not wait for it."""
        if self._is_alone:
            return
        verdict = {"kind": "failed", "rank": self._rank, "message": message[:500], "code": exit_code}
        _call_briefly(self._decide, verdict)

    def explain(self, error: Exception, is_stopping: threading.Event) -> PrivtrainError | None:
        """Return why ``error`` was raised here, if it comes of another rank; ``None`` if it is this rank's own.

        Args:
            error: what the main thread met.
            is_stopping: set once the launcher asked this rank to leave, which is all that will be known then.
        """
        if self._is_alone or not is_of_a_collective(error):
            return None
        self._patience_seconds = 3 * self._interval  # somebody is gone for sure; it remains to be seen who
        self._put(self._key("failing", self._rank), "1")
        end = time.monotonic() + self.timeout_seconds + 2 * self._interval
        while time.monotonic() < end and not self._decided.wait(0.1):
            if is_stopping.is_set():
                return RankLost(
                    "another rank ended, and the launcher asked this one to; see its message above or below"
                )
        if self._decided.is_set():
            return RankLost(self._text())
        # Nobody is lost. Ranks that waited in the collective have failed by now too, and said so above.
        late = [str(rank) for rank in range(self._world_size) if not self._has(self._key("failing", rank))]
        if not late:  # all took part: it failed for a reason of this rank's own
            return None
        return RankLost(
            f"rank {', '.join(late)} lives but did not take part in a collective within "
            f"performance.collective_timeout_seconds: {error}"
        )

    def _heartbeat_loop(self) -> None:
        """Say that this rank lives, and look whether the others do, until the job is over or the watch closed."""
        watched = range(1, self._world_size) if self._rank == 0 else range(1)  # range(1) is rank 0 alone
        last = dict.fromkeys(watched, "")  # rank → its last beat
        silent = dict.fromkeys(watched, 0)  # rank → rounds without a new one
        try:
            while not self._closing.wait(self._interval):
                self._store.set(self._key("beat", self._rank), str(self._num_rounds + 1))
                for rank, beat in zip(watched, self._read("beat", watched), strict=True):
                    # Own rounds are counted, not seconds: a job that is suspended as a whole loses nobody.
                    silent[rank] = silent[rank] + 1 if beat == last[rank] else 0
                    last[rank] = beat
                lost = [rank for rank in watched if silent[rank] * self._interval > self._patience_seconds]
                if lost:
                    self._decide({"kind": "lost", "ranks": lost, "code": EXIT_MACHINE_FAILED})
                elif self._has(self._key("verdict")):
                    self._decide({})  # takes the verdict that stands
                self._num_rounds += 1
                if self._decided.is_set():
                    return self._end()
        except RuntimeError:  # the store is gone
            if not self._closing.wait(min(_STORE_GONE_SECONDS, self.timeout_seconds)):
                self._conclude({"kind": "store", "code": EXIT_MACHINE_FAILED})
                self._end()

    def _guard(self) -> None:
        """Check that the heartbeat thread goes on: it waits for good if the store's host is cut off."""
        last_round, num_intervals = -1, 0  # the round it was last seen in, and for how many intervals
        while not self._closing.wait(self._interval) and not self._decided.is_set():
            num_intervals = num_intervals + 1 if self._num_rounds == last_round else 0
            last_round = self._num_rounds
            if num_intervals * self._interval > self.timeout_seconds:
                self._conclude({"kind": "store", "code": EXIT_MACHINE_FAILED})
                self._end()

    def _decide(self, verdict: dict[str, Any]) -> None:
        """Write a verdict into the store unless there is one, and take the one that stands there."""
        stands = self._store.compare_set(self._key("verdict"), "", json.dumps(verdict))
        self._conclude(json.loads(stands))

    def _conclude(self, verdict: dict[str, Any]) -> None:
        """Take a verdict for the job's, on this rank."""
        self._verdict = verdict
        self._decided.set()

    def _end(self) -> None:
        """End this process if the main thread does not in time: it may wait in a collective for good."""
        if self._verdict.get("rank") == self._rank:  # a rank that failed itself is leaving anyway
            return
        if self._closing.wait(min(_GRACE_SECONDS, self.timeout_seconds)):
            return
        leave_at_once(self._text(), self._verdict["code"])

    def _text(self) -> str:
        """Return the verdict in words."""
        again = "The job ended; the same command goes on from the last checkpoint"
        match self._verdict["kind"]:
            case "lost":
                names = "; ".join(f"rank {rank} ({self._roster[rank]})" for rank in self._verdict["ranks"])
                return (
                    f"no sign of life from {names} (waited at most performance.heartbeat_timeout_seconds: "
                    f"{self.timeout_seconds:g}). {again}"
                )
            case "failed":
                rank = self._verdict["rank"]
                return f"rank {rank} ({self._roster[rank]}) failed: {self._verdict['message']}"
            case _:
                return (
                    f"rank 0's machine ({self._roster[0]}) is gone: the job's store at "
                    f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not answer. {again}"
                )

    def _key(self, kind: str, rank: int | None = None) -> str:
        """Return the store's key of a value of this watch, such as ``privtrain/<nonce>/beat/3``."""
        return f"{self._prefix}/{kind}" if rank is None else f"{self._prefix}/{kind}/{rank}"

    def _read(self, kind: str, ranks: range) -> list[str]:
        """Return the values of one kind of these ranks."""
        return [value.decode() for value in self._store.multi_get([self._key(kind, rank) for rank in ranks])]

    def _put(self, key: str, value: str) -> None:
        _call_briefly(self._store.set, key, value)

    def _has(self, key: str) -> bool:
        return self._store.check([key])


def _call_briefly(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function of the store in a thread of its own, for two seconds at most: the store may be what is gone."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    thread.join(timeout=2.0)


def _connect(timeout_seconds: float) -> dist.TCPStore:
    """Return a client of the store that launcher or rank 0 keeps at MASTER_ADDR, on a connection of its own."""
    timeout = datetime.timedelta(seconds=max(timeout_seconds, 10.0))
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def _describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    return f"host {platform.node()}, process {os.getpid()}, {device} ({name})"
