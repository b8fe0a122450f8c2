"""What the ledger commands show, against plain counting."""

from __future__ import annotations

import collections
import json
import os
import pathlib

import duckdb
import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from privtrain.cli import app
from privtrain.errors import GuaranteeLost, LedgerCorrupt, PrivtrainError, ProofRejected
from privtrain.files.atomic import write_atomically, write_json
from privtrain.ledger.bodies import segment_path
from privtrain.ledger.log import verify
from privtrain.ledger.query import opened_contributions
from privtrain.ledger.shred import shred
from privtrain.ledger.view import print_ledger, print_user, prove_run, verify_run
from privtrain.privacy.secret import pseudonym
from privtrain.run.directory import RunDirectory
from tests.privtrain.ledgers import KEY, contents, units_of, write_steps

NUM_STEPS, NUM_USERS = 30, 20


@pytest.fixture(params=[25, 1 << 18], ids=["sealed", "open"])
def run(request, tmp_path):
    """A run directory that holds a ledger and its key, sealed in part or not at all."""
    directory = RunDirectory(tmp_path / "runs" / "r")
    directory.create()
    write_atomically(directory.secret / "pseudonym.key", KEY.reveal().hex(), mode=0o600)
    write_steps(directory.ledger, NUM_STEPS, segment_rows=request.param, num_users=NUM_USERS)
    return directory


def totals() -> tuple[collections.Counter, collections.Counter]:
    records, steps = collections.Counter(), collections.Counter()
    for step in range(NUM_STEPS):
        for name, count in units_of(step, NUM_USERS):
            records[pseudonym(KEY, name)] += count
            steps[pseudonym(KEY, name)] += 1
    return records, steps


def invoke(*arguments) -> str:
    done = CliRunner().invoke(app, ["ledger", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_top_lists_the_heaviest_contributors(run):
    records, steps = totals()
    expected = sorted(records, key=lambda p: (-records[p], -steps[p], p))[:5]
    rows = json.loads(invoke("top", run.root, "-n", 5, "--json"))["rows"]
    assert [(r["pseudonym"], r["records"], r["steps"]) for r in rows] == [(p, records[p], steps[p]) for p in expected]
    assert expected[0] in invoke("top", run.root)


def test_user_shows_every_step_of_one_user_by_name_or_pseudonym(run):
    expected = [(s, n) for s in range(NUM_STEPS) for name, n in units_of(s, NUM_USERS) if name == "user-4"]
    by_name = json.loads(invoke("user", run.root, "user-4", "--json"))
    assert by_name == json.loads(invoke("user", run.root, "--pseudonym", pseudonym(KEY, "user-4"), "--json"))
    assert [(row["step"], row["records"]) for row in by_name["rows"]] == expected
    assert by_name["num_records"] == sum(n for _, n in expected)
    assert all(row["committed"] and row["in_model"] for row in by_name["rows"])
    zeroed = [row["step"] for row in by_name["rows"] if row["zeroed"]]
    assert zeroed == [s for s, _ in expected if s % 3 == 1 and units_of(s, NUM_USERS)[0][0] == "user-4"]
    assert json.loads(invoke("user", run.root, "nobody", "--json"))["num_steps"] == 0
    for wrong in ([], ["user-4", "--pseudonym", "0" * 32], ["--pseudonym", "xyz"]):
        with pytest.raises(PrivtrainError, match="pseudonym"):
            invoke("user", run.root, *wrong)


def test_stats_are_those_of_the_contributions(run):
    records, steps = totals()
    values = np.array(sorted(records.values()), dtype=float)
    found = json.loads(invoke("stats", run.root, "--cap", 30, "--json"))
    all_counts = [n for s in range(NUM_STEPS) for _, n in units_of(s, NUM_USERS)]
    assert found["num_users"] == len(records)
    assert found["num_records"] == sum(all_counts) == values.sum()
    assert found["num_contributions"] == len(all_counts) == sum(steps.values())
    differences = np.abs(values[:, None] - values[None]).sum() / (2 * len(values) ** 2 * values.mean())
    assert found["gini"] == pytest.approx(differences, abs=1e-12)
    assert found["share_at_k"] == pytest.approx(np.mean(np.array(all_counts) == 3))
    assert found["share_above_k"] == 0
    assert found["share_of_users_above_cap"] == pytest.approx(np.mean(values > 30))
    assert found["share_of_records_above_cap"] == pytest.approx(np.maximum(values - 30, 0).sum() / values.sum())
    assert found["records_per_user"]["min"] == values.min()
    assert found["records_per_user"]["max"] == values.max()
    assert found["records_per_user"]["median"] == np.quantile(values, 0.5, method="inverted_cdf")
    assert found["num_zeroed"] == sum(map(len, verify(run.ledger).zeroed.values()))
    assert "Gini" in invoke("stats", run.root)


def test_an_empty_log_has_statistics(tmp_path):
    path = write_steps(tmp_path / "l.jsonl", 1)  # a step of nobody
    with opened_contributions(path) as contributions:
        found = contributions.statistics(3)
        assert (found.num_steps, found.num_users, found.gini, found.records_per_user) == (1, 0, 0.0, {})
        assert contributions.top(3) == []


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_export_holds_every_contribution_for_its_owner_alone(run, tmp_path, kind):
    target = tmp_path / f"it's.{kind}"
    assert "as private as the ledger" in invoke("export", run.root, target, f"--{kind}")
    assert target.stat().st_mode & 0o777 == 0o600
    table = pyarrow.parquet.read_table(target) if kind == "parquet" else pyarrow.csv.read_csv(target)
    rows = table.to_pylist()
    found = {(0, step): {} for step in range(NUM_STEPS)}
    for row in rows:
        found[row["generation"], row["step"]][row["pseudonym"]] = row["records"]
    assert found == contents(run.ledger)
    assert sum(row["zeroed"] for row in rows) == sum(map(len, verify(run.ledger).zeroed.values()))
    for public in (run.root / f"x.{kind}", run.adapter / "x"):
        with pytest.raises(PrivtrainError, match="may be published"):
            invoke("export", run.root, public, f"--{kind}")
    with pytest.raises(PrivtrainError, match="--parquet or --csv"):
        invoke("export", run.root, target)


@pytest.mark.parametrize("command", ["export", "prove"])
def test_private_output_never_overwrites_or_lands_in_public(run, tmp_path, command):
    """A file that others opened while it was open to them stays so; a file of the run's own would be lost."""

    def write(target):
        options = ["--user", "user-4", "-o", target] if command == "prove" else [target, "--csv"]
        return invoke(command, run.root, *options)

    other = RunDirectory(tmp_path / "runs" / "other")
    other.create()
    write_steps(other.ledger, 2)
    (tmp_path / "link").symlink_to(run.root)
    for directory in (run.root, other.root, tmp_path / "link", run.checkpoints):
        with pytest.raises(PrivtrainError, match="may be published"):
            write(directory / "x")
        assert not (directory / "x").exists()
    wide = tmp_path / "wide"
    wide.write_text("mine")
    wide.chmod(0o644)
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    key = run.secret / "pseudonym.key"
    before = key.read_bytes()
    for target in (wide, key, tmp_path / "dangling"):
        with pytest.raises(PrivtrainError, match="is there already"):
            write(target)
    with pytest.raises(PrivtrainError, match="is not a directory"):
        write(tmp_path / "none" / "x")
    assert (wide.read_text(), key.read_bytes()) == ("mine", before)
    assert not (tmp_path / "elsewhere").exists()
    for target in (run.secret / "x", tmp_path / "x"):
        write(target)
        assert target.stat().st_mode & 0o777 == 0o600


def test_export_is_private_from_first_byte_and_gone_on_failure(run, tmp_path, monkeypatch):
    seen, chmod = [], os.chmod
    monkeypatch.setattr(os, "chmod", lambda path, mode: seen.append(path) or chmod(path, mode))
    target = tmp_path / "x.csv"
    umask = os.umask(0)
    try:
        invoke("export", run.root, target, "--csv")
    finally:
        os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o600
    assert not seen, "closed by a chmod at the end"
    with opened_contributions(run.ledger) as contributions:
        contributions._connection.close()
        with pytest.raises(duckdb.Error):
            contributions.export(tmp_path / "y.csv", "csv")
    assert not (tmp_path / "y.csv").exists()


def test_show_counts_each_step_and_names_nobody(run):
    shown = json.loads(invoke("show", run.root, "--json"))
    steps = [row for row in shown["records"] if row["kind"] == "intent"]
    for step, row in enumerate(steps):
        units = units_of(step, NUM_USERS)
        assert row["num_units"] == len(units)
        assert row["num_records"] == sum(n for _, n in units)
        assert row["max_records"] == max((n for _, n in units), default=0)
    assert shown["head"] == verify(run.ledger).head
    text = invoke("show", run.root, "--last", 3)
    assert "the last 3 of" in text
    assert "user-" not in text


def test_a_query_leaves_the_log_as_it_was(run):
    before = sorted((file, file.read_bytes()) for file in run.secret.rglob("*") if file.is_file())
    invoke("stats", run.root)
    print_ledger(run.root)
    assert sorted((file, file.read_bytes()) for file in run.secret.rglob("*") if file.is_file()) == before
    assert not list(run.secret.rglob(".query-*"))


def test_a_query_refuses_a_log_that_lost_a_segment(tmp_path):
    path = write_steps(tmp_path / "l.jsonl", NUM_STEPS, segment_rows=25)
    segment_path(path, 1).unlink()
    with pytest.raises(LedgerCorrupt, match="missing"), opened_contributions(path):
        pass


def test_a_proof_goes_through_the_command_line(run, tmp_path):
    proof, head = tmp_path / "proof.json", verify(run.ledger).head
    assert "steps; head" in invoke("prove", run.root, "--user", "user-4", "-o", proof)
    assert proof.stat().st_mode & 0o777 == 0o600
    key = run.secret / "pseudonym.key"
    found = json.loads(invoke("check-proof", proof, "--head", head, "--key", key, "--user", "user-4", "--json"))
    assert found["num_steps"] == len(json.loads(invoke("user", run.root, "user-4", "--json"))["rows"])
    assert found["link"] == "recomputed from the key"
    with pytest.raises(ProofRejected):
        invoke("check-proof", proof, "--head", "0" * 64)
    proof.write_text("[")
    with pytest.raises(ProofRejected, match="cannot be read"):
        invoke("check-proof", proof, "--head", head)


def test_shredded_ledger_verifies_and_finds_nobody(run):
    stats, top = invoke("stats", run.root), invoke("top", run.root)
    state = verify(run.ledger)
    write_atomically(run.secret / "generation-0000.key", KEY.reveal().hex(), mode=0o600)
    write_json(run.manifest, {"held_in": ["user-0"]}, mode=0o600)
    with pytest.raises(PrivtrainError, match="--yes"):
        invoke("shred", run.root)
    with pytest.raises(PrivtrainError, match="has not finished"):
        invoke("shred", run.root, "--yes")
    assert (run.secret / "pseudonym.key").exists()
    said = invoke("shred", run.root, "--yes", "--abandon")
    assert "destroyed: pseudonym.key, generation-0000.key" in said
    assert "manifest.json (names every user" in said
    keys = [KEY.reveal().hex().encode(), KEY.reveal()]
    for file in (f for f in run.root.rglob("*") if f.is_file()):
        assert not any(key in file.read_bytes() for key in keys), file
    assert (invoke("stats", run.root), invoke("top", run.root)) == (stats, top)
    assert verify(run.ledger) == state
    assert "ledger verified" in verify_run(run.root)
    with pytest.raises(PrivtrainError, match="was shredded"):
        print_user(run.root, "user-4", None, as_json=True)
    with pytest.raises(PrivtrainError, match="was shredded"):
        prove_run(run.root, "user-4", None, run.secret / "proof.json")
    with pytest.raises(GuaranteeLost):
        run.load_key("pseudonym")
    assert shred(run.root, abandon=True)[0] == []


def test_shredding_destroys_attack_files_and_names_links(run, tmp_path):
    """They hold tokens, texts and results by user: with the data set at hand, whose they are can be told."""
    attack = run.secret / "attack"
    kept = tmp_path / "data.jsonl"
    kept.write_text("the data set")
    files = [
        "signals.parquet",
        "per_user.parquet",
        "references/shadow-a.parquet",
        "parts-signals-12/part-000000.parquet",
    ]
    files += ["shadows/records.jsonl", "shadows/runs/a/secret/pseudonym.key", "shadows/runs/a/adapter/a.safetensors"]
    for name in files:
        (attack / name).parent.mkdir(parents=True, exist_ok=True)
        (attack / name).write_bytes(b"what user-4 wrote")
    (attack / "shadows" / "link").symlink_to(kept)
    invoke("prove", run.root, "--user", "user-4", "-o", run.secret / "user-4.json")
    with pytest.raises(PrivtrainError, match="attack job"):
        invoke("shred", run.root)
    assert (attack / "shadows" / "records.jsonl").exists()
    said = invoke("shred", run.root, "--yes", "--abandon")
    for name in ("signals.parquet", "per_user.parquet", "references", "parts-signals-12", "shadows"):
        assert f"attack/{name}" in said.splitlines()[0]
    assert not attack.exists()
    assert kept.read_text() == "the data set"
    assert "LINKING: " in next(line for line in said.splitlines() if "user-4.json" in line)
    named = [file for file in run.root.rglob("*") if file.is_file() and b"user-4" in file.read_bytes()]
    assert named == [run.secret / "user-4.json"]


def test_shredding_goes_on_where_it_was_stopped(run, monkeypatch):
    (run.secret / "attack").mkdir()
    (run.secret / "attack" / "signals.parquet").write_bytes(b"tokens")
    unlink = pathlib.Path.unlink
    monkeypatch.setattr(pathlib.Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shred(run.root, abandon=True)
    monkeypatch.setattr(pathlib.Path, "unlink", unlink)
    assert shred(run.root, abandon=True)[0] == ["pseudonym.key", "attack/signals.parquet"]
    with pytest.raises(PrivtrainError, match="was shredded"):
        print_user(run.root, "user-4", None, as_json=True)


def test_commands_without_a_ledger_say_so(tmp_path):
    for command in (["show"], ["verify"], ["top"], ["user", "u"], ["stats"], ["shred", "--yes"]):
        with pytest.raises(PrivtrainError, match="has no ledger"):
            invoke(command[0], tmp_path, *command[1:])
