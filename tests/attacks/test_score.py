"""Scoring: exact log-probabilities, the same for any batch and any number of ranks, refused on altered data."""

from __future__ import annotations

import json
import pathlib
import shutil
import zlib

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from attacks.analysis.analyse import analyse_run
from attacks.cli import app
from attacks.errors import AttackInputError
from attacks.scoring.documents import compose_batches
from attacks.scoring.score import ScoreOptions, attack_pseudonym, score_run
from attacks.signals import FRESH, HELD_IN, HELD_OUT, SIGNALS_PATH, TRAINING
from privtrain.config import load_config
from privtrain.config.model import ModelSection
from privtrain.job.train import train
from privtrain.models.load import load_adapter, load_base, load_tokenizer
from privtrain.privacy.secret import pseudonym
from privtrain.run.directory import RunDirectory
from tests import jobs
from tests.attacks.signal_files import read_signals
from tests.conftest import write_config
from tests.privtrain.ledgers import contents

pytestmark = pytest.mark.usefixtures("no_self_test")


@pytest.fixture
def finished(tree, tmp_path):
    """A finished run in which no noise hides the training."""
    tree["privacy"] |= {"noise_multiplier": 0.0, "num_steps": 8}
    train(write_config(tree, tmp_path / "c.yaml"))
    return tmp_path / "runs" / "tiny"


def test_signals_are_the_models_log_probabilities(finished, tiny_llama):
    score_run(finished, ScoreOptions(batch_tokens=64))
    rows = read_signals(finished / SIGNALS_PATH)
    manifest = json.loads((finished / "secret" / "manifest.json").read_text())
    fresh = [row for row in rows if row.kind == FRESH]
    assert len(fresh) == sum(map(len, manifest["attacker"].values()))
    assert {row.kind for row in rows} == {FRESH, TRAINING}
    assert {row.side for row in rows} == {HELD_IN, HELD_OUT}
    assert len({row.user for row in rows}) == len(manifest["attacker"])

    model = load_adapter(load_base(ModelSection(name_or_path=str(tiny_llama))), finished / "adapter").eval()
    texts = {}
    for line in source_of(finished).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["user"], []).append(row["text"])
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    key = RunDirectory(finished).load_key("pseudonym")
    names = {attack_pseudonym(key, user): user for user in texts}
    in_the_ledger = {name for step in contents(finished / "secret" / "ledger.jsonl").values() for name in step}
    assert in_the_ledger & {pseudonym(key, user) for user in texts}
    assert not in_the_ledger & {row.user for row in rows}, "token ids under the ledger's pseudonyms name its rows"
    for signal in rows:
        assert (int(signal.document) in manifest["attacker"][names[signal.user]]) == (signal.kind == FRESH)
        text = texts[names[signal.user]][int(signal.document)]
        ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False)["input_ids"], 0]])[:, :24]
        with torch.no_grad():
            every = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        log_probs = every.gather(1, ids[0, 1:, None])[:, 0]
        mean = (every.exp() * every).sum(-1)
        variance = (every.exp() * (every - mean[:, None]) ** 2).sum(-1)
        assert np.abs(signal.target_logp - log_probs.numpy()).max() < 1e-4
        assert np.abs(signal.target_mean - mean.numpy()).max() < 1e-4
        assert np.abs(signal.target_variance - variance.numpy()).max() < 1e-3
        assert signal.target_correct.tolist() == (every.argmax(-1) == ids[0, 1:]).tolist()
        assert signal.token_ids.tolist() == ids[0, 1:].tolist()
        assert (signal.num_bytes, signal.zlib_bytes) == (len(text), len(zlib.compress(text.encode())))
    assert any(not np.array_equal(row.target_logp, row.base_logp) for row in rows)


def source_of(run) -> pathlib.Path:
    return load_config(run / "secret" / "config.yaml").data.source.paths[0]


def test_signals_do_not_depend_on_the_batch(finished):
    score_run(finished, ScoreOptions(batch_tokens=1))
    alone = read_signals(finished / SIGNALS_PATH)
    (finished / SIGNALS_PATH).unlink()
    score_run(finished, ScoreOptions(batch_tokens=4096))
    for one, other in zip(alone, read_signals(finished / SIGNALS_PATH), strict=True):
        assert (one.user, one.document, one.side) == (other.user, other.document, other.side)
        assert np.abs(one.target_logp - other.target_logp).max() < 1e-4


@pytest.mark.dist
@pytest.mark.slow
def test_one_and_two_ranks_write_the_same_bytes_then_report(finished):
    score_run(finished, ScoreOptions(batch_tokens=2048))
    alone = (finished / SIGNALS_PATH).read_bytes()
    (finished / SIGNALS_PATH).unlink()
    done = jobs.run("attacks", "score", finished)
    assert done.returncode == 0, done.output[-3000:]
    assert (finished / SIGNALS_PATH).read_bytes() == alone
    analyse_run(finished, seed=0)
    shown = CliRunner().invoke(app, ["report", str(finished)])
    assert shown.exit_code == 0, shown.output
    assert "NOT PRIVATE" in (finished / "report" / "index.html").read_text()


def test_altered_data_or_manifest_is_refused(finished, tmp_path):
    manifest = finished / "secret" / "manifest.json"
    sealed = manifest.read_text()
    body = json.loads(sealed)
    body["held_in"], body["held_out"] = body["held_out"], body["held_in"]
    manifest.write_text(json.dumps(body))
    with pytest.raises(AttackInputError, match="does not match its seal"):
        score_run(finished, ScoreOptions(batch_tokens=64))
    manifest.write_text(sealed)
    data = str(source_of(finished))
    copy = tmp_path / "elsewhere" / pathlib.Path(data).name  # paths may change, names are published
    copy.parent.mkdir()
    shutil.copy(data, copy)
    with open(copy, "a", encoding="utf-8") as file:
        file.write('{"user": "user-000", "text": "one more"}\n')
    config = finished / "secret" / "config.yaml"
    config.write_text(config.read_text().replace(data, str(copy)))
    with pytest.raises(AttackInputError, match="the data changed"):
        score_run(finished, ScoreOptions(batch_tokens=64))


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(AttackInputError, match="no run at"):
        score_run(tmp_path / "none")


def test_batches_hold_every_document_once_within_the_limit():
    lengths = np.random.default_rng(0).integers(2, 60, 100).tolist()
    batches = list(compose_batches(lengths, 128))
    assert sorted(place for batch in batches for place in batch) == list(range(100))
    assert all(max(lengths[place] for place in batch) * len(batch) <= 128 for batch in batches)
