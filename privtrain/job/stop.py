"""Pre-emption: SIGTERM or SIGUSR1 on any rank stops all of them together at the next step boundary.

A signal may reach one rank, some or all, at any time. A rank that left on its own would keep the others waiting in a
collective. So it only sets a flag; the flags are summed in a collective that every rank enters anyway, and all leave at
the same place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from privtrain.backends import Backend
from privtrain.errors import EXIT_PREEMPTED, Preempted
from privtrain.process.exit import leave_at_once, record_stop_request

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether somebody asked this rank to stop. Use :func:`listening`.

    Attributes:
        requested: set when this rank is asked.
        is_agreed: whether all ranks have agreed to stop.
    """

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.is_agreed = False
        self._signal_name = "a signal to another rank"
        self._is_joined = False

    def joined_group(self) -> None:
        """Stop only where all ranks agree from now on, since others wait for this one; before, a signal ends it."""
        self._is_joined = True

    def ask(self, reason: str) -> None:
        """Stop all ranks at the next step boundary, as a signal would."""
        self._signal_name = reason
        self.requested.set()

    def leave_if_agreed(self, backend: Backend, where: str) -> None:
        """Raise :class:`Preempted` if any rank was asked to stop. All ranks must call this at the same place.

        Raises:
            Preempted: on every rank or on none.
        """
        if backend.any_rank(self.requested.is_set()):
            self.is_agreed = True
            raise self.preempted(where)

    def preempted(self, where: str) -> Preempted:
        """Return the error that ends the job, with the signal's name and, from ``where``, what is saved."""
        return Preempted(f"asked to stop ({self._signal_name}): {where}. The same command goes on from there")

    def _listen(self, reader: int) -> None:
        """Record signals until the pipe closes: Python writes the number of each signal into it, as one byte.

        Before the rank joined its group nobody waits for it, so it leaves at once.
        """
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                (number,) = byte
                if number not in SIGNALS:
                    continue
                self._signal_name = signal.Signals(number).name
                self.requested.set()
                record_stop_request()
                if not self._is_joined:
                    leave_at_once(f"asked to stop ({self._signal_name}) before the job began", EXIT_PREEMPTED)


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGUSR1 instead of dying of them. Outside the main thread, signals are left as they are.

    After :class:`Preempted` they stay ignored: the job is saved, and a launcher that signals the last ranks because the
    first one has left must not change their exit code.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # Python runs handlers between two byte codes of the main thread, which may sit in a collective for minutes; the
    # wake-up pipe is written at once, and a thread reads it.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous_pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Handlers that do nothing: without one, no byte is written and the signal ends the process.
    previous: dict[signal.Signals, Any] = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    threading.Thread(target=request._listen, args=(reader,), name="stop-signals", daemon=True).start()
    try:
        yield request
    except Preempted:
        previous = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_pipe)
        os.close(writer)
