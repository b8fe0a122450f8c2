"""The audit of a sampled corpus: word pairs by hand, coins that are not looked at, and a run without its noise."""

from __future__ import annotations

import json
import math
import pathlib
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from attacks.analysis.audit import sampled_corpus
from attacks.analysis.audit.sampled_corpus import PairCounts, audit_corpus, scores_of
from attacks.cli import app
from attacks.errors import AttackInputError
from privtrain.commands.generate import GenerateOptions, generate
from tests.attacks import mutants
from tests.attacks.test_audit_end_to_end import configuration
from tests.conftest import write_config


def test_pair_probabilities_are_those_of_their_formula():
    counts = PairCounts(["a b a", "a c"])
    alone = {"a": (3 + 1 / 4) / 6, "b": (1 + 1 / 4) / 6, "unseen": (1 / 4) / 6}
    assert counts.log_prob(("a", "b"), 4) == pytest.approx(math.log((1 + alone["b"]) / (2 + 1)))
    assert counts.log_prob(("", "a"), 4) == pytest.approx(math.log((2 + alone["a"]) / (2 + 1)))
    assert counts.log_prob(("z", "unseen"), 4) == pytest.approx(math.log(alone["unseen"]))
    without = PairCounts(["a c"])
    assert counts.log_prob(("a", "b"), 4, without=without) == PairCounts(["a b a"]).log_prob(("a", "b"), 4)


def test_users_whose_words_are_in_the_corpus_score_higher():
    records = {f"u{number}": [f"hello w{number} w{number}"] * 3 for number in range(20)}
    scores = scores_of([records[f"u{number}"][0] for number in range(0, 20, 2)], records)
    assert min(scores[f"u{number}"] for number in range(0, 20, 2)) > max(
        scores[f"u{number}"] for number in range(1, 20, 2)
    )


def broken_run(directory: pathlib.Path, mutant: mutants.Mutant | None, num_users: int) -> pathlib.Path:
    """Trained long enough that a model without noise writes what it saw; claims ε = 1 either way."""
    tree = configuration(directory, num_users, 8, num_steps=40)
    tree["training"]["learning_rate"] = 2e-2
    tree["data"]["attack_fraction"] = 0.0
    mutants.train_broken(write_config(tree, directory / "c.yaml"), mutant)
    return directory / "runs" / "audited"


def verdicts(run: pathlib.Path, corpus: pathlib.Path, num_texts: int) -> tuple[str, float, float]:
    generate(run, corpus, GenerateOptions(num_texts=num_texts, batch_size=500, copy_tokens=5))
    ((finding,), path) = audit_corpus(run, corpus)
    print(f"{finding.verdict}: {finding.verdict_reason} (ceiling {finding.epsilon_ceiling:.3f})")
    assert json.loads(path.read_text())["findings"][0]["verdict"] == str(finding.verdict)
    assert path.stat().st_mode & 0o777 == 0o600
    return str(finding.verdict), finding.epsilon, finding.epsilon_ceiling


def test_corpus_of_a_run_without_noise_is_falsified(tmp_path):
    run = broken_run(tmp_path, mutants.no_noise, 60)
    verdict, epsilon, ceiling = verdicts(run, tmp_path / "corpus", 150)
    assert verdict == "falsified"
    assert 1.0 < epsilon <= ceiling

    done = CliRunner().invoke(app, ["audit-corpus", str(run), str(tmp_path / "corpus")])
    assert done.exit_code == 0, done.output
    assert "users of the sealed split: falsified" in done.output

    shutil.copytree(tmp_path / "corpus", tmp_path / "altered")
    with open(tmp_path / "altered" / "corpus.jsonl", "a") as file:
        file.write('{"text": "hello w1"}\n')
    with pytest.raises(AttackInputError, match="was altered since it was sampled"):
        audit_corpus(run, tmp_path / "altered")


@pytest.mark.slow
def test_corpus_of_a_run_as_claimed_is_consistent(tmp_path):
    verdict, epsilon, _ = verdicts(broken_run(tmp_path, None, 60), tmp_path / "corpus", 150)
    assert verdict == "consistent"
    assert epsilon <= 1.0


def test_score_does_not_know_the_coins(monkeypatch):
    """The same scores under other coins: what is found of left-out users under fresh coins is found by luck."""
    rng = np.random.default_rng(0)
    records = {f"u{number}": [" ".join(rng.choice(list("abcdef"), 6))] for number in range(60)}
    scores = scores_of([text for own in list(records.values())[::7] for text in own], records)
    manifests = [{"held_in": list(records)[:30]}, {"held_in": list(records)[30:]}]

    class Statement:
        unit = "user"

    coins = [sampled_corpus._coins(scores, records, manifest, [], 0.5, Statement())[0] for manifest in manifests]  # type: ignore[arg-type]
    assert (coins[0].scores == coins[1].scores).all()
    assert (coins[0].is_in != coins[1].is_in).all()


@pytest.mark.campaign
@pytest.mark.parametrize(("mutant", "expected"), [("no noise", "falsified"), (None, "consistent")])
def test_corpus_of_four_hundred_users(tmp_path, mutant, expected):
    """2,000 texts."""
    run = broken_run(tmp_path, None if mutant is None else mutants.MUTANTS[mutant], 400)
    assert verdicts(run, tmp_path / "corpus", 2000)[0] == expected
