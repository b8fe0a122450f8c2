"""Whole scoring jobs: killed and resumed, full fine-tuning, shadows, variants, labelled spans."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

from attacks.errors import AttackInputError
from attacks.scoring import documents, neural, shadows
from attacks.scoring.score import ScoreOptions, score_run
from attacks.scoring.variants import Variants
from attacks.signals import REFERENCES_PATH, SIGNALS_PATH
from privtrain.config.model import ModelSection
from privtrain.job.train import train
from privtrain.models.load import load_base, load_tokenizer
from tests import jobs
from tests.attacks.signal_files import read_signals
from tests.cluster import Ranks
from tests.conftest import write_config

pytestmark = pytest.mark.usefixtures("no_self_test")


def train_run(tree, tmp_path, name: str = "tiny") -> pathlib.Path:
    tree["privacy"] |= {"noise_multiplier": 0.0, "num_steps": 4}
    tree["run"]["name"] = name
    train(write_config(tree, tmp_path / f"{name}.yaml"))
    return tmp_path / "runs" / name


def score_with(run: pathlib.Path, **options) -> list:
    (run / SIGNALS_PATH).unlink(missing_ok=True)
    score_run(run, ScoreOptions(**options))
    return read_signals(run / SIGNALS_PATH)


def score_slowly(rank: int) -> None:
    """In the job's own process: parts of two documents, each of which takes its time."""
    plain = neural.NeuralScorer.score

    def slow(self, sequences):
        time.sleep(0.15)
        return plain(self, sequences)

    documents.DOCUMENTS_PER_PART = 2
    neural.NeuralScorer.score = slow


def test_a_killed_job_goes_on_where_it_stopped(tree, tmp_path, monkeypatch):
    run = train_run(tree, tmp_path)
    job = Ranks(["attacks", "score", run], tmp_path / "logs", world_size=1, before=score_slowly)
    deadline = time.monotonic() + 120
    while len(found := sorted((run / "secret/attack").glob("parts-*/part-*.json"))) < 4:
        assert time.monotonic() < deadline
        assert job.ranks[0].is_alive(), job.output()
        time.sleep(0.01)
    job.send(0, signal.SIGKILL)
    job.wait(30)
    sealed = [path.with_suffix(".parquet") for path in sorted(found[0].parent.glob("part-*.json"))]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sealed}
    assert not (run / SIGNALS_PATH).exists()

    monkeypatch.setattr(documents, "DOCUMENTS_PER_PART", 2)
    seen: list[str] = []
    original = documents.tokens_of
    monkeypatch.setattr(documents, "tokens_of", lambda texts, *rest: seen.extend(texts) or original(texts, *rest))
    untouched = []

    def joined(target, parts, digests):
        untouched.extend((path.stat().st_mtime_ns, path.read_bytes()) == was for path, was in before.items())
        return join(target, parts, digests)

    from attacks.scoring import score

    join = score.join_signals
    monkeypatch.setattr(score, "join_signals", joined)
    score_run(run)
    rows = read_signals(run / SIGNALS_PATH)
    num_before = 2 * len(before)
    assert num_before >= 8
    assert untouched == [True] * len(before)
    assert len(seen) == len(rows) - num_before
    resumed = (run / SIGNALS_PATH).read_bytes()
    (run / SIGNALS_PATH).unlink()
    score_run(run)
    assert (run / SIGNALS_PATH).read_bytes() == resumed
    assert {path.name for path in (run / "secret/attack").iterdir()} == {
        ".signals.lock",
        "signals.parquet",
        "signals.json",
    }


def test_parts_of_other_settings_are_not_taken_over(tree, tmp_path):
    run = train_run(tree, tmp_path)
    first = score_with(run, num_training_records=0)
    second = score_with(run, num_training_records=1)
    assert len(second) > len(first)


def test_a_full_fine_tuning_is_compared_with_its_base(tree, tmp_path, tiny_llama):
    del tree["lora"]
    tree["training"]["method"] = "full"
    run = train_run(tree, tmp_path)
    rows = score_with(run)
    base = load_base(ModelSection(name_or_path=str(tiny_llama))).eval()
    tuned = load_base(ModelSection(name_or_path=str(run / "model"))).eval()
    for row in rows[:5]:
        ids = torch.tensor([[0, *row.token_ids.tolist()]])
        for model, found in ((tuned, row.target_logp), (base, row.base_logp)):
            with torch.no_grad():
                expected = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert np.abs(found - expected.numpy()).max() < 1e-4
    assert any(not np.allclose(row.target_logp, row.base_logp) for row in rows)


def test_shadow_scores_the_other_runs_documents_by_its_own_sides(tree, tmp_path):
    run = train_run(tree, tmp_path)
    own = score_with(run)
    tree["privacy"]["insecure_seed"] = 8
    shadow = train_run(tree, tmp_path, "other")
    score_run(shadow, documents_of=run)
    rows = read_signals(run / REFERENCES_PATH / "shadow-other.parquet")
    assert {(row.user, row.document) for row in rows} == {(row.user, row.document) for row in own}
    assert {row.user: row.side for row in rows} != {row.user: row.side for row in own}
    assert not (shadow / SIGNALS_PATH).exists()
    bases = {(row.user, row.document): row.base_logp for row in own}
    for row in rows:
        assert np.allclose(row.base_logp, bases[row.user, row.document], atol=1e-5)


def test_variants_are_scored_as_they_are_defined(tree, tmp_path, tiny_llama):
    tree["data"]["max_length"] = 64
    tree["data"]["attack_min_records"] = 6
    run = train_run(tree, tmp_path)
    rows = score_with(run, variants="lowercase,recall,neighbours:2")
    assert {"lowercase", "recall", "recall_plain", "neighbour_0", "neighbour_1"} == set(rows[0].variants)
    for row in rows:
        # The texts are lower case already, and short enough for the prefix to fit.
        mean = float(row.target_logp.mean(dtype=np.float64))
        assert row.variants["lowercase"] == pytest.approx(mean, abs=1e-4)
        assert row.variants["recall_plain"] == pytest.approx(mean, abs=1e-4)
        assert row.variants["recall"] != pytest.approx(mean, abs=1e-6)
        assert row.variants["neighbour_0"] != row.variants["neighbour_1"]
    again = score_with(run, variants="lowercase,recall,neighbours:2", batch_tokens=64)
    for one, other in zip(rows, again, strict=True):
        assert one.variants == pytest.approx(other.variants, abs=1e-3)


def test_unknown_variants_are_refused():
    assert Variants.parse("lowercase, neighbours:5") == Variants(lowercase=True, num_neighbours=5)
    for text in ("upper", "neighbours", "neighbours:0", "lowercase:2"):
        with pytest.raises(AttackInputError, match="unknown variant"):
            Variants.parse(text)


def test_labelled_spans_dates_and_languages_come_from_the_data(tree, tmp_path):
    source = pathlib.Path(tree["data"]["source"]["paths"][0])
    labelled = tmp_path / "labelled.jsonl"
    with labelled.open("w", encoding="utf-8") as file:
        for number, line in enumerate(source.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            row |= {"spans": [[2, 4]], "day": "2024-02-29", "tongue": "xx"}
            row["text"] = "  " + row["text"] if number % 2 else row["text"]
            row["spans"] = [[4, 6]] if number % 2 else row["spans"]
            file.write(json.dumps(row) + "\n")
    tree["data"]["source"]["paths"] = [str(labelled)]
    run = train_run(tree, tmp_path)
    for row in score_with(run, spans_column="spans", date_column="day", language_column="tongue"):
        # One token a byte; the shortest texts end inside the span, and the end mark is nobody's secret.
        assert np.flatnonzero(row.sensitive).tolist() == [place for place in (2, 3) if place < row.num_bytes]
        assert row.date == 19782.0
        assert row.language == "xx"
    (run / SIGNALS_PATH).unlink()
    with pytest.raises(AttackInputError, match="no column nothing"):
        score_run(run, ScoreOptions(spans_column="nothing"))


def test_a_token_is_sensitive_if_any_of_its_characters_is(tiny_llama):
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    found = documents.sensitive_tokens("abcé", [(1, 2), (3, 4)], tokenizer, 6)
    assert found.tolist() == [False, True, False, True, True, False]


def test_memory_does_not_grow_with_the_documents(tmp_path):
    """Peak memory of scoring 128 parts is that of 16, but for the bookkeeping of names."""
    code = """
import sys, resource, pathlib, numpy as np
from attacks import signals
from attacks.signals import DocumentSignals
from privtrain.files.reading import file_sha256
number, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
rng = np.random.default_rng(0)
def part(p):
    for d in range(64):
        logp = -rng.random(400).astype(np.float32)
        more = {f"{m}_{n}": logp for m in ("target", "base") for n in ("mean", "variance")}
        yield DocumentSignals(f"u{p}", str(d), "held_in", logp, logp, token_ids=np.arange(400), **more)
paths = [folder / f"{p}.parquet" for p in range(number)]
for p, path in enumerate(paths):
    signals.write_signals(path, part(p))
signals.join_signals(folder / "all.parquet", paths, [file_sha256(path) for path in paths])
assert sum(1 for _ in signals.iterate_signals(folder / "all.parquet")) == 64 * number
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for number in (16, 128):
        (tmp_path / str(number)).mkdir(mode=0o700)
        command = [sys.executable, "-c", code, str(number), str(tmp_path / str(number))]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=jobs.REPOSITORY)
        peaks.append(int(done.stdout))
    # 8 192 documents of 400 tokens are 92 MB of signals.
    assert peaks[1] - peaks[0] < 40_000, peaks


@pytest.mark.parametrize("number", [-1, 9, 200])
def test_more_training_records_than_allowed_are_refused(number):
    with pytest.raises(AttackInputError, match="expected 0 to 8"):
        ScoreOptions(num_training_records=number)
    assert ScoreOptions(num_training_records=8).num_training_records == 8


@pytest.mark.parametrize("name", ["chat", "prompt_completion", "classification"])
def test_shadows_of_other_formats_are_refused(monkeypatch, tmp_path, name):
    config = types.SimpleNamespace(data=types.SimpleNamespace(format=name))
    monkeypatch.setattr(shadows, "read_manifest", lambda run: {})
    monkeypatch.setattr(shadows.evidence, "read_config", lambda run: config)
    with pytest.raises(AttackInputError, match=f"this run has '{name}'"):
        shadows.write_recipes(tmp_path, 1)
    assert not list(tmp_path.iterdir())
