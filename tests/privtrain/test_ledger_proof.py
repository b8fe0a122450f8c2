"""Proofs of one user's part: they show what the log holds, nothing of the others, and no forgery passes."""

from __future__ import annotations

import base64
import copy
import hashlib
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from privtrain.errors import LedgerCorrupt, ProofRejected
from privtrain.ledger import merkle
from privtrain.ledger.bodies import rows_path
from privtrain.ledger.log import verify
from privtrain.ledger.proof import check_proof, prove
from privtrain.privacy.secret import SecretKey, pseudonym
from tests.privtrain.ledgers import KEY, opened, units_of, write_steps

NUM_STEPS = 24
NUM_USERS = 90


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Some steps sealed and some not, steps of nobody, of one leaf and of several, one that was never committed."""
    path = tmp_path_factory.mktemp("log") / "l.jsonl"
    return write_steps(path, NUM_STEPS, segment_rows=300, num_users=NUM_USERS, last_committed=False)


def proof_of(log, user):
    return prove(log, pseudonym(KEY, user), user)


@pytest.mark.parametrize("user", ["user-0", "user-17", "user-89", "nobody"])
def test_a_proof_shows_exactly_the_part_that_the_user_had(log, user):
    proof = json.loads(json.dumps(proof_of(log, user)))
    found = check_proof(proof, verify(log).head, key=KEY, user=user)
    assert found.num_steps == NUM_STEPS
    assert found.is_key_checked
    expected = []
    for step in range(NUM_STEPS):
        units = units_of(step, NUM_USERS)
        zeroed = [name for name, _ in units[: step % 3 == 1]]
        is_committed = step < NUM_STEPS - 1
        expected += [(step, n, is_committed and name in zeroed, is_committed) for name, n in units if name == user]
    assert [(p.step, p.records, p.is_zeroed, p.is_committed) for p in found.parts] == expected
    assert bool(expected) == (user != "nobody")


def test_some_user_of_the_test_counted_as_zero(log):
    users = [units_of(step, NUM_USERS)[0][0] for step in verify(log).zeroed for _, step in [step]]
    parts = check_proof(proof_of(log, users[0]), verify(log).head).parts
    assert any(part.is_zeroed for part in parts)


def test_a_proof_tells_nothing_of_the_others(log):
    """No other pseudonym, no other user's count, and no row that occurs in two steps."""
    text = json.dumps(proof_of(log, "user-3"))
    proof = json.loads(text)
    rows = [base64.b64decode(leaf["rows"]) for step in proof["steps"] for leaf in step]
    raw = b"".join(rows)
    for user in (f"user-{u}" for u in range(NUM_USERS) if u != 3):
        name = pseudonym(KEY, user)
        assert name not in text
        assert bytes.fromhex(name) not in raw
        assert base64.b64encode(bytes.fromhex(name))[:20].decode() not in text
    pieces = [row[i : i + 32] for row in rows for i in range(0, len(row), 32)]
    assert len(set(pieces)) == len(pieces)
    assert KEY.reveal().hex() not in text


def test_rows_look_random_whatever_the_counts(log):
    proof = proof_of(log, "user-3")
    raw = b"".join(base64.b64decode(leaf["rows"]) for step in proof["steps"] for leaf in step)
    last_bytes = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 32)[:, -1]
    assert len(last_bytes) > 200
    # A count is one of 1, 2, 3: unmasked, the last byte would have three values.
    assert len(set(last_bytes.tolist())) > 100


def test_another_head_key_or_user_is_refused(log):
    proof, head = proof_of(log, "user-3"), verify(log).head
    with pytest.raises(ProofRejected, match="its records end in head"):
        check_proof(proof, "0" * 64)
    with pytest.raises(ProofRejected, match="not the one that the log was written with"):
        check_proof(proof, head, key=SecretKey.insecure(5, "pseudonym"))
    with pytest.raises(ProofRejected, match="about another user"):
        check_proof(proof, head, user="user-4")
    with pytest.raises(ProofRejected, match="its pseudonym is not that of"):
        check_proof({**proof, "user": "user-4"}, head, key=KEY)


def test_absence_of_somebody_present_cannot_be_proved(log):
    """Leaves of other steps, neighbours that are not, one neighbour alone, or none: nothing hides a part."""
    head = verify(log).head
    proof = proof_of(log, "user-3")
    present = check_proof(proof, head).parts[0].step
    honest = proof["steps"][present]
    others = [proof_of(log, f"user-{u}")["steps"][present] for u in range(NUM_USERS)]
    replacements = [[], *[other for other in others if other != honest], proof["steps"][present + 1]]
    replacements += [a + b for a in others[:12] for b in others[:12]]
    num_tried = 0
    for leaves in replacements:
        if any(leaf == own for leaf in leaves for own in honest):
            continue
        num_tried += 1
        forged = copy.deepcopy(proof)
        forged["steps"][present] = leaves
        with pytest.raises(ProofRejected):
            check_proof(forged, head)
    assert num_tried > 20


_PROOFS: dict[str, tuple[str, str]] = {}


@hypothesis.settings(max_examples=300)
@hypothesis.given(data=st.data())
def test_no_edit_of_a_proof_changes_what_it_shows(log, data):
    if "log" not in _PROOFS:
        _PROOFS["log"] = json.dumps(proof_of(log, "user-3")), verify(log).head
    text, head = _PROOFS["log"]
    shown = check_proof(json.loads(text), head)
    content = bytearray(text.encode())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(32, 126))
    try:
        found = check_proof(json.loads(content), head)
    except (ProofRejected, ValueError):
        return
    assert (found.parts, found.num_steps) == (shown.parts, shown.num_steps)


@pytest.mark.parametrize("drop", ["schema", "user", "pseudonym", "records", "steps"])
def test_what_is_no_proof_is_refused(log, drop):
    proof = proof_of(log, "user-3")
    del proof[drop]
    with pytest.raises(ProofRejected):
        check_proof(proof, verify(log).head)


def test_nothing_is_proven_from_a_log_that_is_not_intact(tmp_path):
    path = write_steps(tmp_path / "l.jsonl")
    rows = rows_path(path, 0)
    content = bytearray(rows.read_bytes())
    content[3] ^= 1
    rows.write_bytes(content)
    with pytest.raises(LedgerCorrupt):
        proof_of(path, "user-3")


def test_a_step_that_was_rewound_past_is_told_apart(tmp_path):
    path = tmp_path / "l.jsonl"
    with opened(path) as ledger:
        ledger.begin_session(generation=0, from_step=0, environment="e")
        for step in range(3):
            ledger.intend(0, step, [("a", 1)])
            ledger.commit(0, step, "s")
        ledger.begin_session(generation=1, from_step=1, environment="f")
        ledger.intend(1, 1, [("a", 2)])
    parts = check_proof(proof_of(path, "a"), verify(path).head).parts
    assert [(p.generation, p.step, p.is_in_model, p.is_committed) for p in parts] == [
        (0, 0, True, True),
        (0, 1, False, True),
        (0, 2, False, True),
        (1, 1, True, False),
    ]


# The tree, against the definitions of RFC 6962.


def rfc6962_root(leaves: list[bytes]) -> bytes:
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + rfc6962_root(leaves[:k]) + rfc6962_root(leaves[k:])).digest()


@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 32, 33, 48, 80, 111, 112, 113, 500])
def test_roots_and_paths_are_those_of_rfc_6962(num_rows):
    rng = np.random.default_rng(num_rows)
    rows = rng.bytes(32 * num_rows)
    buckets = [rows[i : i + 512] for i in range(0, len(rows), 512)]
    assert merkle.root_of(rows) == rfc6962_root(buckets).hex()
    assert merkle.num_buckets(num_rows) == len(buckets)
    leaves = merkle.leaf_hashes(rows)
    for index, leaf in enumerate(leaves):
        path = merkle.audit_path(leaves, index)
        assert merkle.root_from_path(leaf, index, len(leaves), path) == merkle.root_of(rows)
        for wrong in ([*path, leaf], path[:-1]):
            if wrong != path:
                with pytest.raises(ValueError, match="root"):
                    merkle.root_from_path(leaf, index, len(leaves), wrong)


def test_order_is_strict_also_where_the_first_eight_bytes_tie():
    a, b = bytes(8) + b"\x01" * 24, bytes(8) + b"\x02" * 24
    assert merkle.are_sorted(a + b)
    assert not merkle.are_sorted(b + a)
    assert not merkle.are_sorted(a + a[:28] + bytes(4)), "one user twice with different counts"
    assert merkle.are_sorted(b"")
