"""The contribution log of one run: append-only, hash-chained, intent then commit, fsynced.

One JSON record a line. Each carries the hash of the record before it, so an edit, a removal or a reordering anywhere
breaks the chain. An *intent* is on disk before a step touches any user's data, a *commit* after the update: a crash can
therefore over-count what was spent, never under-count it. An unfinished last line (a torn write) is cut off on opening
and the repair is recorded; any other damage is refused with its offset.

Written by rank 0 alone with ordinary appends and fsync: safe on network file systems. Holds pseudonyms, so it stays in
``secret/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from privtrain.errors import GuaranteeLost, LedgerCorrupt
from privtrain.secret import SecretKey, pseudonym

SCHEMA = "privtrain/ledger/1"
GENESIS = "0" * 64


@dataclasses.dataclass(frozen=True)
class StepEntry:
    """A step on the current path of the run."""

    generation: int
    step: int
    environment: str


@dataclasses.dataclass
class LedgerState:
    """What the records say, replayed in order.

    Attributes:
        head: hash of the last record.
        num_records: records in the log.
        plan_fingerprint: the plan that the run is bound to.
        generation: the newest generation; -1 before the first session.
        intents: (generation, step) → digest of its contributions; every one is charged.
        commits: (generation, step) that finished → digest of the noised sum that was applied.
        path: the steps that the current model rests on, or would if the newest checkpoint were lost.
        is_released: whether the run ended with a release.
    """

    head: str = GENESIS
    num_records: int = 0
    plan_fingerprint: str = ""
    records_per_unit: int = 0
    generation: int = -1
    environment: str = ""
    intents: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    commits: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    path: list[StepEntry] = dataclasses.field(default_factory=list)
    is_released: bool = False

    @property
    def num_charged(self) -> int:
        """Steps charged to the budget: every intent, once, in every generation."""
        return len(self.intents)


def verify(path: pathlib.Path) -> LedgerState:
    """Check the whole log and return what it says.

    Checked: the chain; that a commit follows its intent; no step twice; no unit twice in a step; no unit above k.

    Raises:
        LedgerCorrupt: naming the byte offset of the first record that does not hold, a torn tail included.
    """
    state, end = _replay(path)
    size = path.stat().st_size
    if size > end:
        raise LedgerCorrupt(
            f"{path}: {size - end} bytes of an unfinished record after offset {end}; the last write was torn. "
            "Resuming the run repairs and records it"
        )
    return state


def read_records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The records of a log in order, unchecked; a torn tail is left out."""
    for _, line in _lines(path):
        if line.endswith(b"\n"):
            yield json.loads(line)


class Ledger:
    """The open log of a run that is training. Use :func:`open_ledger`."""

    def __init__(self, path: pathlib.Path, state: LedgerState, pseudonym_key: SecretKey) -> None:
        self.state = state
        self._path = path
        self._key = pseudonym_key
        self._file = open(path, "ab")  # noqa: SIM115 - held for the run, closed by open_ledger
        os.chmod(path, 0o600)

    def begin_session(self, *, generation: int, from_step: int, environment: str) -> None:
        """Record that training (re)starts at ``from_step``; a new generation abandons the steps past it."""
        self._append("session", generation=generation, from_step=from_step, environment=environment)

    def intend(self, generation: int, step: int, units: Sequence[tuple[str, int]]) -> None:
        """Put on disk who is about to contribute.

        Args:
            generation: the current generation.
            step: the logical step.
            units: (unit name, number of records) for every drawn unit.

        Raises:
            GuaranteeLost: if the step was begun before with other contributions.
        """
        body = sorted([pseudonym(self._key, name), count] for name, count in units)
        known = self.state.intents.get((generation, step))
        if known is None:
            self._append("intent", generation=generation, step=step, units=body)
        elif known != _units_digest(body):
            raise GuaranteeLost(
                f"step {step} was begun before with other users; its noise must not cover a second sum. "
                "Start a new run with another run.name"
            )

    def check_replay(self, generation: int, step: int, update_sha256: str) -> None:
        """Before a step is applied: if it was committed before, it must give the same noised sum, bit by bit.

        Raises:
            GuaranteeLost: if it does not. The steps past the checkpoint are given up then; the same command goes on
                in a new generation.
        """
        known = self.state.commits.get((generation, step))
        if known is not None and known != update_sha256:
            self._append("diverged", generation=generation, step=step)
            raise GuaranteeLost(
                f"step {step} was repeated after a restart and gave another sum under the same noise (other weights, "
                "or a device that is not deterministic); nothing was applied. Start the same command again: it goes on "
                "with fresh noise, and the abandoned steps stay charged"
            )

    def commit(self, generation: int, step: int, update_sha256: str) -> None:
        """Put on disk that the step's update was made. A replayed step is committed once."""
        if (generation, step) not in self.state.commits:
            self._append("commit", generation=generation, step=step, update=update_sha256)

    def release(self, epsilon: float | None, delta: float) -> str:
        """Record the release of the model and return the head that the privacy statement quotes."""
        if not self.state.is_released:
            self._append("release", epsilon=epsilon, delta=delta, num_charged=self.state.num_charged)
        return self.state.head

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, kind: str, **fields: Any) -> None:
        record = {"seq": self.state.num_records, "kind": kind, **fields, "prev": self.state.head}
        record["hash"] = _hash(record)
        self._file.write(_encode(record))
        self._file.flush()
        os.fsync(self._file.fileno())
        _apply(self.state, record)


@contextlib.contextmanager
def open_ledger(
    path: pathlib.Path, *, plan_fingerprint: str, records_per_unit: int, pseudonym_key: SecretKey
) -> Iterator[Ledger]:
    """Open the log of a run for appending, or begin it.

    Raises:
        LedgerCorrupt: if anything but an unfinished last line is wrong, or the log belongs to another plan.
    """
    state, end = (LedgerState(), 0) if not path.exists() else _replay(path)
    num_torn_bytes = max(0, path.stat().st_size - end) if path.exists() else 0
    if num_torn_bytes:
        os.truncate(path, end)
    elif path.exists() and path.stat().st_size < end:
        with open(path, "ab") as file:  # the record is whole; only its line end was lost
            file.write(b"\n")
    ledger = Ledger(path, state, pseudonym_key)
    try:
        if state.num_records == 0:
            ledger._append("begin", schema=SCHEMA, plan=plan_fingerprint, records_per_unit=records_per_unit)
        elif state.plan_fingerprint != plan_fingerprint:
            raise LedgerCorrupt(f"{path} belongs to another plan ({state.plan_fingerprint[:12]})")
        if num_torn_bytes:
            ledger._append("repair", num_torn_bytes=num_torn_bytes)
        yield ledger
    finally:
        ledger.close()


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def _replay(path: pathlib.Path) -> tuple[LedgerState, int]:
    """Replay every whole record; return the state and the offset after the last one, its line end included."""
    state, end = LedgerState(), 0
    for offset, line in _lines(path):
        if not line.endswith(b"\n"):
            if _is_torn(line):
                break
            line = line + b"\n"
        problem = _check(state, line)
        if problem:
            raise LedgerCorrupt(f"{path}: record {state.num_records} at byte {offset}: {problem}")
        _apply(state, json.loads(line))
        end = offset + len(line)
    return state, end


def _is_torn(line: bytes) -> bool:
    """Whether an unterminated last line is a write cut short, as opposed to a whole record or a damaged one."""
    if not line.isascii():
        return False
    try:
        json.JSONDecoder().raw_decode(line.decode("ascii"))
    except ValueError:
        return line.startswith(b'{"'[: len(line)])
    return False


def _check(state: LedgerState, line: bytes) -> str | None:
    """What is wrong with the next record, if anything."""
    try:
        record = json.loads(line)
    except ValueError:
        return "not a record"
    if not isinstance(record, dict) or line != _encode(record):
        return "not in canonical form"
    if record.get("seq") != state.num_records or record.get("prev") != state.head:
        return "does not follow the record before it"
    if record.get("hash") != _hash(record):
        return "its content does not match its hash"
    if (record.get("kind") == "begin") != (state.num_records == 0):
        return "a log has one beginning, at its start"
    return _CHECKS.get(record["kind"], _unknown_kind)(state, record)


def _unknown_kind(state: LedgerState, record: dict[str, Any]) -> str | None:  # noqa: ARG001
    return f"a record of unknown kind {record['kind']!r}"


def _nothing_to_check(state: LedgerState, record: dict[str, Any]) -> str | None:  # noqa: ARG001
    return None


def _check_session(state: LedgerState, record: dict[str, Any]) -> str | None:
    if record["generation"] not in (max(state.generation, 0), state.generation + 1):
        return "a session of a generation that is neither the last nor the next"
    if not 0 <= record["from_step"] <= len(state.path):
        return "a session that starts past the steps that were taken"
    return None


def _check_commit(state: LedgerState, record: dict[str, Any]) -> str | None:
    key = (record["generation"], record["step"])
    return "a commit without an open intent" if key not in state.intents or key in state.commits else None


def _check_release(state: LedgerState, record: dict[str, Any]) -> str | None:
    return "a release that charges other steps" if record["num_charged"] != state.num_charged else None


def _check_intent(state: LedgerState, record: dict[str, Any]) -> str | None:
    if state.is_released:
        return "a step after the release"
    if (record["generation"], record["step"]) in state.intents:
        return "a step twice"
    if record["generation"] != state.generation or record["step"] != len(state.path):
        return "a step out of order"
    names = [name for name, _ in record["units"]]
    if len(set(names)) != len(names):
        return "a unit twice in one step"
    if any(not 1 <= count <= state.records_per_unit for _, count in record["units"]):
        return f"a unit with more than {state.records_per_unit} records, or none"
    return None


_CHECKS: dict[str, Callable[[LedgerState, dict[str, Any]], str | None]] = {
    "begin": _nothing_to_check,
    "session": _check_session,
    "intent": _check_intent,
    "commit": _check_commit,
    "diverged": _nothing_to_check,
    "repair": _nothing_to_check,
    "release": _check_release,
}


def _apply(state: LedgerState, record: dict[str, Any]) -> None:
    state.head = record["hash"]
    state.num_records += 1
    match record["kind"]:
        case "begin":
            state.plan_fingerprint = record["plan"]
            state.records_per_unit = record["records_per_unit"]
        case "session":
            if record["generation"] != state.generation:
                state.path = [entry for entry in state.path if entry.step < record["from_step"]]
            state.generation = record["generation"]
            state.environment = record["environment"]
        case "intent":
            state.intents[record["generation"], record["step"]] = _units_digest(record["units"])
            state.path.append(StepEntry(record["generation"], record["step"], state.environment))
        case "commit":
            state.commits[record["generation"], record["step"]] = record["update"]
        case "diverged":
            # Nothing of this generation may be replayed again.
            state.path = [dataclasses.replace(entry, environment="") for entry in state.path]
            state.environment = ""
        case "release":
            state.is_released = True


def _units_digest(units: Iterable[Sequence[Any]]) -> str:
    return hashlib.sha256(json.dumps([list(u) for u in units], separators=(",", ":")).encode()).hexdigest()


def _hash(record: dict[str, Any]) -> str:
    body = {key: value for key, value in record.items() if key != "hash"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n"
