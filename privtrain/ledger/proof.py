"""Proofs of one user's part in a run, checkable without the run and without the other users' data.

A proof holds the records of the log, which name nobody, and for every step one or two leaves of its Merkle tree
(:mod:`.merkle`): those with the user's row or, if the user was absent, with the two rows between which it would stand.
Whoever checks a proof recomputes the chain of records up to a *head*, the last record's hash, that they have from
elsewhere (``privacy.json``, the model card), the user's row in every step and the way from its leaf to the root.

It reveals: the user's pseudonym and part; per step how many users took part and how many of them counted as zero; up to
31 rows of others, which are random bytes without their pseudonyms; and nothing else of ``secret/``. That the pseudonym
is this user's takes the key to check, and that a step's tree is sorted takes the log: ``ledger verify`` does that.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np

from privtrain.errors import ProofRejected
from privtrain.files import strict_json
from privtrain.ledger import merkle
from privtrain.ledger.bodies import each_segment
from privtrain.ledger.chain import Body, LedgerState, advance, lines_of
from privtrain.ledger.log import key_commitment, verify_chain
from privtrain.privacy.secret import SecretKey, pseudonym

SCHEMA = "privtrain/ledger-proof/1"


@dataclasses.dataclass(frozen=True)
class Part:
    """One user's part in one step.

    Attributes:
        generation: the step's generation: a stretch of training under one secret.
        step: the logical step.
        records: how many records the user contributed.
        is_zeroed: whether the user's gradient was not finite and counted as zero.
        is_committed: whether the step's update was made; if not, the step was still charged.
        is_in_model: whether the model rests on this step; not if a new generation began before it.
    """

    generation: int
    step: int
    records: int
    is_zeroed: bool
    is_committed: bool
    is_in_model: bool


@dataclasses.dataclass(frozen=True)
class CheckedProof:
    """The verified content of a proof.

    Attributes:
        user: the user that the proof names; that the pseudonym is this user's is proven only if ``is_key_checked``.
        pseudonym: the pseudonym that the proof is about, in hex.
        head: hash of the log's last record, or of the one before its release record.
        num_steps: steps that the proof covers: all that were charged.
        parts: the steps that the user took part in; from all others the user was absent.
        is_key_checked: whether the pseudonym was recomputed from the user and the key that the log was written with.
    """

    user: str | None
    pseudonym: str
    head: str
    num_steps: int
    parts: tuple[Part, ...]
    is_key_checked: bool


def prove(log: pathlib.Path, unit_pseudonym: str, user: str | None = None) -> dict[str, Any]:
    """Make the proof of one user's part in every step, checking the log on the way.

    Args:
        log: the run's log.
        unit_pseudonym: of the user, in hex.
        user: the user's id, for the proof to name.

    Returns:
        A JSON object. ``records``: the lines of the log. ``steps``: for each charged step, in order, its leaves, as
        :func:`_opening` gives them.

    Raises:
        LedgerCorrupt: if the log is not intact.
    """
    state = verify_chain(log)
    secret = bytes.fromhex(unit_pseudonym)
    steps = []
    for bodies, rows in each_segment(log, state):
        start = 0
        for body in bodies:
            steps.append(_opening(body, rows[start : start + body.num_units], secret))
            start += body.num_units
    lines = [line for _, line in itertools.islice(lines_of(log), state.num_records)]
    return {
        "schema": SCHEMA,
        "user": user,
        "pseudonym": unit_pseudonym,
        "head": state.head,
        "records": [line.decode("ascii").rstrip("\n") for line in lines],
        "steps": steps,
    }


def _opening(body: Body, rows: np.ndarray, secret: bytes) -> list[dict[str, Any]]:
    """Return the one or two Merkle leaves that prove a user's row, or its absence by the neighbouring rows.

    A tree row is a tag, by which rows are sorted and which only the user's pseudonym gives, and the masked number of
    records. The tree has a leaf for each bucket: ``BUCKET_ROWS`` consecutive rows, fewer in the last.

    Args:
        body: what the step's intent record says.
        rows: [units] of :data:`~privtrain.ledger.bodies.ROW`, of all units of the step, in the order of the tree.
        secret: the user's pseudonym, which nobody else should know.

    Returns:
        Of each leaf its index (``leaf``), its ``rows``, and its ``path``: the hashes that lead from it to the root.
    """
    context = merkle.step_context(body.generation, body.step)
    units = np.ascontiguousarray(rows["unit"]).tobytes()
    tree_rows = merkle.rows_of(context, units, np.ascontiguousarray(rows["records"]))
    tags = _tags(tree_rows)
    (own_hash,) = merkle.row_hashes(context, secret)
    own_tag = own_hash[: merkle.TAG_BYTES]
    place = bisect.bisect_left(tags, own_tag)  # index of the user's row, or of the first row after its place
    is_there = place < len(tags) and tags[place] == own_tag
    # Of an absent user the rows on both sides; before the first row or after the last there is one.
    neighbours = [index for index in (place - 1, place) if 0 <= index < len(tags)]
    shown = [place] if is_there else neighbours
    shown_leaves = sorted({index // merkle.BUCKET_ROWS for index in shown})  # two rows may share a leaf
    hashes = merkle.leaf_hashes(tree_rows)
    opening = []
    for leaf in shown_leaves:
        rows_of_leaf = _encode(merkle.bucket(tree_rows, leaf))
        path = [_encode(item) for item in merkle.audit_path(hashes, leaf)]
        opening.append({"leaf": leaf, "rows": rows_of_leaf, "path": path})
    return opening


def check_proof(
    proof: dict[str, Any], head: str, *, key: SecretKey | None = None, user: str | None = None
) -> CheckedProof:
    """Check a proof against a head, without the run.

    Args:
        proof: what :func:`prove` made.
        head: the head of the log, from a source that the checker trusts.
        key: the pseudonym key, if the organisation shows it to this checker.
        user: whose proof it must be; the one that the proof names if not given.

    Raises:
        ProofRejected: saying what does not hold.
    """
    try:
        return _check(proof, head, key, user)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise ProofRejected(f"not a proof that holds: {error}") from None


def _check(proof: dict[str, Any], head: str, key: SecretKey | None, user: str | None) -> CheckedProof:
    """Replay the proof's records and check the user's leaves of every step; arguments as for :func:`check_proof`.

    Raises what is wrong with a proof of the right form; of another form, KeyError, TypeError or the like.
    """
    if proof["schema"] != SCHEMA:
        raise ProofRejected(f"schema {proof['schema']!r}; this version reads {SCHEMA!r}")
    named = proof["user"]
    if user is not None and named != user:
        raise ProofRejected("it is about another user than the one given")
    state = _replayed(proof["records"])
    # The statement and the card quote the head before the release record, which adds no step.
    if head != state.head and not (state.is_released and head == state.earlier_heads[0]):
        raise ProofRejected(f"its records end in head {state.head}, not in {head}")
    if key is not None:
        _check_key(state, proof, key)
    secret = bytes.fromhex(proof["pseudonym"])
    if len(secret) != merkle.PSEUDONYM_BYTES or secret.hex() != proof["pseudonym"]:
        raise ProofRejected(f"its pseudonym is not {2 * merkle.PSEUDONYM_BYTES} hexadecimal digits")
    in_model = set(state.path)
    parts = []
    for body, leaves in zip(state.bodies(), proof["steps"], strict=True):
        row = _check_step(body, leaves, secret)
        if row is not None:
            place, records = row
            if not 1 <= records <= state.records_per_unit:
                raise ProofRejected(
                    f"step {body.step} of generation {body.generation}: {records} records of the user, where the log "
                    f"allows 1 to {state.records_per_unit}"
                )
            step = (body.generation, body.step)
            part = Part(
                generation=body.generation,
                step=body.step,
                records=records,
                is_zeroed=place in state.zeroed.get(step, ()),
                is_committed=step in state.commits,
                is_in_model=step in in_model,
            )
            parts.append(part)
    return CheckedProof(
        user=named,
        pseudonym=proof["pseudonym"],
        head=head,
        num_steps=state.num_charged,
        parts=tuple(parts),
        is_key_checked=key is not None,
    )


def _replayed(records: list[str]) -> LedgerState:
    """Return the state after the log's lines, checked as a chain."""
    state = LedgerState()
    for record in records:
        try:
            advance(state, record.encode() + b"\n")
        except ValueError as error:
            raise ProofRejected(f"record {state.num_records}: {error}") from None
    return state


def _check_key(state: LedgerState, proof: dict[str, Any], key: SecretKey) -> None:
    """Raise unless the log was written with this key, and the proof's pseudonym is its user's under the key."""
    if key_commitment(key) != state.key_sha256:
        raise ProofRejected("the key is not the one that the log was written with")
    if pseudonym(key, str(proof["user"])) != proof["pseudonym"]:
        raise ProofRejected(f"its pseudonym is not that of {proof['user']!r}")


def _check_step(body: Body, leaves: list[dict[str, Any]], secret: bytes) -> tuple[int, int] | None:
    """Return the user's (row index, records) in a step; ``None`` if the leaves prove the user's absence.

    Args:
        body: what the step's intent record says.
        leaves: as :func:`_opening` gives them; neighbours in the tree if there are two.
        secret: the user's pseudonym.

    Raises:
        ProofRejected: if the leaves are not the tree's, or prove neither presence nor absence.
    """
    where = f"step {body.step} of generation {body.generation}"
    rows = _rows_of_leaves(body, leaves, where)
    first = leaves[0]["leaf"] * merkle.BUCKET_ROWS if leaves else 0  # index of the first row shown
    tags = _tags(rows)
    if any(a >= b for a, b in itertools.pairwise(tags)):
        raise ProofRejected(f"{where}: rows out of order")
    (own,) = merkle.row_hashes(merkle.step_context(body.generation, body.step), secret)
    place = bisect.bisect_left(tags, own[: merkle.TAG_BYTES])
    if place < len(tags) and tags[place] == own[: merkle.TAG_BYTES]:
        row = rows[place * merkle.ROW_BYTES : (place + 1) * merkle.ROW_BYTES]
        masked = int.from_bytes(row[merkle.TAG_BYTES :], "big")  # the number of records, XORed with the row's own end
        return first + place, masked ^ int.from_bytes(own[merkle.TAG_BYTES :], "big")
    is_lower_shown = place > 0 or first == 0  # a neighbour, or the tree begins here
    is_upper_shown = place < len(tags) or first + len(tags) == body.num_units  # a neighbour, or the tree ends here
    if not (is_lower_shown and is_upper_shown):
        raise ProofRejected(f"{where}: shows neither the user nor both neighbours")
    return None


def _rows_of_leaves(body: Body, leaves: list[dict[str, Any]], where: str) -> bytes:
    """Return the rows that the leaves hold, one after another, checked against the root of the step's tree.

    Args:
        body: what the step's intent record says.
        leaves: as :func:`_opening` gives them.
        where: names the step in errors.

    Raises:
        ProofRejected: if a leaf is not the tree's, or the leaves are no neighbours.
    """
    num_leaves = merkle.num_buckets(body.num_units)
    rows = b""
    for leaf in leaves:
        content, path = _decode(leaf["rows"]), [_decode(item) for item in leaf["path"]]
        if merkle.root_from_path(merkle.leaf_hash(content), leaf["leaf"], num_leaves, path) != body.root:
            raise ProofRejected(f"{where}: a leaf does not lead to the root")
        num_leaves_before = len(rows) // (merkle.BUCKET_ROWS * merkle.ROW_BYTES)
        if leaf["leaf"] != leaves[0]["leaf"] + num_leaves_before:
            raise ProofRejected(f"{where}: leaves that are not neighbours")
        # Every leaf is full but the last of the tree.
        num_rows = min(merkle.BUCKET_ROWS, body.num_units - leaf["leaf"] * merkle.BUCKET_ROWS)
        if len(content) != merkle.ROW_BYTES * num_rows:
            raise ProofRejected(f"{where}: a leaf of another size than its place asks for")
        rows += content
    return rows


def _tags(rows: bytes) -> list[bytes]:
    """Return what rows are sorted by: of each its bytes without the number of records."""
    if len(rows) % merkle.ROW_BYTES:
        raise ValueError("a row cut short")
    return [rows[i : i + merkle.TAG_BYTES] for i in range(0, len(rows), merkle.ROW_BYTES)]


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def read_proof(path: pathlib.Path) -> dict[str, Any]:
    """Return the proof in a file.

    Raises:
        ProofRejected: if it is no such file.
    """
    try:
        proof = strict_json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProofRejected(f"{path} cannot be read: {error}") from None
    if not isinstance(proof, dict):
        raise ProofRejected(f"{path} holds no proof")
    return proof
