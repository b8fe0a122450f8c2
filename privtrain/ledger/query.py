"""Questions to a log, answered by DuckDB over its files. Pseudonyms only: no name ever enters a query.

A *contribution* is one unit's part in one step (a unit is a user or a record, by ``privacy.unit``). Contributions lie
in sealed Parquet files and, of the latest steps, in the open segment's row file. A contribution is *zeroed* if its
gradient was not finite and counted as zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from privtrain.errors import LedgerCorrupt, PrivtrainError
from privtrain.ledger.bodies import ROW, directory_of, rows_path, segment_path, to_table
from privtrain.ledger.chain import LedgerState
from privtrain.ledger.log import verify_chain

#: What DuckDB may hold; it spills to the ledger's own directory beyond.
_MEMORY_LIMIT = "700MB"
#: Each thread holds tables of its own.
_NUM_THREADS = 4

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Distribution of a run's contributions over its users. Private: ε does not cover it.

    Attributes:
        num_steps: steps charged.
        num_contributions: a user's part in a step, counted over all.
        num_records: records used, a record counted once a step.
        num_users: users with at least one contribution.
        num_zeroed: contributions that counted as zero because they were not finite.
        records_per_unit: k.
        share_at_k: share of contributions that brought k records, so that the bound may have cut them.
        share_above_k: share above k; zero in every log that verifies.
        records_per_user: smallest, quartiles, 90 %, 99 % and largest number of records of a user over the run.
        steps_per_user: the same for steps.
        gini: Gini coefficient of records over the users who contributed: 0 if all gave the same.
        cap: the number of records that the next two compare with, if one was given.
        share_of_users_above_cap: share of users with more records than that over the run.
        share_of_records_above_cap: share of all records that lie beyond those users' first ``cap``.
    """

    num_steps: int
    num_contributions: int
    num_records: int
    num_users: int
    num_zeroed: int
    records_per_unit: int
    share_at_k: float
    share_above_k: float
    records_per_user: dict[str, int]
    steps_per_user: dict[str, int]
    gini: float
    cap: int | None
    share_of_users_above_cap: float | None
    share_of_records_above_cap: float | None


class Contributions:
    """The contributions of a log as a DuckDB table. Use :func:`opened_contributions`.

    Columns of ``contributions``: generation, step, unit (its pseudonym), records (how many of the unit's), zeroed.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, state: LedgerState) -> None:
        self.state = state
        self._connection = connection

    def _rows(self, sql: str, parameters: list[Any] | None = None) -> list[Row]:
        result = self._connection.execute(sql, parameters or [])
        names = [column[0] for column in result.description or []]
        return [dict(zip(names, values, strict=True)) for values in result.fetchall()]

    def steps(self) -> dict[tuple[int, int], Row]:
        """Return (generation, step) → ``num_units``, ``num_records``, ``max_records`` of a unit and ``num_zeroed``."""
        rows = self._rows(
            "SELECT generation, step, count(*) AS num_units, sum(records)::BIGINT AS num_records, "
            "max(records) AS max_records, count(*) FILTER (zeroed) AS num_zeroed "
            "FROM contributions GROUP BY generation, step"
        )
        by_step = {}
        for row in rows:
            step = (row.pop("generation"), row.pop("step"))
            by_step[step] = row
        return by_step

    def top(self, count: int) -> list[Row]:
        """Return the heaviest contributors: pseudonym, records, steps, zeroed; the most records first."""
        rows = self._rows(
            "SELECT unit, sum(records)::BIGINT AS records, count(*) AS steps, count(*) FILTER (zeroed) AS zeroed "
            "FROM contributions GROUP BY unit ORDER BY records DESC, steps DESC, unit LIMIT ?",
            [count],
        )
        columns = ("records", "steps", "zeroed")
        return [{"pseudonym": row["unit"].hex, **{name: row[name] for name in columns}} for row in rows]

    def user(self, unit_pseudonym: str) -> list[Row]:
        """Return one unit's part in every step that it joined.

        Of each: generation, step, records, zeroed, ``committed`` (the update was made) and ``in_model`` (the model
        rests on the step; not if a new generation began before it).
        """
        rows = self._rows(
            "SELECT generation, step, records, zeroed FROM contributions WHERE unit = ? ORDER BY generation, step",
            [uuid.UUID(hex=unit_pseudonym)],
        )
        in_model = set(self.state.path)
        for row in rows:
            step = (row["generation"], row["step"])
            row |= {"committed": step in self.state.commits, "in_model": step in in_model}
        return rows

    def statistics(self, cap: int | None = None) -> Statistics:
        """Return how the contributions are spread over units; ``cap`` as in :class:`Statistics`."""
        # Two queries: the first keeps two sums a unit, which is all that fits into memory at millions of units.
        spread = self._rows(
            "SELECT steps, records, count(*) AS users FROM ("
            "SELECT count(*)::INT AS steps, sum(records)::INT AS records FROM contributions GROUP BY unit"
            ") GROUP BY steps, records ORDER BY records, steps"
        )
        (totals,) = self._rows(
            "SELECT count(*) FILTER (zeroed) AS zeroed, count(*) FILTER (records = $1) AS at_k, "
            "count(*) FILTER (records > $1) AS above_k FROM contributions",
            [self.state.records_per_unit],
        )
        return _statistics(self.state, spread, totals, cap)

    def export(self, target: pathlib.Path, file_format: str) -> int:
        """Write all contributions to a new file that only its owner may read; return how many.

        Args:
            target: the file.
            file_format: ``"parquet"`` or ``"csv"``.

        Raises:
            FileExistsError: if the file is there already: somebody else may have it open, and would read on.
        """
        options = "FORMAT parquet, COMPRESSION zstd" if file_format == "parquet" else "FORMAT csv, HEADER"
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            self._connection.register("commits", _steps_table(self.state))
            self._connection.execute(
                "COPY (SELECT generation, step, replace(unit::VARCHAR, '-', '') AS pseudonym, records, zeroed, "
                "committed, in_model FROM contributions JOIN commits USING (generation, step) "
                # Into this very file: a temporary one would take its place with permissions of its own.
                f"ORDER BY generation, step) TO {_quoted(target)} ({options}, USE_TMP_FILE false)"
            )
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return self.state.num_contributions


@contextlib.contextmanager
def opened_contributions(log: pathlib.Path) -> Iterator[Contributions]:
    """Check the chain of a log and open its bodies, those of a running job included.

    The bodies themselves are not checked against their roots here: ``ledger verify`` does that.

    Raises:
        LedgerCorrupt: if the chain does not hold or a segment is missing.
    """
    state = verify_chain(log, allow_torn=True)
    files = [segment_path(log, index) for index in range(len(state.segments))]
    for file, segment in zip(files, state.segments, strict=True):
        if not file.is_file() or file.stat().st_size != segment.num_bytes:
            raise LedgerCorrupt(f"{file} is missing or was cut; restore it from a backup")
    spill = _spill_directory(log)
    connection = duckdb.connect()
    try:
        connection.execute(f"SET memory_limit='{_MEMORY_LIMIT}'; SET threads={min(_NUM_THREADS, os.cpu_count() or 1)}")
        connection.execute(f"SET preserve_insertion_order=false; SET temp_directory={_quoted(spill)}")
        connection.register("open_rows", _open_table(log, state))
        sources = ["SELECT * FROM open_rows"]
        if files:
            quoted = ", ".join(_quoted(file) for file in files)
            sources.append(f"SELECT * FROM read_parquet([{quoted}])")
        connection.execute(f"CREATE VIEW contributions AS {' UNION ALL '.join(sources)}")
        yield Contributions(connection, state)
    except duckdb.Error as error:
        raise PrivtrainError(f"{log}: the query failed: {error}") from None
    finally:
        connection.close()
        if spill is not None:
            shutil.rmtree(spill, ignore_errors=True)


def _spill_directory(log: pathlib.Path) -> pathlib.Path | None:
    """Return a new spill directory beside the segments; ``None`` without write access, where big queries may fail."""
    try:
        return pathlib.Path(tempfile.mkdtemp(prefix=".query-", dir=directory_of(log)))
    except OSError:
        return None


def _quoted(path: pathlib.Path | None) -> str:
    return "'{}'".format(str(path or "").replace("'", "''"))


def _open_table(log: pathlib.Path, state: LedgerState) -> pa.Table:
    """Return the contributions of the open segment."""
    num_rows = sum(body.num_units for body in state.open_bodies)
    path = rows_path(log, len(state.segments))
    rows = np.fromfile(path, dtype=ROW, count=num_rows) if num_rows and path.exists() else np.zeros(0, dtype=ROW)
    if len(rows) != num_rows:
        raise LedgerCorrupt(
            f"{path}: holds {len(rows)} of {num_rows} contributions, or a job is writing at this moment"
        )
    return to_table(state.open_bodies, rows, state.zeroed)


def _steps_table(state: LedgerState) -> pa.Table:
    """Return a row for each step that was begun: whether it was committed, and whether the model now rests on it."""
    in_model = set(state.path)
    begun = list(state.intents)
    return pa.table(
        {
            "generation": pa.array([generation for generation, _ in begun], pa.int32()),
            "step": pa.array([step for _, step in begun], pa.int32()),
            "committed": pa.array([entry in state.commits for entry in begun], pa.bool_()),
            "in_model": pa.array([entry in in_model for entry in begun], pa.bool_()),
        }
    )


def _statistics(state: LedgerState, spread: list[Row], totals: Row, cap: int | None) -> Statistics:
    """Compute the statistics.

    Args:
        state: of the log.
        spread: for each pair of ``steps`` and ``records`` that occurs, the number of ``users`` that have it.
        totals: contributions that are ``zeroed``, ``at_k`` and ``above_k``; k is the most records of a unit in a step.
        cap: as in :class:`Statistics`.
    """
    steps = np.array([row["steps"] for row in spread], dtype=np.int64)
    records = np.array([row["records"] for row in spread], dtype=np.int64)
    users = np.array([row["users"] for row in spread], dtype=np.int64)
    num_users, num_records = int(users.sum()), int((users * records).sum())
    num_contributions = int((users * steps).sum())
    share_of_users_above = share_of_records_above = None
    if cap is not None:
        num_above = int((users * (records > cap)).sum())
        num_beyond = int((users * np.maximum(records - cap, 0)).sum())
        share_of_users_above = num_above / max(num_users, 1)
        share_of_records_above = num_beyond / max(num_records, 1)
    return Statistics(
        num_steps=state.num_charged,
        num_contributions=num_contributions,
        num_records=num_records,
        num_users=num_users,
        num_zeroed=totals["zeroed"],
        records_per_unit=state.records_per_unit,
        share_at_k=totals["at_k"] / max(num_contributions, 1),
        share_above_k=totals["above_k"] / max(num_contributions, 1),
        records_per_user=_quantiles(records, users),
        steps_per_user=_quantiles(steps, users),
        gini=_gini(records, users),
        cap=cap,
        share_of_users_above_cap=share_of_users_above,
        share_of_records_above_cap=share_of_records_above,
    )


def _quantiles(values: np.ndarray, weights: np.ndarray) -> dict[str, int]:
    """Return e.g. ``median`` → value, where ``values[i]`` occurs ``weights[i]`` times; empty without values.

    A quantile is the smallest value with that share of all at or below it.
    """
    shares = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}
    if not len(values):
        return {}
    quantiles = np.quantile(values, list(shares.values()), weights=weights, method="inverted_cdf")
    return dict(zip(shares, quantiles.tolist(), strict=True))


def _gini(values: np.ndarray, weights: np.ndarray) -> float:
    """Return the Gini coefficient, where ``values[i]`` occurs ``weights[i]`` times, by trapezia below the Lorenz curve.

    The Lorenz curve is the share of all records that the users with the fewest hold, over the share of users.
    """
    total = float((values * weights).sum())
    if total == 0:
        return 0.0
    order = np.argsort(values, kind="stable")
    lorenz = np.concatenate(([0.0], np.cumsum((values * weights)[order]) / total))
    share_of_users = weights[order] / weights.sum()
    return float(1.0 - (share_of_users * (lorenz[1:] + lorenz[:-1])).sum())
