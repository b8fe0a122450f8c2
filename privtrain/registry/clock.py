"""The clock of budgets and leases: the database's time, read in the transaction that uses it.

A charge leaves a budget's window, and a lease ends, by the passing of time, so no client's clock decides it. PostgreSQL
answers with its server's clock, one for all clients. SQLite has no server: its clock is this machine's, and the
registry remembers the newest time that it was used at (``meta.newest_at``). A clock before that is wrong, or an earlier
one was; a clock long after it is wrong, or nothing happened for long. The registry cannot tell which, so both are
refused until a person confirms the date (``privtrain registry clock --confirm``).

"Long" is :data:`LONGEST_SILENCE_SECONDS`, or a quarter of the shortest period of a budget if that is less, but never
less than :data:`LEAST_SILENCE_SECONDS`; without a bound as long as no run ever reserved. A wrong clock within these
bounds passes once: whoever comes next with a right one is refused.
"""

from __future__ import annotations

import datetime

import sqlalchemy as sa

from privtrain.errors import ClockRefused, PrivtrainError
from privtrain.registry.tables import Budget, Meta, ReservationRow

LONGEST_SILENCE_SECONDS = 31 * 86400.0
LEAST_SILENCE_SECONDS = 3600.0
#: By how much a clock may be set back, as time synchronisation does; the registry's time stands still meanwhile.
MAX_SETBACK_SECONDS = 300.0

#: The SQLite function is the library's own, so that nothing in this process but the operating system sets it.
_CLOCKS = {
    "sqlite": "SELECT (julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "SELECT extract(epoch FROM clock_timestamp())",
}


def now(connection: sa.Connection) -> float:
    """Return seconds since 1970 (UTC), at least the newest time stored; a writing transaction stores it.

    Raises:
        ClockRefused: on SQLite, if the machine's clock is before the newest time noted, or implausibly long after it.
    """
    seconds = _read(connection)
    newest = _newest(connection)
    problem = None if newest is None else _problem(connection, seconds, newest)
    if newest is None or problem is None:
        return _noted(connection, seconds, newest)
    raise ClockRefused(
        f"this machine's clock says {describe(seconds)}, {problem} the registry was last used at {describe(newest)}; "
        "budgets and leases go by this time, so nothing was changed. If the clock is wrong, set it. If it is right, or "
        "an earlier one was wrong: privtrain registry clock --confirm YYYY-MM-DD, with today's date in UTC"
    )


def estimate(connection: sa.Connection) -> float:
    """Return the time without refusing any clock, for heartbeats, opt-outs and displays.

    Where :func:`now` would refuse the machine's clock, the newest time noted stands in for it. It is in the past, so no
    charge has left its budget's window too early.
    """
    seconds = _read(connection)
    newest = _newest(connection)
    if newest is not None and _problem(connection, seconds, newest) is not None:
        return newest
    return _noted(connection, seconds, newest)


def confirm(connection: sa.Connection, today: datetime.date) -> float:
    """Accept this machine's clock from now on; return its time in seconds since 1970.

    Charges that an earlier, wrong clock dated later than now stay charged until their date has passed.

    Args:
        connection: a writing transaction.
        today: the date in UTC, as a person read it from another clock.

    Raises:
        PrivtrainError: if the clock shows another date, or the database has a server, whose clock counts.
    """
    if connection.dialect.name != "sqlite":
        raise PrivtrainError("this registry goes by its server's clock; there is nothing to confirm")
    seconds = _read(connection)
    shown = datetime.datetime.fromtimestamp(seconds, datetime.UTC).date()
    if shown != today:
        raise PrivtrainError(f"--confirm: given {today}, but this machine's clock says {describe(seconds)}; set it")
    connection.execute(sa.update(Meta).values(newest_at=seconds))
    return seconds


def describe(seconds: float) -> str:
    """Return a time as UTC to the minute."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _read(connection: sa.Connection) -> float:
    return float(connection.exec_driver_sql(_CLOCKS[connection.dialect.name]).scalar_one())


def _newest(connection: sa.Connection) -> float | None:
    """Return the newest time that the registry was used at; ``None`` before any use, or if there is a server."""
    if connection.dialect.name != "sqlite":
        return None
    return connection.execute(sa.select(Meta.newest_at)).scalar_one_or_none()


def _problem(connection: sa.Connection, seconds: float, newest: float) -> str | None:
    """Return ``None`` if this machine's time is plausible, else the words between the two times in :func:`now`'s error.

    Args:
        connection: a transaction of the registry.
        seconds: this machine's time.
        newest: the newest time that the registry was used at.
    """
    if seconds < newest - MAX_SETBACK_SECONDS:
        return "but"
    if seconds <= newest + LEAST_SILENCE_SECONDS:
        return None
    silence = seconds - newest
    if silence <= _longest_silence(connection):
        return None
    return f"{silence / 86400:,.1f} days after"


def _longest_silence(connection: sa.Connection) -> float:
    """Return for how long, in seconds, a registry may have gone unused before its clock is doubted."""
    if connection.execute(sa.select(ReservationRow.id).limit(1)).first() is None:
        return float("inf")  # nothing is charged yet that could leave a budget too early
    in_force = sa.select(sa.func.min(Budget.period_seconds)).where(Budget.superseded_at.is_(None))
    shortest_period = connection.execute(in_force).scalar_one()
    longest = LONGEST_SILENCE_SECONDS
    if shortest_period is not None:
        longest = min(longest, shortest_period / 4)
    return max(LEAST_SILENCE_SECONDS, longest)


def _noted(connection: sa.Connection, seconds: float, newest: float | None) -> float:
    """Return the later of the two times, or ``seconds`` without a newest; a writing transaction on SQLite stores it."""
    seconds = seconds if newest is None else max(seconds, newest)
    if connection.dialect.name == "sqlite" and connection.get_execution_options().get("registry_write", False):
        connection.execute(sa.update(Meta).values(newest_at=seconds))
    return seconds
