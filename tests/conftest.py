"""Fixtures: a tiny random Llama with a byte-level tokenizer, made on the spot, and a data set of invented users."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import hypothesis
import numpy as np
import pytest
import yaml

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# PEFT imports bitsandbytes, which compiles what no CPU runs: a seventh of all that a process imports.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Threads that wait for one another would spin on cores that the other worker needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A busy machine is no reason to fail; a fixture that a property shares between examples holds nothing of one.
hypothesis.settings.register_profile(
    "privtrain", deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
hypothesis.settings.load_profile("privtrain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: in the end short ones are left, and no worker waits long for the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def save_llama(directory: pathlib.Path, core: Any, **shape: Any) -> pathlib.Path:
    """A random Llama, 32 wide, for a tokenizer whose token 0 marks begin and end; always the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", bos_token="<end>", pad_token="<end>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=core.get_vocab_size(), hidden_size=32, bos_token_id=0, eos_token_id=0, **shape)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def byte_core(*marks: str) -> Any:
    """The core of a byte tokenizer: the marks come first, then every byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core: Any = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def save_tiny_llama(directory: pathlib.Path, num_layers: int = 2) -> pathlib.Path:
    """258 tokens: every byte, one begin-and-end mark and one spare."""
    return save_llama(
        directory,
        byte_core("<end>"),
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )


@pytest.fixture
def no_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes after it: it takes half of a tiny job's time, and has tests of its own.

    Ranks that ``tests.cluster`` forks leave it out too.
    """
    from tests.unproven import pack_as_proven

    monkeypatch.setattr("privtrain.job.train._self_test", pack_as_proven)
    monkeypatch.setenv("TESTS_LEAVE_OUT_SELF_TEST", "1")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def write_users(path: pathlib.Path, num_users: int = 24, seed: int = 0) -> pathlib.Path:
    """Users with one to nine records of unequal length."""
    rng = np.random.default_rng(seed)
    words = ["alder", "birch", "cedar", "elm", "fir", "gorse", "hazel", "ivy", "larch", "maple"]
    with open(path, "w", encoding="utf-8") as file:
        for user in range(num_users):
            for _ in range(1 + user % 9):
                text = " ".join(rng.choice(words, size=rng.integers(1, 6)))
                file.write(json.dumps({"user": f"user-{user:03d}", "text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def users_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_users(tmp_path_factory.mktemp("data") / "users.jsonl")


@pytest.fixture
def tree(tiny_llama: pathlib.Path, users_file: pathlib.Path, tmp_path: pathlib.Path) -> dict[str, Any]:
    """A complete configuration over the tiny model; change it and hand it to ``write_config``."""
    return tiny_tree(tiny_llama, users_file, tmp_path / "runs")


def tiny_tree(model: pathlib.Path, users: pathlib.Path, output: pathlib.Path) -> dict[str, Any]:
    """The configuration of the fixture ``tree``, for fixtures of wider scope."""
    return {
        "run": {"name": "tiny", "output_dir": str(output)},
        "model": {"name_or_path": str(model)},
        "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "source": {"kind": "files", "paths": [str(users)]},
            "max_length": 24,
            "held_out_fraction": 0.3,
            "attack_min_records": 4,
            "num_evaluation_records": 6,
        },
        "privacy": {
            "records_per_user": 3,
            "sampling_prob": 0.4,
            "expected_batch_size": 6,
            "noise_multiplier": 1.0,
            "target_delta": 1e-3,
            "num_steps": 4,
            "insecure_seed": 7,
        },
        "training": {"learning_rate": 1e-2},
        "performance": {"microbatch_size": 4, "precision": "fp32", "num_threads": 1, "checkpoint_interval_steps": 2},
        "tracking": {"wandb": False},
    }


def write_config(tree: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path
