"""The chained records of a log: their form, the rules that they obey, and what they say when replayed in order.

A log has one JSON object a line, a *record*. It begins with the SHA-256 of the rest of the line, and the rest holds the
hash of the record before, so an edit, a removal or a reordering anywhere breaks the chain::

    {"hash":"9f…","seq":2,"prev":"41…","kind":"intent","generation":0,"step":0,"num_units":16,"root":"c3…"}

Kinds of records: ``begin`` (the first), ``session`` (training starts or resumes, in a *generation*: a stretch under one
secret), ``intent`` (a step is about to use data, and is charged from here on), ``commit`` (the step's update was made),
``seal`` (rows were moved to a Parquet file), ``repair`` (a torn write was cut off), ``release`` (the last).

A step's *body*, the list of units that took part in it, lies elsewhere (:mod:`.bodies`); the intent record binds it by
a Merkle root. The *head* of a log is the hash of its last record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from privtrain.errors import LedgerCorrupt
from privtrain.files import strict_json
from privtrain.run.bundle import ReleaseManifest

SCHEMA = "privtrain/ledger/2"
GENESIS = "0" * 64

# A line is the opening, the hash of 64 digits, the separator, and then the record without the brace that opens it.
_OPENING, _SEPARATOR = b'{"hash":"', b'",'
_HASH_END = len(_OPENING) + 64
_BODY_AT = _HASH_END + len(_SEPARATOR)

#: Fields that count something, in any kind of record.
_COUNTS = frozenset(
    {"seq", "generation", "step", "from_step", "num_units", "records_per_unit", "num_groups"}
    | {"segment", "num_rows", "num_bytes", "num_charged"}
)


class StepEntry(NamedTuple):
    """A step of :attr:`LedgerState.path`; equals the tuple (generation, step) that is a key of the state's mappings."""

    generation: int
    step: int


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """What a step's intent record says of the units that took part; their rows lie in the body files.

    Attributes:
        record: number of the intent record in the log.
        generation: the step's generation.
        step: the logical step.
        num_units: units of the step.
        root: Merkle root over their rows, in hex.
    """

    record: int
    generation: int
    step: int
    num_units: int
    root: str


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A sealed file of bodies.

    Attributes:
        bodies: whose rows it holds, in order.
        num_bytes: its size.
        chunks: SHA-256 of every piece of it, see :data:`privtrain.ledger.bodies.CHUNK_BYTES`.
    """

    bodies: tuple[Body, ...]
    num_bytes: int
    chunks: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Contributions in the file."""
        return sum(body.num_units for body in self.bodies)


@dataclasses.dataclass(frozen=True, slots=True)
class Release:
    """The guarantee and the released files, as stated by the last record of a finished run.

    Attributes:
        epsilon: ε for all steps charged; ``None`` where no finite one is guaranteed.
        delta: δ.
        manifest: the privacy statement, every released file, the base model, the tokenizer and the plan, by digest.
    """

    epsilon: float | None
    delta: float
    manifest: ReleaseManifest


@dataclasses.dataclass
class LedgerState:
    """The state of a run after replaying its records in order.

    Attributes:
        head: hash of the last record.
        earlier_heads: hashes of the two records before it, the later first.
        num_records: records in the log.
        plan: digest of the plan's fingerprint under the pseudonym key.
        key_sha256: commitment to the pseudonym key.
        records_per_unit: k, the most records of a unit in a step.
        num_groups: groups that steps draw from in turn (cyclic Poisson sampling); 1 where all units may join a step.
        generation: the newest generation; -1 before the first session.
        environment: digest of the environment of the last session under the pseudonym key; one generation has one.
        split: commitment to the coins that are trained on; empty before the first session.
        intents: (generation, step) → root over its contributions; every one is charged.
        commits: (generation, step) that finished → commitment to the exact sum that was noised and applied.
        zeroed: (generation, step) → positions in the step's rows of the units whose gradient was not finite, so that
            they counted as zero; only for steps that have some.
        path: the steps that led to the current model, in order; steps that a new generation abandoned are not on it.
        segments: sealed files of bodies, in order.
        open_bodies: bodies of the steps since the last seal.
        release: what the release record says; ``None`` until the run is released.
    """

    head: str = GENESIS
    earlier_heads: tuple[str, str] = (GENESIS, GENESIS)
    num_records: int = 0
    plan: str = ""
    key_sha256: str = ""
    records_per_unit: int = 0
    num_groups: int = 1
    generation: int = -1
    environment: str = ""
    split: str = ""
    intents: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    commits: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    zeroed: dict[tuple[int, int], list[int]] = dataclasses.field(default_factory=dict)
    path: list[StepEntry] = dataclasses.field(default_factory=list)
    segments: list[Segment] = dataclasses.field(default_factory=list)
    open_bodies: list[Body] = dataclasses.field(default_factory=list)
    release: Release | None = None

    @property
    def is_released(self) -> bool:
        """Whether the run ended with a release."""
        return self.release is not None

    @property
    def num_charged(self) -> int:
        """Steps charged to the budget: every intent, once, in every generation."""
        return len(self.intents)

    @property
    def num_contributions(self) -> int:
        """Contributions of a user to a step, over all steps charged."""
        return sum(body.num_units for body in self.bodies())

    def bodies(self) -> Iterator[Body]:
        """Return the bodies of all steps charged, in order."""
        for segment in self.segments:
            yield from segment.bodies
        yield from self.open_bodies


def make_line(state: LedgerState, kind: str, fields: dict[str, Any]) -> bytes:
    """Return the line of the next record, of this kind and with these further fields, ready to be appended."""
    body = strict_json.dumps({"seq": state.num_records, "prev": state.head, "kind": kind, **fields}).encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    return _OPENING + digest + _SEPARATOR + body.removeprefix(b"{") + b"\n"


def lines_of(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, line) of every line of a log; the last may lack its newline."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def read_records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, checked one by one but not as a chain; an incomplete last line is skipped.

    Raises:
        LedgerCorrupt: naming the offset of a line that is no record.
    """
    for offset, line in lines_of(path):
        if line.endswith(b"\n"):
            try:
                yield record_of(line)
            except ValueError as error:
                raise LedgerCorrupt(f"{path}: the line at byte {offset}: {error}") from None


def replay(path: pathlib.Path) -> tuple[LedgerState, int]:
    """Check and apply the records of a log; return the state, and the byte offset after the last whole line.

    What follows that offset, if anything, is a torn last write.

    Raises:
        LedgerCorrupt: naming the offset of the first record that does not hold.
    """
    state, end = LedgerState(), 0
    for offset, line in lines_of(path):
        if not line.endswith(b"\n"):
            break
        try:
            advance(state, line)
        except ValueError as error:
            raise LedgerCorrupt(f"{path}: record {state.num_records} at byte {offset}: {error}") from None
        end = offset + len(line)
    return state, end


def advance(state: LedgerState, line: bytes) -> None:
    """Check the next line and apply its record to the state.

    Raises:
        ValueError: saying what is wrong with it.
    """
    record = parse(state, line)
    try:
        apply(state, record)
    except (KeyError, TypeError) as error:
        raise ValueError(f"missing or malformed field ({error!r})") from None


def record_of(line: bytes) -> dict[str, Any]:
    """Return the record of a line; raise unless its hash matches and it is the record's canonical serialisation.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not line.startswith(_OPENING) or line[_HASH_END:_BODY_AT] != _SEPARATOR:
        raise ValueError("not a record")
    digest = hashlib.sha256(b"{" + line[_BODY_AT:-1]).hexdigest()
    if digest.encode() != line[len(_OPENING) : _HASH_END]:
        raise ValueError("its content does not match its hash")
    # Compared with how it would be written: the hash does not cover the field "hash" itself, so a line could hold a
    # second one of the forger's choice further on.
    record = strict_json.loads(line)
    first = {name: record[name] for name in ("hash", "seq", "prev", "kind") if name in record}
    if strict_json.dumps({**first, **record}).encode() + b"\n" != line:
        raise ValueError("it is not in the form in which records are written")
    if any(type(record[name]) is not int or record[name] < 0 for name in _COUNTS & record.keys()):
        raise ValueError("a count is negative or not an integer")
    return {**record, "hash": digest}


def parse(state: LedgerState, line: bytes) -> dict[str, Any]:
    """Return the record of the line that follows ``state``, checked against all rules; the state is not changed.

    Raises:
        ValueError: saying what is wrong with it.
    """
    record = record_of(line)
    try:
        if record["seq"] != state.num_records or record["prev"] != state.head:
            raise ValueError("does not follow the record before it")
        if (record["kind"] == "begin") != (state.num_records == 0):
            raise ValueError("a log has one beginning, at its start")
        if state.is_released:
            raise ValueError("a record after the release")
        check = _CHECKS.get(record["kind"], _unknown_kind)
        problem = check(state, record)
    except (KeyError, TypeError) as error:
        raise ValueError(f"missing or malformed field ({error!r})") from None
    if problem:
        raise ValueError(problem)
    return record


def _unknown_kind(state: LedgerState, record: dict[str, Any]) -> str | None:  # noqa: ARG001
    return f"a record of unknown kind {record['kind']!r}"


def _nothing_to_check(state: LedgerState, record: dict[str, Any]) -> str | None:  # noqa: ARG001
    return None


def _check_begin(state: LedgerState, record: dict[str, Any]) -> str | None:  # noqa: ARG001
    """Check the first record, which says what log this is."""
    if record["schema"] != SCHEMA:
        return f"schema {record['schema']!r}; this version reads {SCHEMA!r}"
    if "num_groups" in record and record["num_groups"] < 2:  # it is left out where there are no groups
        return "groups of units that are none"
    return None


def _check_session(state: LedgerState, record: dict[str, Any]) -> str | None:
    """Check a start of training: the present generation continues, or the next one begins, after steps on the path."""
    present = max(state.generation, 0)  # -1 before the first session, which is of generation 0
    if record["generation"] not in (present, state.generation + 1):
        return "a session of a generation that is neither the last nor the next"
    if not 0 <= record["from_step"] <= len(state.path):
        return "a session that starts past the steps that were taken"
    if state.split and record.get("split") != state.split:
        return "a session with other coins than the run began with"
    return None


def _check_intent(state: LedgerState, record: dict[str, Any]) -> str | None:
    """Check that a step is about to begin for the first time, right after the last step on the path."""
    if (record["generation"], record["step"]) in state.intents:
        return "a step twice"
    if record["generation"] != state.generation or record["step"] != len(state.path):
        return "a step out of order"
    return None


def _check_commit(state: LedgerState, record: dict[str, Any]) -> str | None:
    """Check the end of a step that has begun; ``zeroed`` holds rows of its units that counted as zero, ascending."""
    key = (record["generation"], record["step"])
    if key not in state.intents or key in state.commits:
        return "a commit without an open intent"
    zeroed = record["zeroed"]
    if zeroed:
        # The step's body is still open: a segment is sealed after a commit only. Otherwise no row can be meant.
        num_units = 0
        for body in state.open_bodies:
            if (body.generation, body.step) == key:
                num_units = body.num_units
        is_ascending = zeroed == sorted(set(zeroed))
        if not is_ascending or min(zeroed) < 0 or max(zeroed) >= num_units:
            return "units that counted as zero and are not in the step"
    return None


def _check_seal(state: LedgerState, record: dict[str, Any]) -> str | None:
    """Check that a sealed file is the next one, and holds the rows of all steps since the one before."""
    if record["segment"] != len(state.segments):
        return "a segment out of order"
    if record["num_rows"] != sum(body.num_units for body in state.open_bodies):
        return "a segment that does not hold the rows of the steps before it"
    return None


def _check_release(state: LedgerState, record: dict[str, Any]) -> str | None:
    """Check the end of a finished run: all steps are charged, all rows sealed, and the release quotes this log."""
    if record["num_charged"] != state.num_charged:
        return "a release that charges other steps"
    if any(body.num_units for body in state.open_bodies):  # a segment of empty steps alone is never sealed
        return "a release before the last segment is sealed"
    if ReleaseManifest.parse(record["manifest"]).ledger_head != state.head:
        return "a release that quotes another head than that of the record before it"
    return None


#: Kind of a record → the check of its fields against the state before it, which returns what is wrong or ``None``.
_CHECKS: dict[str, Callable[[LedgerState, dict[str, Any]], str | None]] = {
    "begin": _check_begin,
    "session": _check_session,
    "intent": _check_intent,
    "commit": _check_commit,
    "repair": _nothing_to_check,
    "seal": _check_seal,
    "release": _check_release,
}


def apply(state: LedgerState, record: dict[str, Any]) -> None:
    """Update the state with a record that :func:`parse` has checked."""
    head_before, _ = state.earlier_heads
    state.earlier_heads = (state.head, head_before)
    state.head = record["hash"]
    state.num_records += 1
    match record["kind"]:
        case "begin":
            state.plan = record["plan"]
            state.key_sha256 = record["key_sha256"]
            state.records_per_unit = record["records_per_unit"]
            state.num_groups = record.get("num_groups", 1)
        case "session":
            if record["generation"] != state.generation:  # steps past from_step are abandoned: not replayed
                state.path = [entry for entry in state.path if entry.step < record["from_step"]]
            state.generation = record["generation"]
            state.environment = record["environment"]
            state.split = record.get("split", "")
        case "intent":
            generation, step = record["generation"], record["step"]
            state.intents[generation, step] = record["root"]
            state.open_bodies.append(Body(record["seq"], generation, step, record["num_units"], record["root"]))
            state.path.append(StepEntry(generation, step))
        case "commit":
            state.commits[record["generation"], record["step"]] = record["update"]
            if record["zeroed"]:
                state.zeroed[record["generation"], record["step"]] = record["zeroed"]
        case "seal":
            state.segments.append(Segment(tuple(state.open_bodies), record["num_bytes"], tuple(record["chunks"])))
            state.open_bodies = []
        case "release":
            state.release = Release(record["epsilon"], record["delta"], ReleaseManifest.parse(record["manifest"]))
