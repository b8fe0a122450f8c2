"""Logs for tests: written as a job writes them, or forged record by record."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from privtrain.ledger.bodies import each_segment
from privtrain.ledger.chain import lines_of, make_line, replay
from privtrain.ledger.head import _encode, head_path
from privtrain.ledger.log import open_ledger, verify_chain
from privtrain.privacy.secret import SecretKey, pseudonym
from privtrain.run.bundle import ReleaseManifest

KEY = SecretKey.insecure(0, "pseudonym")


def opened(path: pathlib.Path, plan: str = "plan", k: int = 3, segment_rows: int = 1 << 18):
    return open_ledger(path, plan_fingerprint=plan, records_per_unit=k, pseudonym_key=KEY, segment_rows=segment_rows)


def units_of(step: int, num_users: int = 9, k: int = 3) -> list[tuple[str, int]]:
    """Who takes part in a step: a pure function of it, now and then nobody."""
    rng = np.random.default_rng(step)
    size = 0 if step % 5 == 0 else int(rng.integers(1, num_users))
    return [(f"user-{u}", int(rng.integers(1, k + 1))) for u in rng.permutation(num_users)[:size]]


def write_steps(
    path: pathlib.Path,
    num_steps: int = 5,
    *,
    last_committed: bool = True,
    segment_rows: int = 1 << 18,
    num_users: int = 9,
    released: bool = False,
) -> pathlib.Path:
    with opened(path, segment_rows=segment_rows) as ledger:
        if ledger.state.generation < 0:
            ledger.begin_session(generation=0, from_step=0, environment="e")
        for step in range(len(ledger.state.path), num_steps):
            units = units_of(step, num_users)
            ledger.intend(0, step, units)
            if last_committed or step < num_steps - 1:
                ledger.commit(0, step, f"sum-{step}", [name for name, _ in units[: step % 3 == 1]])
        if released:
            ledger.release(1.0, 1e-5, manifest_of(ledger.prepare_release()))
    return path


def manifest_of(head: str) -> ReleaseManifest:
    """A release manifest of no files."""
    return ReleaseManifest("0" * 64, "1" * 64, head, {}, "2" * 64, {})


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """Every file of a log."""
    return [path, head_path(path), *sorted(path.with_suffix("").iterdir())]


def snapshot(path: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {file: file.read_bytes() for file in files_of(path)}


def restore(path: pathlib.Path, content: dict[pathlib.Path, bytes]) -> None:
    for file in files_of(path):
        if file not in content and file.is_file():
            file.unlink()
    for file, data in content.items():
        file.write_bytes(data)


def contents(path: pathlib.Path) -> dict[tuple[int, int], dict[str, int]]:
    """(generation, step) → pseudonym → records, out of checked bodies."""
    found = {}
    for bodies, rows in each_segment(path, verify_chain(path, allow_torn=True)):
        start = 0
        for body in bodies:
            part = rows[start : start + body.num_units]
            found[body.generation, body.step] = {
                unit.tobytes().hex(): int(n) for unit, n in zip(part["unit"], part["records"], strict=True)
            }
            start += body.num_units
    return found


def by_pseudonym(units: list[tuple[str, int]]) -> dict[str, int]:
    return {pseudonym(KEY, name): count for name, count in units}


def rewrite_head(path: pathlib.Path) -> None:
    """Make the head file agree with the log, as somebody would who shortens both."""
    state, _ = replay(path)
    _write_head(path, state.num_records, state.head, state.earlier_heads[0])


def _write_head(path: pathlib.Path, num_records: int, head: str, earlier: str) -> None:
    slots = sorted([(num_records, head), (num_records - 1, earlier)], key=lambda slot: slot[0] % 2)
    head_path(path).write_bytes(b"".join(_encode(*slot) for slot in slots))


def could_be_torn(path: pathlib.Path, position: int, byte: int) -> bool:
    """Whether this byte of the head file is what a crash in the write of the last record would have left there."""
    state, _ = replay(path)
    place, offset = divmod(position, 128)
    return place == state.num_records % 2 and _encode(state.num_records - 2, state.earlier_heads[1])[offset] == byte


def drop_records(path: pathlib.Path, kind: str) -> None:
    """Remove all records of a kind from the end of a log, and make the head file agree."""
    lines = [line for _, line in lines_of(path)]
    while f'"kind":"{kind}"'.encode() in lines[-1]:
        lines.pop()
    path.write_bytes(b"".join(lines))
    rewrite_head(path)


def forge(path: pathlib.Path, records: list[tuple[str, Any]]) -> None:
    """Append records that are well chained and break any other rule, as somebody would who recomputes every hash.

    Fields may be a function of the head before the record.
    """
    state, _ = replay(path)
    for kind, given in records:
        fields = given(state.head) if callable(given) else given
        line = make_line(state, kind, fields)
        with open(path, "ab") as file:
            file.write(line)
        state.num_records, state.earlier_heads = state.num_records + 1, (state.head, state.earlier_heads[0])
        state.head = line[9:73].decode()
    _write_head(path, state.num_records, state.head, state.earlier_heads[0])
