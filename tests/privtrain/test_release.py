"""What leaves a run: the card, the statement and the metrics, and nothing private."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import re
import shutil
import socket
import time
import uuid

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from privtrain.config import validate
from privtrain.errors import ConfigError, LedgerCorrupt, PrivtrainError
from privtrain.job.train import train
from privtrain.ledger.chain import read_records
from privtrain.ledger.log import verify
from privtrain.ledger.view import _false_claims, print_ledger, verify_run
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.license import license_in
from privtrain.run.release import model_card
from privtrain.tracking import METRICS, Release
from privtrain.tracking.trackers import JsonlTracker, ReleaseGate
from tests.conftest import tiny_tree, write_config
from tests.privtrain.ledgers import contents, drop_records, rewrite_head

pytestmark = pytest.mark.usefixtures("no_self_test")


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory, tiny_llama, users_file):
    """A finished run with W&B in offline mode and operating-system secrets, as in production."""
    place = tmp_path_factory.mktemp("mirrored")
    tree = tiny_tree(tiny_llama, users_file, place / "runs") | {"tracking": {"wandb": True}}
    del tree["privacy"]["insecure_seed"]
    train(write_config(tree, place / "c.yaml"))
    run = place / "runs" / "tiny"
    (mirror,) = run.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 120
    while b"privacy/ledger_head" not in mirror.read_bytes():  # W&B's own process writes it
        assert time.monotonic() < deadline, "the mirror was never written"
        time.sleep(0.05)
    return run


@pytest.fixture
def finished(mirrored, tmp_path):
    """A copy of it."""
    return shutil.copytree(mirrored, tmp_path / "runs" / "tiny", symlinks=True)


def fingerprint_of(run) -> str:
    """The run's own fingerprint covers the private records: published, it would let anybody test a guess of one."""
    return json.loads((run / "secret" / "identity.json").read_text())["fingerprint"]


def public_files(run):
    return [p for p in run.rglob("*") if p.is_file() and not {"secret", "checkpoints"} & set(p.relative_to(run).parts)]


def forms_of(digits: str) -> list[str]:
    """How a key or a pseudonym could appear in a file."""
    raw = bytes.fromhex(digits)
    forms = [digits, digits.upper(), raw.decode("latin-1"), base64.b64encode(raw).decode().rstrip("=")]
    return [*forms, str(uuid.UUID(hex=digits[:32]))]


def test_nothing_private_is_in_any_public_file(finished, mirrored):
    secrets = [key.read_text().strip() for key in (finished / "secret").glob("*.key")]
    assert len(secrets) == 3
    pseudonyms = {name for step in contents(finished / "secret" / "ledger.jsonl").values() for name in step}
    assert pseudonyms
    manifest = json.loads((finished / "secret" / "manifest.json").read_text())
    users = [*manifest["held_in"], *manifest["held_out"]]
    assert all(user.startswith("user-") for user in users)
    private_names = [name for name, release in METRICS.items() if release is not Release.PUBLIC]
    assert fingerprint_of(finished) not in secrets
    forbidden = [
        fingerprint_of(finished),
        *(form for secret in [*secrets, *pseudonyms] for form in forms_of(secret)),
        *users,
        *private_names,
    ]
    files = public_files(finished)
    (mirror,) = [p for p in files if p.suffix == ".wandb"]
    assert b"privacy/epsilon" in mirror.read_bytes(), "the mirror must be readable for this test to mean anything"
    for file in files:
        content = file.read_bytes().decode("latin-1")
        for needle in forbidden:
            assert needle not in content, f"{needle!r} in {file.relative_to(finished)}"
        if file.suffix != ".log":  # W&B's own log of this machine, which it does not upload
            # A very short host name would be found in random bytes.
            for place in {str(mirrored.parent), str(finished.parent), socket.gethostname().ljust(6, "\0")}:
                assert place not in content, f"{place!r} in {file.relative_to(finished)}"


def test_secret_files_are_the_owners_alone(finished):
    for place in ("secret", "checkpoints"):
        assert (finished / place).stat().st_mode & 0o777 == 0o700
    for file in [*(finished / "secret").rglob("*"), *(finished / "checkpoints").rglob("*")]:
        assert file.stat().st_mode & 0o077 == 0, file


def test_open_files_are_closed_and_open_directories_refused(tree, tmp_path, capsys):
    path = write_config(tree, tmp_path / "c.yaml")
    train(path)
    run = tmp_path / "runs" / "tiny"
    segment = next((run / "secret" / "ledger").glob("*.parquet"))
    segment.chmod(0o644)
    segment.parent.chmod(0o750)
    train(path)
    assert f"closed to other users: {segment.parent}" in capsys.readouterr().out
    assert (segment.stat().st_mode & 0o777, segment.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    (run / "checkpoints").chmod(0o710)
    with pytest.raises(PrivtrainError, match="can be read by other users"):
        train(path)


def test_what_became_of_the_rows_is_counted_in_secret(finished):
    counts = json.loads((finished / "secret" / "data_counts.json").read_text())
    assert set(counts) == {
        "num_rows",
        "num_without_user",
        "num_users_opted_out",
        "num_empty",
        "reasons",
        "num_duplicates",
        "num_truncated_training_records",
        "num_training_records_without_target",
    }
    assert counts["num_rows"] > 24
    assert counts["num_truncated_training_records"] > 0


def test_the_statement_says_what_was_done(finished):
    statement = json.loads((finished / "privacy.json").read_text())
    assert statement == json.loads((finished / "adapter" / "privacy.json").read_text())
    assert statement["private"] is True
    assert statement["unit"] == "user"
    assert statement["neighboring_relation"] == "add_or_remove_one"
    assert statement["steps_released"] == statement["ledger"]["num_commits"] == 4
    assert statement["accountants"][0]["kind"] == "certified_upper"
    card = (finished / "adapter" / "README.md").read_text()
    assert f"| ε | {statement['epsilon']:.4g} |" in card
    assert statement["ledger"]["head"] in card
    assert "NOT PRIVATE" not in card


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        (
            "Qwen/Qwen2.5-0.5B",
            {"kind": "hub", "name": "someone/chats"},
            {"base_model": "Qwen/Qwen2.5-0.5B", "base_model_relation": "adapter", "datasets": ["someone/chats"]},
        ),
        ("/models/base", {"kind": "plays"}, {}),
    ],
)
def test_the_cards_front_matter_says_what_hub_pages_read(tree, finished, name, source, expected):
    """Names of the hub alone: no path of this machine."""
    tree["model"], tree["data"]["source"] = {"name_or_path": name}, source
    config = validate(tree)
    statement = json.loads((finished / "privacy.json").read_text())
    front = model_card(config, PrivacyPlan.build(config.privacy), statement).split("---")[1]
    found = yaml.safe_load(front)
    assert found.pop("library_name") == "peft"
    assert found.pop("pipeline_tag") == "text-generation"
    assert "privtrain" in found.pop("tags")
    assert found == expected


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model", {"license": "apache-2.0"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: https://example.org/terms\n---\n",
            {"license": "other", "license_name": "own", "license_link": "https://example.org/terms"},
        ),
        ("---\nlicense: other\nlicense_name: 'a: b'\nlicense_link: 3\n---\n", {"license": "other"}),
        ("# License: mit\n", {}),
        ("---\nlicense: mit\n", {}),  # no end of the front matter
        ("---\nlicense: [mit, gpl]\n---\n", {}),
        ("---\nlicense: mit\nlicense: gpl\n---\n", {}),
        ("---\nlicense: 'mit\n\n  tags: [x]'\n---\n", {}),
        ("---\n{{{\n---\n", {}),
        (None, {}),
    ],
)
def test_license_is_what_the_base_says_and_never_guessed(card, expected, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card, "utf-8", newline="")
    assert license_in(tmp_path / "README.md") == expected


def test_card_has_the_license_of_its_base_or_of_the_key(tree, finished, tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    statement = json.loads((finished / "privacy.json").read_text())
    tree["model"] = {"name_or_path": str(base)}
    for release, expected in (({}, "apache-2.0"), ({"license": "mit"}, "mit")):
        config = validate({**tree, "release": release})
        front = model_card(config, PrivacyPlan.build(config.privacy), statement).split("---")[1]
        assert yaml.safe_load(front)["license"] == expected
    with pytest.raises(ConfigError, match=r"release\.license"):
        validate({**tree, "release": {"license": "my: own"}})


def test_the_adapter_loads_in_peft_and_is_not_empty(finished, tiny_llama):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = peft.PeftModel.from_pretrained(base, str(finished / "adapter"))
    ids = torch.arange(1, 9)[None]
    tuned = model(input_ids=ids).logits
    with model.disable_adapter():
        assert not torch.equal(tuned, model(input_ids=ids).logits)
    assert str(tiny_llama) not in (finished / "adapter" / "adapter_config.json").read_text()


def test_metrics_are_rows_a_step_with_a_growing_epsilon(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    epsilons = [row["privacy/epsilon"] for row in rows]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == json.loads((finished / "privacy.json").read_text())["epsilon"]
    private = [json.loads(line) for line in (finished / "secret" / "private_metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "train/clip_fraction"} <= set(private[1])


def test_a_statement_that_quotes_another_ledger_is_found(finished, capsys):
    assert "matches privacy.json" in verify_run(finished)
    print_ledger(finished)
    assert "intent" in capsys.readouterr().out
    ledger = finished / "secret" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(LedgerCorrupt, match="records were removed"):
        verify_run(finished)
    rewrite_head(ledger)
    with pytest.raises(LedgerCorrupt, match="has no release"):
        verify_run(finished)


def edit_statement(run, **values):
    statement = json.loads((run / "privacy.json").read_text())
    for key, value in values.items():
        *parents, last = key.split("__")
        functools.reduce(dict.__getitem__, parents, statement)[last] = value
    (run / "privacy.json").write_text(json.dumps(statement))


@pytest.mark.parametrize(
    "claim",
    [
        {"steps_released": 3},
        {"ledger__num_commits": 3},
        {"contribution_bound__records_per_unit_per_step": 2},
        {"num_steps": 3},
    ],
)
def test_a_statement_that_the_ledger_does_not_bear_out_is_found(finished, claim):
    edit_statement(finished, **claim)
    with pytest.raises(LedgerCorrupt, match=rf"privacy.json: {next(iter(claim)).replace('__', '.')} is "):
        verify_run(finished)


def test_groups_and_steps_accounted_are_compared_with_the_log(finished):
    """The accounting of banded noise rests on both."""
    statement, state = json.loads((finished / "privacy.json").read_text()), verify(finished / "secret" / "ledger.jsonl")
    assert _false_claims(statement, state) == []
    grouped = dataclasses.replace(state, num_groups=3)
    assert _false_claims(statement, grouped) == ["number of groups by the plan is 1, the ledger shows 3"]
    statement["steps_accounted"] += 1
    assert _false_claims(statement, state) == ["steps_accounted is 5, the ledger shows 4"]


def test_promises_of_release_cannot_be_altered(finished):
    """ε, δ and the plan stand in the log's last record, so that a statement with others is found, in either copy."""
    whole = (finished / "privacy.json").read_text()
    assert "matches privacy.json" in verify_run(finished)
    edits = [
        ("epsilon", '"epsilon": 1.5'),
        ("epsilon", '"epsilon": null'),
        ("delta", '"delta": 1e-09'),
        ("plan_fingerprint", f'"plan_fingerprint": "{"0" * 64}"'),
        ("upper", '"upper": 0.5'),
    ]
    for name, said in edits:
        (finished / "privacy.json").write_text(re.sub(rf'"{name}": [^,\n]+', said, whole))
        with pytest.raises(LedgerCorrupt, match=name):
            verify_run(finished)
    for damaged in (whole.replace('"epsilon":', '"epsilon": 1.5, "epsilon":'), "{}", "[]", whole[:-9]):
        (finished / "privacy.json").write_text(damaged)
        with pytest.raises(LedgerCorrupt, match=r"privacy\.json"):
            verify_run(finished)
    (finished / "privacy.json").write_text(whole)
    copy = finished / "adapter" / "privacy.json"
    copy.write_text(re.sub(r'"epsilon": [^,\n]+', '"epsilon": 1.5', whole))
    with pytest.raises(LedgerCorrupt, match="adapter"):
        verify_run(finished)
    copy.write_text(whole)
    identity = finished / "secret" / "identity.json"
    identity.write_text(identity.read_text().replace(fingerprint_of(finished), "0" * 64))
    with pytest.raises(LedgerCorrupt, match="another plan or data set"):
        verify_run(finished)
    (finished / "secret" / "pseudonym.key").unlink()
    assert "matches privacy.json" in verify_run(finished), "without the key the log's plan tells nothing"


def test_a_statement_over_a_log_without_a_release_is_found(finished):
    drop_records(finished / "secret" / "ledger.jsonl", "release")
    with pytest.raises(LedgerCorrupt, match="no release"):
        verify_run(finished)


def test_a_head_that_was_noted_must_be_in_the_log(finished):
    heads = [record["hash"] for record in read_records(finished / "secret" / "ledger.jsonl")]
    assert "contains the head given" in verify_run(finished, heads[2])
    with pytest.raises(LedgerCorrupt, match="never had head"):
        verify_run(finished, "0" * 64)


class Recorder:
    def __init__(self):
        self.rows = []

    def log(self, step, values):
        self.rows.append(dict(values))

    def close(self):
        pass


@pytest.mark.parametrize(
    ("tracking", "expected"),
    [
        ({}, {"train/lr"}),
        ({"release_held_out_metrics": True}, {"train/lr", "eval/held_out_loss"}),
        ({"private_metrics": True}, {"train/lr", "train/loss"}),
        ({"release_measurements": True}, {"train/lr", "perf/step_seconds"}),
    ],
)
def test_only_released_metrics_pass_the_gate(tree, tracking, expected):
    tree["tracking"] = tracking
    public, private = Recorder(), Recorder()
    gate = ReleaseGate(validate(tree), [public], private)
    values = {"train/lr": 1.0, "train/loss": 2.0, "eval/held_out_loss": 3.0, "perf/step_seconds": 4.0}
    gate.log(1, values)
    assert set(public.rows[0]) == expected
    assert {name for row in private.rows for name in row} == set(values) - expected


def test_an_undeclared_metric_cannot_be_logged(tree):
    with pytest.raises(KeyError):
        ReleaseGate(validate(tree), [Recorder()], Recorder()).log(1, {"train/secret": 1.0})


def test_resumed_metrics_drop_torn_and_replayed_rows(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"train/step": 1}\n{"train/step": 2}\n{"train/step": 3}\n{"train/st', encoding="utf-8")
    tracker = JsonlTracker(path, from_step=2)
    tracker.log(3, {"train/lr": 1.0})
    tracker.close()
    assert [json.loads(line)["train/step"] for line in path.read_text().splitlines()] == [1, 2, 3]
