"""Coins cannot be changed after training began: the ledger and the published statement commit to them."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from attacks.analysis.analyse import ATTACKS_PATH, analyse_run
from attacks.cli import app
from attacks.coins.prepare import prepare
from attacks.errors import AttackInputError
from attacks.reporting.report import read_results
from attacks.scoring.documents import SPANS_PATH
from attacks.scoring.score import ScoreOptions, score_run
from attacks.scoring.shadows import write_recipes
from attacks.signals import SIGNALS_PATH
from privtrain.data.manifest import split_commitment
from privtrain.data.split import seal
from privtrain.errors import DamagedFile, GuaranteeLost, LedgerCorrupt, PrivtrainError, UnsafePath
from privtrain.files.atomic import write_json
from privtrain.job import train as job
from privtrain.job.train import train
from privtrain.ledger.log import verify_chain
from privtrain.ledger.view import verify_run
from privtrain.privacy.secret import SecretKey
from privtrain.registry.store import Registry
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import write_sealed
from tests.conftest import write_config

pytestmark = pytest.mark.usefixtures("no_self_test")


@pytest.fixture
def config(tree, tmp_path):
    """A configuration whose secrets come from the operating system, and its run."""
    del tree["privacy"]["insecure_seed"]
    tree["data"]["attack_min_records"] = 2
    tree["data"]["max_length"] = 64
    tree["canaries"] = {"num_users": 6}
    return write_config(tree, tmp_path / "c.yaml"), RunDirectory(tmp_path / "runs" / "tiny")


@pytest.fixture
def finished(config):
    prepare(config[0])
    train(config[0])
    return config[1]


def begin_and_crash(path, monkeypatch) -> None:
    """Training gets as far as its first step."""

    def crash(*_):
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(job, "_loop", crash)
        with pytest.raises(RuntimeError, match="is gone"):
            train(path)


def resealed(body):
    body = {name: value for name, value in body.items() if name != "sha256"}
    return {**body, "sha256": seal(body)}


def flip(run: RunDirectory) -> str:
    """Swap two users' sides in every sealed file, each with a seal that fits."""
    manifest = json.loads(run.manifest.read_text())
    canaries = {canary["user"] for canary in manifest["canaries"]}
    one, other = (next(u for u in manifest[side] if u not in canaries) for side in ("held_in", "held_out"))
    for side in ("held_in", "held_out"):
        manifest[side] = sorted({one: other, other: one}.get(user, user) for user in manifest[side])
    manifest = resealed(manifest)
    for path in (run.manifest, run.prepared):
        write_json(path, manifest)
    write_sealed(run, run.used, json.loads(run.used.read_text()) | {"manifest_sha256": manifest["sha256"]})
    return manifest["sha256"]


def test_printed_commitment_is_quoted_everywhere(config):
    path, run = config
    shown = CliRunner().invoke(app, ["prepare", str(path)])
    commitment = prepare(path).commitment
    assert f"coins committed to as {commitment}" in shown.output
    train(path)
    assert verify_chain(run.ledger).split == commitment
    assert json.loads(run.privacy.read_text())["split_commitment"] == commitment
    score_run(run.root, ScoreOptions(num_canary_references=5))
    assert analyse_run(run.root)["split_commitment"] == commitment
    assert "matches privacy.json" in verify_run(run.root)


def test_commitment_hides_the_split_without_key(finished):
    statement = json.loads(finished.privacy.read_text())
    sha256 = json.loads(finished.manifest.read_text())["sha256"]
    assert statement["split_commitment"] == split_commitment(finished.load_key("root"), sha256)
    assert statement["split_commitment"] != split_commitment(SecretKey.generate(), sha256)
    public = [p for p in finished.root.rglob("*") if p.is_file() and p.relative_to(finished.root).parts[0] != "secret"]
    assert not any(sha256.encode() in path.read_bytes() for path in public)


def test_deleted_split_is_not_flipped_anew(config):
    """A key alone, of which nobody knows who put it there, begins nothing; with its sealed coins it gives the same."""
    path, run = config
    done, sealed = prepare(path), run.prepared.read_bytes()
    assert prepare(path) == done
    run.prepared.unlink()
    for begin in (prepare, train):
        with pytest.raises(UnsafePath, match=r"holds root\.key"):
            begin(path)
    run.prepared.write_bytes(sealed)
    run.prepared.chmod(0o600)
    train(path)
    assert run.manifest.read_bytes() == sealed


def test_coins_cannot_be_prepared_anew_once_training_began(config, monkeypatch):
    path, run = config
    prepare(path)
    begin_and_crash(path, monkeypatch)
    run.prepared.unlink()
    with pytest.raises(AttackInputError, match="training has begun"):
        prepare(path)
    for file in (run.ledger, run.manifest, run.secret / "root.key", run.secret / "generation-0000.key"):
        file.unlink()
    prepare(path)  # nothing is left that prepare could know it by
    with pytest.raises(LedgerCorrupt, match="is missing but the run started"):
        train(path)


def test_seeded_split_is_refused_for_private_run(config):
    path, run = config
    prepare(path, ["privacy.insecure_seed=7"])
    with pytest.raises(GuaranteeLost, match="can be guessed"):
        prepare(path)
    with pytest.raises(GuaranteeLost, match="can be guessed"):
        train(path)
    assert not (run.root / "adapter").exists()


def test_guessable_key_never_lies_without_its_marker(config, monkeypatch):
    run = config[1]
    prepare(config[0], ["privacy.insecure_seed=7"])

    def crash(*_, **__):
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr("privtrain.run.directory.write_atomically", crash)
        with pytest.raises(OSError, match="is gone"):
            run.create_key("root")
    assert (run.secret / "root.insecure").exists()
    run.create_key("root")
    assert not (run.secret / "root.insecure").exists()


def test_failed_self_test_does_not_end_preparation(config, monkeypatch):
    path, _ = config
    done = prepare(path)

    def fail(*_):
        raise MemoryError("self-test")

    with monkeypatch.context() as patch:
        patch.setattr(job, "_self_test", fail)
        with pytest.raises(MemoryError):
            train(path)
    assert prepare(path) == done
    train(path)


def test_spans_are_for_plain_text_alone(tree, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"user": f"u{i // 4}", "prompt": f"what {i}", "text": f"this {i}"} for i in range(40)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    tree["data"]["source"]["paths"] = [str(rows)]
    tree["data"] |= {"format": "prompt_completion", "prompt_column": "prompt", "completion_column": "text"}
    with pytest.raises(AttackInputError, match="format: text"):
        prepare(write_config(tree, tmp_path / "chat.yaml"), spans_column="spans")


def test_a_wrong_split_is_refused_before_the_ledger_has_it(config, monkeypatch):
    path, run = config
    prepare(path)
    begin_and_crash(path, monkeypatch)
    manifest = json.loads(run.manifest.read_text())
    write_json(run.manifest, resealed(manifest | {"held_out": manifest["held_out"][1:]}))
    before = run.ledger.read_bytes()
    with pytest.raises(GuaranteeLost, match="was replaced"):
        train(path)
    assert run.ledger.read_bytes() == before


def test_other_coins_cannot_be_trained_on_once_training_began(config, monkeypatch):
    path, run = config
    prepare(path)
    begin_and_crash(path, monkeypatch)
    run.create_key("root")
    for file in (run.prepared, run.manifest, run.used):
        file.unlink()
    with pytest.raises(GuaranteeLost, match="records another train"):
        train(path)


def test_session_with_another_split_is_refused_by_ledger(config, monkeypatch):
    path, _ = config
    begin_and_crash(path, monkeypatch)
    monkeypatch.setattr("privtrain.job.session.check_coins", lambda *_: None)
    monkeypatch.setattr(job, "check_coins", lambda *_: None)
    monkeypatch.setattr("privtrain.job.session.split_commitment", lambda *_: "0" * 64)
    with pytest.raises(ValueError, match="other coins than the run began with"):
        train(path)


@pytest.mark.parametrize("command", [score_run, lambda run: write_recipes(run, 1)])
def test_coins_that_were_edited_after_training_are_refused(finished, command):
    flip(finished)
    with pytest.raises(AttackInputError, match=r"is not what .* commits to"):
        command(finished.root)


def test_a_replaced_root_key_is_refused(finished):
    finished.create_key("root")
    with pytest.raises(AttackInputError, match=r"is not what .* commits to"):
        score_run(finished.root)


def test_edited_statement_contradicts_the_ledger(finished):
    sha256 = flip(finished)
    statement = json.loads(finished.privacy.read_text())
    statement["split_commitment"] = split_commitment(finished.load_key("root"), sha256)
    for path in (finished.privacy, finished.adapter / "privacy.json"):
        write_json(path, statement)
    with pytest.raises(LedgerCorrupt, match="split_commitment"):
        verify_run(finished.root)
    del statement["split_commitment"]
    for path in (finished.privacy, finished.adapter / "privacy.json"):
        write_json(path, statement)
    with pytest.raises(LedgerCorrupt, match="split_commitment"):
        verify_run(finished.root)
    with pytest.raises(PrivtrainError, match=r"split_commitment|privacy\.json"):
        score_run(finished.root)


def test_analysis_refuses_sides_that_are_not_sealed(finished):
    score_run(finished.root, ScoreOptions(num_canary_references=5))
    analyse_run(finished.root)
    path = finished.root / SIGNALS_PATH
    shutil.copy(path, path.with_suffix(".kept"))
    table = pq.read_table(path)
    sides = table["side"].to_pylist()
    sides[0] = "held_out" if sides[0] == "held_in" else "held_in"
    place = table.schema.get_field_index("side")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(sides)), path)
    with pytest.raises(DamagedFile, match="not the file that was sealed"):
        analyse_run(finished.root)
    shutil.copy(path.with_suffix(".kept"), path)
    analyse_run(finished.root)
    flip(finished)
    with pytest.raises(AttackInputError, match=r"is not what .* commits to"):
        analyse_run(finished.root)


def test_a_report_of_results_on_other_coins_is_refused(finished):
    score_run(finished.root, ScoreOptions(num_canary_references=5))
    analyse_run(finished.root)
    path = finished.root / ATTACKS_PATH
    facts = json.loads(path.read_text()) | {"split_commitment": "0" * 64}
    write_json(path, facts)
    with pytest.raises(DamagedFile, match="it was altered"):
        read_results(finished.root)
    write_sealed(finished, path, facts)
    with pytest.raises(AttackInputError, match="computed on other coins"):
        read_results(finished.root)


@pytest.fixture
def registry(tree, tmp_path, monkeypatch) -> Registry:
    monkeypatch.delenv("PRIVTRAIN_REGISTRY_KEY", raising=False)
    monkeypatch.setenv("PRIVTRAIN_REGISTRY", str(tmp_path / "budgets" / "registry.db"))
    tree["registry"] = {"dataset": "people", "retry_seconds": 1}
    made = Registry(str(tmp_path / "budgets" / "registry.db"))
    made.set_budget("people", epsilon=20, delta=1e-6)
    return made


def users_of(manifest) -> set[str]:
    canaries = {canary["user"] for canary in manifest["canaries"]}
    return {*manifest["held_in"], *manifest["held_out"], *manifest["attacker"]} - canaries


@pytest.fixture
def charged(registry, config, tree, tmp_path):
    """The same configuration under a budget; registry before config, so that both change the tree."""
    return write_config(tree, tmp_path / "c.yaml"), config[1], registry


def test_earlier_opt_out_is_left_out_and_run_trains(charged):
    path, run, registry = charged
    registry.forget(registry.pseudonym("user-003"))
    done = prepare(path)
    assert (done.num_users, done.num_opted_out) == (23, 1)
    train(path)
    manifest = json.loads(run.manifest.read_text())
    assert manifest == json.loads(run.prepared.read_text())
    assert users_of(manifest) == {f"user-{i:03d}" for i in range(24)} - {"user-003"}
    score_run(run.root, ScoreOptions(num_canary_references=5))
    write_recipes(run.root, 1)
    shadow_data = (run.secret / "attack" / "shadows" / "records.jsonl").read_text()
    assert "user-003" not in shadow_data
    assert "user-004" in shadow_data


def test_opt_out_after_prepare_keeps_the_other_sides(charged):
    path, run, registry = charged
    before = prepare(path)
    sealed = json.loads(run.prepared.read_text())
    registry.forget(registry.pseudonym("user-003"))
    with pytest.raises(Exception, match="`attacks prepare` again leaves them out"):
        train(path)
    assert not run.manifest.exists()
    after = prepare(path)
    assert (before.num_users, after.num_users) == (24, 23)
    assert after.commitment != before.commitment
    anew = json.loads(run.prepared.read_text())
    for side in ("held_in", "held_out"):
        assert anew[side] == [user for user in sealed[side] if user != "user-003"]
    assert anew["attacker"] == {u: taken for u, taken in sealed["attacker"].items() if u != "user-003"}
    assert anew["canaries"] == sealed["canaries"]
    train(path)
    registry.forget(registry.pseudonym("user-004"))
    score_run(run.root, ScoreOptions(num_canary_references=5))  # who opts out later was trained on, and is measured


def test_an_opt_out_excuses_nobody_elses_absence(charged):
    path, run, registry = charged
    prepare(path)
    registry.forget(registry.pseudonym("user-003"))
    manifest = json.loads(run.prepared.read_text())
    side = next(side for side in ("held_in", "held_out") if "user-004" in manifest[side])
    manifest[side].remove("user-004")
    write_json(run.prepared, resealed(manifest))
    with pytest.raises(Exception, match="was sealed with other"):
        prepare(path)


def test_sealed_spans_follow_the_coins_when_somebody_opts_out(charged, tree, tmp_path):
    _, run, registry = charged
    rows = [{"user": f"u{n % 8}", "text": f"name {n}", "spans": [[0, 4]]} for n in range(48)]
    source = tmp_path / "labelled.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"]["source"]["paths"] = [str(source)]
    path = write_config(tree, tmp_path / "labelled.yaml")
    assert prepare(path, spans_column="spans").num_labelled == 48
    registry.forget(registry.pseudonym("u3"))
    with pytest.raises(AttackInputError, match="prepare again with --spans"):
        prepare(path)
    assert prepare(path, spans_column="spans").num_labelled == 42
    manifest, sealed = json.loads(run.prepared.read_text()), json.loads((run.root / SPANS_PATH).read_text())
    assert sealed["manifest_sha256"] == manifest["sha256"]
    assert "u3" not in sealed["spans"]
