"""Forgeries by somebody who can recompute every hash: no log but the published one carries the published head."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable

import pytest

from privtrain.errors import LedgerCorrupt, ProofRejected
from privtrain.ledger import bodies as ledger_bodies
from privtrain.ledger import merkle
from privtrain.ledger.bodies import ROW, rows_path
from privtrain.ledger.chain import lines_of, read_records
from privtrain.ledger.log import verify
from privtrain.ledger.proof import check_proof, prove, read_proof
from privtrain.privacy.secret import pseudonym
from tests.privtrain.ledgers import KEY, _write_head, forge, opened, write_steps


def sealed(body: str) -> bytes:
    """A line whose first hash is that of its body, whatever the body says."""
    return b'{"hash":"' + hashlib.sha256(body.encode()).hexdigest().encode() + b'",' + body[1:].encode() + b"\n"


def body_of(line: bytes) -> str:
    return "{" + line.decode()[75:-1]


def replace_last(path: pathlib.Path, line: bytes, head: str) -> None:
    """Put another last record there, with a head file that agrees."""
    lines = [old for _, old in lines_of(path)]
    path.write_bytes(b"".join([*lines[:-1], line]))
    _write_head(path, len(lines), head, json.loads(lines[-2])["hash"])


def second_hash(body: str, head: str) -> str:
    return f'{body[:-1]},"hash":"{head}"}}'


DISGUISES: dict[str, Callable[[str, str], str]] = {
    "a second hash": second_hash,
    "a second hash in front": lambda body, head: f'{{"hash":"{head}",{body[1:]}',
    "an escaped second hash": lambda body, head: f'{body[:-1]},"\\u0068ash":"{head}"}}',
}


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_another_log_cannot_carry_the_published_head(tmp_path, disguise):
    """A body with a hash of its own: the first hash vouches for the line, the second must not become the head."""
    published = verify(write_steps(tmp_path / "honest.jsonl", 8, released=True)).head
    path = write_steps(tmp_path / "l.jsonl", 6, num_users=7, released=True)
    last = [line for _, line in lines_of(path)][-1]
    forged = sealed(disguise(body_of(last), published))
    replace_last(path, forged, published)
    with pytest.raises(LedgerCorrupt, match="twice"):
        verify(path)
    with pytest.raises(LedgerCorrupt, match="twice"):
        list(read_records(path))
    with pytest.raises(LedgerCorrupt, match="twice"), opened(path):
        pass
    honest = prove(write_steps(tmp_path / "m.jsonl", 6, num_users=7, released=True), pseudonym(KEY, "user-1"))
    assert honest["head"] != published
    honest["records"][-1] = forged.decode().rstrip("\n")
    with pytest.raises(ProofRejected):
        check_proof(honest, published)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda body: body.replace('"kind":', '"kind":"begin","kind":'), "twice"),
        (lambda body: body.replace('"delta":', '"delta":0.5,"delta":'), "twice"),
        (lambda body: body[:-1] + ',"more":{"a":1,"a":2}}', "twice"),
        (lambda body: body.replace(",", ", "), "form"),
        (lambda body: body.replace("release", "rele\\u0061se"), "form"),
        (lambda body: body.replace('"epsilon":1.0', '"epsilon":1.00'), "form"),
        (lambda body: body.replace('"epsilon":1.0', '"epsilon":NaN'), "NaN"),
        (lambda body: body.replace('"epsilon":1.0', '"epsilon":1e999'), "beyond the range of a double"),
        (lambda body: body[:-1] + ',"more":"\u00e9"}', "form"),
        (lambda body: body[:-1] + ',"more":' + "[" * 100_000 + "}", "nested"),
        (lambda body: '{"kind":"release",' + body[1:].replace('"kind":"release",', ""), "form"),
        (lambda body: body.replace('"num_charged":6', '"num_charged":6.0'), "a count is negative or not an integer"),
    ],
)
def test_a_line_that_could_be_read_in_two_ways_is_refused(tmp_path, edit, message):
    path = write_steps(tmp_path / "l.jsonl", 6, released=True)
    body = body_of([line for _, line in lines_of(path)][-1])
    assert edit(body) != body
    line = sealed(edit(body))
    replace_last(path, line, line[9:73].decode())
    with pytest.raises(LedgerCorrupt, match=message):
        verify(path)


def test_a_proof_file_that_says_a_thing_twice_is_refused(tmp_path):
    path = write_steps(tmp_path / "l.jsonl", 6)
    proof = prove(path, pseudonym(KEY, "user-1"), "user-1")
    target = tmp_path / "p.json"
    text = json.dumps(proof)
    target.write_text(text)
    assert check_proof(read_proof(target), proof["head"]).user == "user-1"
    for twice in (text.replace('"user":', '"user": "user-2", "user":'), text.replace('"leaf":', '"leaf": 0, "leaf":')):
        assert twice != text
        target.write_text(twice)
        with pytest.raises(ProofRejected, match="twice"):
            read_proof(target)
    target.write_text("[" * 100_000)
    with pytest.raises(ProofRejected, match="cannot be read"):
        read_proof(target)


@pytest.mark.parametrize("count", [0, 4, 2**31])
def test_a_proof_of_a_count_that_the_plan_forbids_is_refused(tmp_path, monkeypatch, count):
    """The tree of a step may hold a row of no record or of more than k; `verify` refuses it, and so must a proof."""
    path = write_steps(tmp_path / "l.jsonl", 0)
    name = pseudonym(KEY, "a")
    rows = np_row(name, count)
    rows_path(path, 0).write_bytes(rows.tobytes())
    root = merkle.root_of(merkle.rows_of(merkle.step_context(0, 0), bytes.fromhex(name), rows["records"]))
    forge(path, [("intent", {"generation": 0, "step": 0, "num_units": 1, "root": root})])
    with pytest.raises(LedgerCorrupt, match="a unit"):
        verify(path)
    monkeypatch.setattr(ledger_bodies, "_problem", lambda *_: None)
    proof = prove(path, name)
    with pytest.raises(ProofRejected, match="records"):
        check_proof(proof, proof["head"])


def np_row(name: str, count: int):
    import numpy as np

    rows = np.zeros(1, dtype=ROW)
    rows["unit"], rows["records"] = np.frombuffer(bytes.fromhex(name), dtype=ROW["unit"]), count
    return rows


def test_a_proof_of_a_pseudonym_in_another_spelling_is_refused(tmp_path):
    proof = prove(write_steps(tmp_path / "l.jsonl", 6), pseudonym(KEY, "user-1"))
    with pytest.raises(ProofRejected, match="pseudonym"):
        check_proof({**proof, "pseudonym": " " + proof["pseudonym"]}, proof["head"])
