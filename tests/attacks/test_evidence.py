"""The attack job knows its target: changed models, removed users, flipped bytes, edited results, swapped runs."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from attacks import evidence, signals
from attacks.analysis import analyse
from attacks.analysis.analyse import ATTACKS_PATH, PER_USER_PATH, analyse_run
from attacks.coins import check as coins
from attacks.errors import AttackInputError
from attacks.reporting import record, report, tracking, verify
from attacks.reporting.policy import Policy
from attacks.scoring import documents, planned, score
from attacks.scoring import target as targets
from attacks.scoring.score import ScoreOptions, score_run
from attacks.signals import HELD_IN, HELD_OUT, SIGNALS_PATH, DocumentSignals
from privtrain.config import public_tree, to_yaml
from privtrain.errors import EXIT_WRONG_INPUT, DamagedFile, PrivtrainError
from privtrain.files.atomic import write_json
from privtrain.job.train import train
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import read_sealed_file, write_sealed
from tests.attacks.signal_files import read_signals
from tests.conftest import tiny_tree, write_config

pytestmark = pytest.mark.usefixtures("no_self_test")

OPTIONS = ScoreOptions(num_canary_references=5)


@pytest.fixture(scope="module")
def made(tiny_llama, users_file, tmp_path_factory) -> pathlib.Path:
    """A trained, scored, analysed and reported run with canaries; secrets from the operating system."""
    directory = tmp_path_factory.mktemp("evidence")
    tree = tiny_tree(tiny_llama, users_file, directory / "runs")
    del tree["privacy"]["insecure_seed"]
    # Coins are fair: with fewer users held out, one of the edits would leave too few for an analysis.
    tree["data"] |= {"attack_min_records": 2, "max_length": 48, "held_out_fraction": 0.5}
    tree["canaries"] = {"num_users": 4}
    train(write_config(tree, directory / "c.yaml"))
    run = directory / "runs" / "tiny"
    score_run(run, OPTIONS)
    analyse_run(run)
    report.write_report(run)
    return run


@pytest.fixture
def run(made, tmp_path) -> pathlib.Path:
    """A copy of it to be spoiled."""
    return shutil.copytree(made, tmp_path / "tiny")


def refused(action: Callable[[], object], name: str) -> str:
    """That an action is refused in one line that names the file."""
    with pytest.raises(PrivtrainError) as caught:
        action()
    assert caught.value.exit_code != 0
    message = str(caught.value)
    assert "\n" not in message.strip()
    assert name in message
    assert "user-0" not in message
    return message


def zero_adapter(run: pathlib.Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({name: np.zeros_like(value) for name, value in tensors.items()}, path)


def rewrite(run: pathlib.Path, change: Callable[[list[DocumentSignals]], list[DocumentSignals]]) -> None:
    signals.write_signals(run / SIGNALS_PATH, change(read_signals(run / SIGNALS_PATH)))


def reseal(run: pathlib.Path) -> None:
    """What a scorer that skips the comparison with the plan would seal."""
    directory = RunDirectory(run)
    facts = {**json.loads((run / SIGNALS_PATH).with_suffix(".json").read_text())}
    keys = [planned.DocumentKey(r.user, r.document, r.kind, r.side) for r in read_signals(run / SIGNALS_PATH)]
    record.write_scoring(directory, run / SIGNALS_PATH, {**facts, "documents": planned.facts_of(keys)})


def without_some_users(side: str, count: int):
    def change(rows: list[DocumentSignals]) -> list[DocumentSignals]:
        gone = sorted({row.user for row in rows if row.side == side})[:count]
        return [row for row in rows if row.user not in gone]

    return change


def moved(rows: list[DocumentSignals]) -> list[DocumentSignals]:
    user = next(row.user for row in rows if row.side == HELD_OUT and row.kind == signals.FRESH)
    return [dataclasses.replace(row, side=HELD_IN) if row.user == user else row for row in rows]


def target_is_base(rows: list[DocumentSignals]) -> list[DocumentSignals]:
    return [dataclasses.replace(row, target_logp=row.base_logp) for row in rows]


def without_one_of(kind: str):
    def change(rows: list[DocumentSignals]) -> list[DocumentSignals]:
        place = next(number for number, row in enumerate(rows) if row.kind == kind)
        return rows[:place] + rows[place + 1 :]

    return change


def with_one_more(kind: str):
    def change(rows: list[DocumentSignals]) -> list[DocumentSignals]:
        like = next(row for row in rows if row.kind == kind)
        return [*rows, dataclasses.replace(like, document="999")]

    return change


EDITS = {
    "held-in users removed": without_some_users(HELD_IN, 3),
    "held-out user removed": without_some_users(HELD_OUT, 1),
    "user moved": moved,
    "target is base": target_is_base,
    **{f"one {kind} document less": without_one_of(kind) for kind in (signals.FRESH, signals.TRAINING, signals.CANARY)},
    **{f"one {kind} document more": with_one_more(kind) for kind in (signals.FRESH, signals.TRAINING, signals.CANARY)},
}
PLANNED_EDITS = [name for name in EDITS if name != "target is base"]


def test_the_untouched_run_is_believed(run):
    assert analyse_run(run)["counts"]["held_in"]["num_units"] > 3
    report.write_report(run)
    assert not [line for line in verify.verify_report(run).not_checked if "signals" in line]


@pytest.mark.parametrize("name", EDITS)
def test_edited_signals_are_refused(run, name):
    rewrite(run, EDITS[name])
    assert "sealed" in refused(lambda: analyse_run(run), "signals.parquet")


@pytest.mark.parametrize("name", EDITS)
def test_mutant_without_seal_lets_edits_pass(run, name, monkeypatch):
    """The mutant of the seal: a changed target goes through, a changed set of documents is found by the coins."""
    rewrite(run, EDITS[name])
    reseal(run)
    if name in PLANNED_EDITS:
        refused(lambda: coins.check_documents(record.read_scoring(RunDirectory(run))), "signals.parquet")
        monkeypatch.setattr(analyse, "check_documents", lambda scoring: 0)
    analyse_run(run)


def test_a_scorer_that_loses_documents_seals_nothing(run, monkeypatch):
    (run / SIGNALS_PATH).unlink()
    honest = score.score_documents
    monkeypatch.setattr(score, "score_documents", lambda *args: honest(*args)[1:])
    message = refused(lambda: score_run(run, OPTIONS), "parts-signals")
    assert "1 documents of 1 users missing" in message
    assert not (run / SIGNALS_PATH).exists()
    monkeypatch.setattr(planned, "difference", lambda *_: "")
    score_run(run, OPTIONS)  # the mutant: without the comparison the subset would be sealed


def test_a_changed_adapter_is_refused_before_a_token_is_scored(run, monkeypatch):
    (run / SIGNALS_PATH).unlink()
    zero_adapter(run)
    with monkeypatch.context() as patch:
        patch.setattr(score, "load_scorers", lambda *_: pytest.fail("a model was loaded"))
        refused(lambda: score_run(run, OPTIONS), "adapter_model.safetensors")
    monkeypatch.setattr(evidence, "check_release", lambda run: None)
    score_run(run, OPTIONS)  # the mutant: without the check another model is scored


def test_an_adapter_that_changes_while_it_is_scored_is_refused(run, monkeypatch):
    (run / SIGNALS_PATH).unlink()
    honest = score.load_scorers

    def load_and_change(*args):
        found = honest(*args)
        zero_adapter(run)
        return found

    monkeypatch.setattr(score, "load_scorers", load_and_change)
    refused(lambda: score_run(run, OPTIONS), "adapter_model.safetensors")
    assert not (run / SIGNALS_PATH).exists()


class Killed(BaseException):
    """The machine is gone."""


def killed_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """From now on the job dies instead of putting its file number ``count`` in place."""
    import os

    left, honest = iter(range(count)), os.replace

    def replace(source, target):
        if next(left, None) is None:
            raise Killed
        honest(source, target)

    patch.setattr(os, "replace", replace)


def test_a_scoring_killed_anywhere_goes_on_to_the_same_bytes(run, monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENTS_PER_PART", 24)
    path = run / SIGNALS_PATH
    expected, count = None, 0
    while True:
        path.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            killed_after(count, patch)
            try:
                score_run(run, OPTIONS)
            except Killed:
                count += 1
            else:
                break
        score_run(run, OPTIONS)
        expected = expected or path.read_bytes()
        assert path.read_bytes() == expected
        assert {item.name for item in path.parent.iterdir()} <= {
            *(".signals.lock", "signals.parquet", "signals.json", "per_user.parquet", "per_user.json"),
        }
    assert path.read_bytes() == expected
    assert count >= 8, "parts, their records, the signals and their record"


def interrupted(run: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """A scoring that was killed with some parts finished."""
    monkeypatch.setattr(documents, "DOCUMENTS_PER_PART", 8)
    (run / SIGNALS_PATH).unlink()
    with monkeypatch.context() as patch:
        killed_after(7, patch)
        with pytest.raises(Killed):
            score_run(run, OPTIONS)
    return sorted((run / "secret/attack").glob("parts-*/part-*.parquet"))


@pytest.mark.parametrize("spoil", ["flip", "swap", "target", "no record", "empty", "directory"])
def test_a_part_that_cannot_be_proven_is_scored_again(run, monkeypatch, spoil):
    parts = interrupted(run, monkeypatch)
    first, second = parts[:2]
    if spoil == "flip":
        content = bytearray(first.read_bytes())
        content[len(content) // 2] ^= 1
        first.write_bytes(content)
    elif spoil == "swap":  # another part with its record, in this one's place
        shutil.copy(second, first)
        shutil.copy(second.with_suffix(".json"), first.with_suffix(".json"))
    elif spoil == "target":
        signals.write_signals(first, target_is_base(read_signals(first)))
    elif spoil == "no record":
        first.with_suffix(".json").unlink()
    elif spoil == "empty":
        first.write_bytes(b"")
    else:
        first.unlink()
        first.mkdir()
        with pytest.raises(OSError, match="directory"):  # what stands in the way is not ours to remove
            score_run(run, OPTIONS)
        first.rmdir()
    score_run(run, OPTIONS)
    resumed = (run / SIGNALS_PATH).read_bytes()
    (run / SIGNALS_PATH).unlink()
    score_run(run, OPTIONS)
    assert (run / SIGNALS_PATH).read_bytes() == resumed


def test_parts_of_another_model_are_never_joined(run, monkeypatch):
    """Killed, the adapter zeroed, resumed; also if nobody noticed that the adapter changed."""
    interrupted(run, monkeypatch)
    zero_adapter(run)
    refused(lambda: score_run(run, OPTIONS), "adapter_model.safetensors")
    monkeypatch.setattr(evidence, "check_release", lambda run: None)
    score_run(run, OPTIONS)
    for row in read_signals(run / SIGNALS_PATH):
        assert np.array_equal(row.target_logp, row.base_logp), "a row of the adapter as it was"


@pytest.mark.parametrize(
    "change",
    [
        {"target": {"base": "other"}},
        {"target": {"released": "other"}},
        {"target": {"precision": "bf16"}},
        {"target": {"statement": "other"}},
    ],
)
def test_signals_of_another_target_are_refused(run, change):
    path = (run / SIGNALS_PATH).with_suffix(".json")
    facts = json.loads(path.read_text())
    facts["target"] |= change["target"]
    write_sealed(RunDirectory(run), path, facts)
    if {"released", "statement"} & set(change["target"]):
        refused(lambda: analyse_run(run), "signals.parquet")
    else:
        refused(lambda: report.write_report(run), "attacks.json")


def test_signals_of_another_run_are_refused(run, made, tiny_llama, users_file, tmp_path):
    tree = tiny_tree(tiny_llama, users_file, tmp_path / "others" / "runs")
    (tmp_path / "others").mkdir()
    scored = []
    for name, rate in (("one", 1e-2), ("two", 2e-2)):
        tree["run"]["name"], tree["training"]["learning_rate"] = name, rate
        train(write_config(tree, tmp_path / f"{name}.yaml"))
        scored.append(tmp_path / "others" / "runs" / name)
        score_run(scored[-1])
    one, two = scored
    assert (one / "secret/root.key").read_bytes() == (two / "secret/root.key").read_bytes()
    for name in ("signals.parquet", "signals.json"):
        shutil.copy(one / "secret/attack" / name, two / "secret/attack" / name)
        shutil.copy(one / "secret/attack" / name, run / "secret/attack" / name)
    assert "another target" in refused(lambda: analyse_run(two), "signals.parquet")
    assert "seal" in refused(lambda: analyse_run(run), "signals.json")


@pytest.mark.parametrize(
    "edit",
    [
        lambda facts: facts | {"verdict": "consistent", "verdict_reason": "trust me"},
        lambda facts: facts["results"]["token_mean"].update(auroc=0.5) or facts,
        lambda facts: facts["cap"].update(auroc_used=1.0) or facts,
        lambda facts: {name: value for name, value in facts.items() if name != "seal"},
        lambda facts: facts["panels"].pop("audit") and facts,
    ],
)
def test_edited_results_are_refused_by_whatever_reads_them(run, edit):
    path = run / ATTACKS_PATH
    write_json(path, edit(json.loads(path.read_text())))
    for read in (report.write_report, report.read_results, report.summary_table, verify.verify_report):
        assert "seal" in refused(lambda read=read: read(run), "attacks.json")


def test_results_without_key_are_not_believed(run):
    shutil.rmtree(run / "secret")
    assert "attacks verify" in refused(lambda: report.read_results(run), "attacks.json")
    checked = verify.verify_report(run)
    assert any("what was attacked" in sentence for sentence in checked.holds)
    assert any("need secret/root.key" in sentence for sentence in checked.not_checked)


PUBLISHED_EDITS: dict[str, Callable[[pathlib.Path], object]] = {
    "index.html": lambda run: append(run / report.INDEX_PATH),
    "report.md": lambda run: append(run / report.MARKDOWN_PATH),
    "attacks.json": lambda run: edit_json(run / ATTACKS_PATH),
    "report.json": lambda run: edit_json(run / report.REPORT_PATH),
    "privacy.json": lambda run: append(run / "privacy.json"),
    "adapter_model.safetensors": lambda run: zero_adapter(run),
}


def append(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def edit_json(path: pathlib.Path) -> None:
    facts = json.loads(path.read_text())
    (facts if "headline" in facts else facts["attacks"])["headline"] = "sequence_sum"
    write_json(path, facts)


@pytest.mark.parametrize("has_key", [True, False])
@pytest.mark.parametrize("name", PUBLISHED_EDITS)
def test_a_reader_of_a_published_report_finds_what_differs(run, name, has_key):
    if not has_key:
        shutil.rmtree(run / "secret")
    verify.verify_report(run)
    PUBLISHED_EDITS[name](run)
    refused(lambda: verify.verify_report(run), name)


def evidence_files(run: pathlib.Path) -> Iterator[tuple[pathlib.Path, Callable[[], object]]]:
    """Every file that the job believes, and what reads it."""
    directory, signals_path = RunDirectory(run), run / SIGNALS_PATH

    def per_user() -> None:
        record.read_scoring(directory, run / PER_USER_PATH, schema=analyse.PER_USER_SCHEMA_NAME).check()

    yield signals_path, lambda: coins.check_documents(record.read_scoring(directory))
    yield record.record_path(signals_path), lambda: record.read_scoring(directory)
    yield run / ATTACKS_PATH, lambda: report.read_results(run)
    yield run / report.REPORT_PATH, lambda: read_sealed_file(directory, run / report.REPORT_PATH)
    yield run / PER_USER_PATH, per_user
    yield record.record_path(run / PER_USER_PATH), per_user
    yield directory.used, lambda: documents.read_used(directory)
    yield directory.manifest, lambda: documents.read_manifest(directory)


def test_damaged_evidence_is_one_line_and_exit_2(run, monkeypatch):
    monkeypatch.setattr(evidence, "check_release", lambda run: None)  # it has its own tests, and hashes everything
    rng = np.random.default_rng(0)
    for path, read in evidence_files(run):
        content = path.read_bytes()
        read()
        places = {0, len(content) - 1, *rng.integers(0, len(content), 25).tolist()}
        for place in sorted(places):
            flipped = bytearray(content)
            flipped[place] ^= 0xFF
            for spoiled in (bytes(flipped), content[:place]):
                if spoiled.strip() == content.strip() and path == run / "secret/manifest.json":
                    continue  # its digest is of the content, and a line break at the end is none
                path.write_bytes(spoiled)
                with pytest.raises(PrivtrainError) as caught:
                    read()
                assert caught.value.exit_code == EXIT_WRONG_INPUT
                assert path.stem in str(caught.value), (path, place)
                assert "\n" not in str(caught.value)
        path.unlink()
        path.mkdir()
        assert "is a directory" in refused(read, path.name)
        path.rmdir()
        (run / "aside").write_bytes(content)
        path.symlink_to(run / "aside")
        assert "is a link" in refused(read, path.name)
        path.unlink()
        path.write_bytes(content)
        read()


def test_damaged_signals_are_refused_also_without_a_seal(run):
    """Arrow alone must not end in a traceback: the same loop behind the opener, seeds included."""
    path, rng = run / SIGNALS_PATH, np.random.default_rng(1)
    content = path.read_bytes()
    for place in rng.integers(0, len(content), 150).tolist():
        flipped = bytearray(content)
        flipped[place] ^= int(rng.integers(1, 256))
        for spoiled in (bytes(flipped), content[:place] or b"P"):
            path.write_bytes(spoiled)
            problem = ""
            try:
                read_signals(path)
            except DamagedFile as error:
                problem = str(error)
            assert "\n" not in problem


def test_a_shadow_is_another_model_on_the_same_base(run, monkeypatch):
    own = record.read_scoring(RunDirectory(run))
    with pytest.raises(AttackInputError, match="no shadow of itself"):
        score_run(run, OPTIONS, documents_of=run)
    path = run / signals.REFERENCES_PATH / "shadow-a.parquet"
    path.parent.mkdir()
    shutil.copy(own.path, path)
    assert "is missing" in refused(lambda: record.read_references(RunDirectory(run), own), "shadow-a.json")
    facts = {name: value for name, value in own.facts.items() if name != "seal"}
    record.write_scoring(RunDirectory(run), path, facts)
    assert "the same model" in refused(lambda: record.read_references(RunDirectory(run), own), "shadow-a")
    target = {**facts["target"], "released": {"adapter_model.safetensors": "0"}}
    record.write_scoring(RunDirectory(run), path, {**facts, "target": {**target, "base": {}}})
    assert "another base" in refused(lambda: record.read_references(RunDirectory(run), own), "shadow-a")
    record.write_scoring(RunDirectory(run), path, {**facts, "target": target})
    assert len(record.read_references(RunDirectory(run), own)) == 1
    shutil.copy(path, path.with_name("shadow-b.parquet"))
    shutil.copy(path.with_suffix(".json"), path.with_name("shadow-b.json"))
    assert "seal" in refused(lambda: record.read_references(RunDirectory(run), own), "shadow-b")
    path.with_name("shadow-b.json").unlink()
    record.write_scoring(RunDirectory(run), path.with_name("shadow-b.parquet"), {**facts, "target": target})
    assert "the same model" in refused(lambda: record.read_references(RunDirectory(run), own), "shadow-b")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_another_base_or_tokenizer_is_another_target(tiny_llama, tmp_path, name):
    from privtrain.config.model import ModelSection

    copy = shutil.copytree(tiny_llama, tmp_path / "base")
    model = ModelSection(name_or_path=str(copy))
    before = targets.base_digests(model)
    assert name in before
    append(copy / name)
    assert [key for key, value in targets.base_digests(model).items() if before[key] != value] == [name]


def test_what_is_uploaded_is_the_report_and_nothing_beside_it(run, monkeypatch):
    import wandb

    (run / "report" / "notes.txt").write_text("user-000")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking.log_report(run, report.read_results(run), project="privtrain-tests")
    wandb.teardown()
    (log,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert b"notes.txt" not in log.read_bytes()


def test_a_policy_cannot_be_met_by_editing(run):
    facts = report.read_results(run)
    assert Policy(max_auroc_lower=1.0).violations(facts) == []
    path = run / ATTACKS_PATH
    changed = json.loads(path.read_text())
    changed["results"]["token_mean"]["verdict_lower"] = 0.0
    write_json(path, changed)
    refused(lambda: report.read_results(run), "attacks.json")


def test_the_configuration_must_be_the_published_one(run):
    path = run / "secret" / "config.yaml"
    path.write_text(path.read_text().replace("held_out_fraction: 0.5", "held_out_fraction: 0.3"))
    refused(lambda: score_run(run, OPTIONS), "config.yaml")


def test_a_cut_configuration_is_one_line(run):
    """Unless what is gone says what holds without it: then the configuration is the published one."""
    path, num_refused = run / "secret" / "config.yaml", 0
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place])
        try:
            found = evidence.read_config(RunDirectory(run))
        except PrivtrainError:
            num_refused += 1
            refused(lambda: evidence.read_config(RunDirectory(run)), "config.yaml")
        else:
            assert to_yaml(public_tree(found)) == (run / "config.yaml").read_text()
    assert num_refused > 10


def test_the_signals_schema_is_unchanged(run):
    assert pq.read_schema(run / SIGNALS_PATH).equals(signals.SCHEMA)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "adapter/README.md", "adapter/tokenizer.json"])
def test_whatever_was_released_must_be_as_it_was(run, name):
    append(run / name)
    for action in (lambda: score_run(run, OPTIONS), lambda: analyse_run(run), lambda: report.read_results(run)):
        refused(action, name)


def test_epsilon_edited_everywhere_contradicts_its_plan(run):
    """The mutant is the forger: every digest made anew, the last record of the ledger included."""
    import hashlib

    from privtrain.run import bundle

    statement = json.loads((run / "privacy.json").read_text())
    statement["epsilon"] = 0.5
    for path in (run / "privacy.json", run / "adapter/privacy.json"):
        write_json(path, statement)
    manifest, _ = bundle.read_manifest(run)
    files = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in manifest.files}
    forged = dataclasses.replace(manifest, statement=bundle.digest_of(statement), files=files)
    (run / "release.json").write_text(bundle.render(forged, "run"), encoding="utf-8")
    (run / "adapter/release.json").write_text(bundle.render(forged, "adapter"), encoding="utf-8")
    ledger = run / "secret/ledger.jsonl"
    *lines, last = ledger.read_text().splitlines()
    ledger.write_text("\n".join([*lines, json.dumps(json.loads(last) | {"manifest": forged.body})]) + "\n")
    bundle.check_released(run)
    assert "epsilon" in refused(lambda: analyse_run(run), "not what was released")


def test_another_base_than_the_run_was_trained_from_is_refused(run, monkeypatch):
    honest = targets.base_digests
    monkeypatch.setattr(targets, "base_digests", lambda model: honest(model) | {"config.json": "0" * 64})
    refused(lambda: score_run(run, OPTIONS), "base: config.json")
    monkeypatch.setattr(evidence, "check_base", lambda *_: None)
    score_run(run, OPTIONS)  # the mutant: another base is scored, and its rows are no old ones
    assert json.loads((run / "secret/attack/signals.json").read_text())["target"]["base"]["config.json"] == "0" * 64
