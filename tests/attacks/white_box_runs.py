"""Runs of a few users and many gradient canaries, honest and with one thing wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any
from unittest import mock

import numpy as np
import torch

from attacks.analysis import verdict
from attacks.analysis.audit import panel, white_box
from attacks.analysis.audit.evaluate import Claim, Finding, audit
from attacks.rundir import read_statement
from privtrain.backends.base import ReplicatedBackend
from privtrain.run.directory import RunDirectory
from tests.attacks import mutants
from tests.conftest import byte_core, write_config

Mutant = mutants.Mutant


def save_half_million(directory: pathlib.Path, **shape: int) -> pathlib.Path:
    """A byte Llama of about half a million weights; smaller by ``shape``."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = byte_core("<end>")
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", bos_token="<end>", pad_token="<end>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 432, "num_hidden_layers": 2} | shape
    config = LlamaConfig(
        vocab_size=core.get_vocab_size(),
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def configuration(
    directory: pathlib.Path, users: pathlib.Path, num_canaries: int, epsilon: float, **shape: int
) -> dict[str, Any]:
    """Full fine-tuning with many gradient canaries; each step draws half of them."""
    return {
        "run": {"name": "audited", "output_dir": str(directory / "runs")},
        "model": {"name_or_path": str(save_half_million(directory / "model", **shape))},
        "data": {
            "source": {"kind": "files", "paths": [str(users)]},
            "max_length": 24,
            "held_out_fraction": 0.5,
            "attack_fraction": 0.1,
            "attack_min_records": 4,
            "num_evaluation_records": 2,
        },
        "canaries": {"num_gradient_users": num_canaries},
        "audit": {"keep_noised_sums": True},
        "privacy": {
            "records_per_user": 1,
            "sampling_prob": 0.5,
            "expected_batch_size": num_canaries / 4,
            "target_epsilon": epsilon,
            "target_delta": 1e-5,
            "clipping_norm": 1.0,
            "num_steps": 10,
        },
        "training": {"method": "full", "learning_rate": 1e-4},
        "performance": {
            "microbatch_size": 16,
            "precision": "fp32",
            "num_threads": 1,
            "checkpoint_interval_steps": 1000,
        },
        "tracking": {"wandb": False},
    }


def audited(tree: dict[str, Any], directory: pathlib.Path, mutant: Mutant | None, seed: int = 0) -> Finding:
    """Train without the self-test, and audit the gradient canaries as the analysis does."""
    mutants.train_broken(write_config(tree, directory / "c.yaml"), mutant or (lambda stack: None), seed=seed)
    return finding_of(directory / "runs" / "audited")


def finding_of(run: pathlib.Path) -> Finding:
    """Audit a finished run's gradient canaries alone."""
    statement = read_statement(run)
    coins = white_box.gradient_coins(RunDirectory(run), statement)
    assert coins is not None
    claim = panel.claim_of(statement, verdict.Cap.of(statement, 1), coins.unit)
    return audit(coins, claim, statement.delta, seed=0, num_sources=2)


def null_findings(run: pathlib.Path, num: int) -> list[Finding]:
    """Audit the canaries that were left out of a finished run under fresh coins: whatever is found is found by luck."""
    coins = white_box.gradient_coins(RunDirectory(run), read_statement(run))
    assert coins is not None
    scores, found = coins.scores[~coins.is_in], []
    for seed in range(num):
        is_in = np.random.default_rng(seed).random(scores.size) < 0.5
        fresh = dataclasses.replace(coins, scores=scores, is_in=is_in)
        found.append(audit(fresh, Claim(None, None, ""), 1e-5, seed=0))
    return found


def half_the_noise(stack: contextlib.ExitStack) -> None:
    """The noise is divided by the number of ranks, of which there are two."""
    honest = ReplicatedBackend.add_noise

    def add_noise(self, total, layout, noise, *, exponent, stddev, history=None):
        return honest(self, total, layout, noise, exponent=exponent, stddev=stddev / 2)

    stack.enter_context(mock.patch.object(ReplicatedBackend, "add_noise", add_noise))


def noise_used_twice(stack: contextlib.ExitStack) -> None:
    """Every second step adds the noise of the step before again."""
    honest = ReplicatedBackend.add_noise
    kept: list[torch.Tensor] = []

    def add_noise(self, total, layout, noise, *, exponent, stddev, history=None):
        bare = honest(self, total, layout, noise, exponent=exponent, stddev=0.0)
        if kept:
            return bare + kept.pop()
        noised = honest(self, total, layout, noise, exponent=exponent, stddev=stddev)
        kept.append(noised - bare)
        return noised

    stack.enter_context(mock.patch.object(ReplicatedBackend, "add_noise", add_noise))


BROKEN: dict[str, Mutant] = {
    "no noise": mutants.no_noise,
    "clip skipped": mutants.clip_skipped,
    "k ignored": mutants.k_ignored,
    "noise divided by the ranks": half_the_noise,
    "one noise on two steps": noise_used_twice,
}
