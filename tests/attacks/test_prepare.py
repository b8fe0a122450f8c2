"""`attacks prepare`: coins are sealed before training, training honours them and writes back what it used."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from attacks.cli import app
from attacks.coins.prepare import prepare
from attacks.errors import AttackInputError
from attacks.scoring.documents import SPANS_PATH, attack_pseudonym, read_manifest, read_used
from attacks.scoring.score import ScoreOptions, score_run
from attacks.signals import CANARY, CANARY_REFERENCE, FRESH, HELD_IN, SIGNALS_PATH
from privtrain.config.model import ModelSection
from privtrain.data.canaries import canaries_of
from privtrain.data.manifest import read_sealed
from privtrain.data.split import seal
from privtrain.errors import DamagedFile, PlanMismatch
from privtrain.job.train import train
from privtrain.models.load import load_tokenizer
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import read_sealed_file
from tests import jobs
from tests.attacks.signal_files import read_signals
from tests.conftest import write_config

pytestmark = pytest.mark.usefixtures("no_self_test")


@pytest.fixture
def planted(tree, tmp_path):
    """A configuration with eight canary users, and its run."""
    tree["data"]["max_length"] = 64
    tree["canaries"] = {"num_users": 8, "repetitions": [1, 4], "num_digits": 6}
    return write_config(tree, tmp_path / "c.yaml"), RunDirectory(tmp_path / "runs" / "tiny")


def test_training_honours_the_sealed_coins_and_says_what_it_used(planted):
    path, run = planted
    done = prepare(path)
    assert run.secret.stat().st_mode & 0o777 == 0o700
    assert run.prepared.stat().st_mode & 0o777 == 0o600
    assert (done.num_users, done.num_canaries) == (24, 8)
    key = (run.secret / "root.key").read_bytes()
    assert prepare(path) == done, "the same command again changes nothing"
    train(path)
    assert (run.secret / "root.key").read_bytes() == key
    assert run.manifest.read_bytes() == run.prepared.read_bytes()
    manifest, used = read_manifest(run), read_used(run)
    held_in = {canary.user: canary for canary in canaries_of(manifest) if canary.user in manifest["held_in"]}
    assert 0 < len(held_in) < 8
    assert used["num_units"] == len(manifest["held_in"])
    assert used["left_out"] == {}
    for canary in canaries_of(manifest):
        facts = used["canaries"][canary.user]
        expected = canary.repetitions if canary.user in held_in else 0
        assert facts["num_records"] == facts["num_with_secret"] == expected
        assert (facts["num_drawn"] == 0) or canary.user in held_in
    assert sum(facts["num_drawn"] for facts in used["canaries"].values()) > 0
    with pytest.raises(AttackInputError, match="training has begun"):
        prepare(path)


def tampered(run: RunDirectory, *, reseal: bool) -> None:
    body = json.loads(run.prepared.read_text())
    user = body["held_in"].pop(0)
    body["held_out"].append(user)
    if reseal:
        del body["sha256"]
        body["sha256"] = seal(body)
    run.prepared.write_text(json.dumps(body))


@pytest.mark.parametrize("reseal", [False, True])
def test_altered_coins_are_refused_before_anything_is_trained(planted, reseal):
    path, run = planted
    prepare(path)
    tampered(run, reseal=reseal)
    with pytest.raises(PlanMismatch, match="was sealed with other held_in, held_out" if reseal else "its seal"):
        train(path)
    assert not run.manifest.exists()
    assert not list(run.checkpoints.iterdir())


@pytest.mark.parametrize("override", ["data.attack_fraction=0.4", "canaries.num_users=9", "canaries.num_digits=5"])
def test_other_rules_than_the_sealed_ones_are_refused(planted, override):
    path, _ = planted
    prepare(path)
    for command in (prepare, train):
        with pytest.raises(PlanMismatch, match="was sealed with other"):
            command(path, [override])


def test_a_replaced_key_is_refused(planted):
    path, run = planted
    prepare(path)
    (run.secret / "root.key").write_text("ab" * 32 + "\n")
    with pytest.raises(PlanMismatch, match="was sealed with other"):
        train(path)


def test_the_privacy_statement_binds_the_manifest(planted):
    path, run = planted
    train(path)
    body = json.loads(run.manifest.read_text())
    body["held_in"], body["held_out"] = body["held_out"], body["held_in"]
    del body["sha256"]
    run.manifest.write_text(json.dumps({**body, "sha256": seal(body)}))
    with pytest.raises(AttackInputError, match=r"is not what .*privacy.json commits to"):
        score_run(run.root, ScoreOptions())


def test_without_prepare_training_flips_the_same_kind_of_coins(planted):
    path, run = planted
    train(path)
    assert not run.prepared.exists()
    assert len(canaries_of(read_manifest(run))) == 8


def test_spans_are_sealed_with_the_coins(planted, tree, tmp_path):
    rows = [{"user": f"u{n % 6}", "text": f"  name {n}", "spans": [[2, 6]]} for n in range(60)]
    source = tmp_path / "labelled.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"]["source"]["paths"] = [str(source)]
    path, run = write_config(tree, tmp_path / "labelled.yaml"), planted[1]
    shown = CliRunner().invoke(app, ["prepare", str(path), "--spans", "spans"])
    assert shown.exit_code == 0, shown.output
    assert "60 records with labelled spans" in shown.output
    sealed = read_sealed_file(run, run.root / SPANS_PATH)
    assert sealed["manifest_sha256"] == read_sealed(run.prepared)["sha256"]
    assert sealed["spans"]["u0"]["3"] == [[0, 4]]
    secrets = [canary.secret for canary in canaries_of(read_sealed(run.prepared))]
    assert not any(secret in shown.output for secret in secrets)
    train(path)
    score_run(run.root, ScoreOptions(num_canary_references=0))
    for row in read_signals(run.root / SIGNALS_PATH):
        # One token a byte: the four letters of "name".
        if row.kind == FRESH:
            assert np.flatnonzero(row.sensitive).tolist() == [0, 1, 2, 3]
    (run.root / SPANS_PATH).write_text((run.root / SPANS_PATH).read_text().replace("[", "[[1, 2], ", 1))
    (run.root / SIGNALS_PATH).unlink()
    with pytest.raises(DamagedFile, match="it was altered"):
        score_run(run.root)


def test_canaries_and_their_references_are_scored_apart(planted, tiny_llama):
    path, run = planted
    train(path)
    score_run(run.root, ScoreOptions(num_canary_references=5, batch_tokens=4096))
    manifest, key = read_manifest(run), run.load_key("pseudonym")
    canaries = {attack_pseudonym(key, canary.user): canary for canary in canaries_of(manifest)}
    rows = read_signals(run.root / SIGNALS_PATH)
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    scored = {row.user: row for row in rows if row.kind == CANARY}
    assert set(scored) == set(canaries)
    for name, row in scored.items():
        assert tokenizer.decode(row.token_ids[:-1]) == canaries[name].records[0]
        assert (row.side == HELD_IN) == (canaries[name].user in manifest["held_in"])
        others = [other for other in rows if other.user == name and other.kind == CANARY_REFERENCE]
        assert len(others) == 5
        assert {other.num_bytes for other in others} == {row.num_bytes}
    assert not {row.user for row in rows if row.kind == FRESH} & set(canaries)


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_honour_the_same_coins_and_canaries(planted):
    path, run = planted
    prepare(path)
    done = jobs.run("privtrain", "train", path)
    assert done.returncode == 0, done.output[-3000:]
    assert run.manifest.read_bytes() == run.prepared.read_bytes()
    options = ScoreOptions(num_canary_references=5)
    score_run(run.root, options)
    alone = (run.root / SIGNALS_PATH).read_bytes()
    (run.root / SIGNALS_PATH).unlink()
    done = jobs.run("attacks", "score", run.root, "--canary-references", "5")
    assert done.returncode == 0, done.output[-3000:]
    assert (run.root / SIGNALS_PATH).read_bytes() == alone


def test_no_public_file_knows_a_canary(planted):
    path, run = planted
    prepare(path)
    train(path)
    canaries = canaries_of(read_manifest(run))
    public = [
        p
        for p in run.root.rglob("*")
        if p.is_file() and p.relative_to(run.root).parts[0] not in ("secret", "checkpoints")
    ]
    assert len(public) >= 4
    for file in public:
        content = file.read_bytes().decode("latin-1")
        assert not any(needle in content for c in canaries for needle in (c.user, c.secret, c.prefix))
