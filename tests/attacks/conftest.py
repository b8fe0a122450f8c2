from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from attacks import signals

STATEMENT = {
    "schema": "privtrain/privacy/1",
    "private": True,
    "not_private_reasons": [],
    "unit": "user",
    "neighboring_relation": "add_or_remove_one",
    "contribution_bound": {"records_per_unit_per_step": 4, "selection": "random"},
    "sampling": {"scheme": "poisson", "sampling_prob": 0.05},
    "mechanism": {
        "kind": "gaussian",
        "noise_multiplier": 0.8,
        "clipping_norm": 1.0,
        "clipping_style": "flat",
        "expected_batch_size": 32,
    },
    "num_steps": 60,
    "steps_released": 60,
    "epsilon": 7.99,
    "delta": 1e-4,
    "accountants": [
        {
            "method": "pld",
            "kind": "certified_upper",
            "lower": 0.0,
            "estimate": 7.99,
            "upper": 7.99,
            "version": "dp-accounting 0.6.0",
        }
    ],
    "ledger": {"head": "5d" * 32, "num_commits": 60},
    "plan_fingerprint": "a7" * 32,
    "assumptions": ["The secret key of the run stays secret."],
    "not_covered": ["Hyper-parameters chosen on private rows."],
}


def build_rows(
    num_units: int,
    *,
    shift: float,
    seed: int = 0,
    num_documents: int = 3,
    noise: float = 0.1,
    rich: bool = False,
    shifted: bool = False,
) -> list[signals.DocumentSignals]:
    """Users of both sides whose fine-tuning gain per token is normal with the given shift of the held-in mean.

    ``rich`` adds every signal and training records, ``shifted`` lets the sides use different words.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for side, mean in ((signals.HELD_IN, 0.1 + shift), (signals.HELD_OUT, 0.1)):
        for number in range(num_units):
            gain = rng.normal(mean, noise)
            user = f"pseudonym-{side}-{number:04d}"
            facts = {"user_num_records": 3 + number % 17, "user_num_bytes": 500 + 31 * (number % 17)}
            for document in range(num_documents):
                base = -rng.gamma(2.0, 1.5, size=rng.integers(5, 60))
                target = np.minimum(base + gain + rng.normal(0, 0.05, base.size), 0.0)
                more = {}
                if rich:
                    more = rich_signals(rng, base.size, words=50, first=20 * (shifted and side == signals.HELD_IN))
                    more |= facts | {"kind": signals.TRAINING if document == num_documents - 1 else signals.FRESH}
                rows.append(signals.DocumentSignals(user, f"doc-{document}", side, target, base, **more))
    return rows


def rich_signals(rng: np.random.Generator, size: int, *, words: int, first: int) -> dict[str, object]:
    """Everything but the log-probabilities, drawn at random."""
    return {
        **{f"{model}_correct": rng.random(size) < 0.4 for model in ("target", "base")},
        **{f"{model}_mean": -rng.random(size) for model in ("target", "base")},
        **{f"{model}_variance": rng.random(size) for model in ("target", "base")},
        "token_ids": first + rng.integers(0, words, size),
        "sensitive": rng.random(size) < 0.2,
        "num_bytes": 5 * size,
        "zlib_bytes": 3 * size,
        "language": "en",
    }


@pytest.fixture
def make_rows() -> Callable[..., list[signals.DocumentSignals]]:
    return build_rows


@pytest.fixture
def make_run(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Writes a finished, scored run; keyword arguments replace keys of the privacy statement."""

    def make(
        num_units: int = 40,
        *,
        shift: float = 0.02,
        name: str = "run",
        perplexity: bool = True,
        rich: bool = False,
        shifted: bool = False,
        **changes: object,
    ) -> pathlib.Path:
        run = tmp_path / name
        run.mkdir()
        statement = copy.deepcopy(STATEMENT) | changes
        (run / "privacy.json").write_text(json.dumps(statement))
        metrics = [{"train/step": 0}, {"train/step": 0}, {"train/step": 60, "privacy/epsilon": 7.99}]
        if perplexity:
            metrics[0] |= {"eval/held_out_perplexity": 31.4}
            metrics[2] |= {"eval/held_out_perplexity": 22.05}
        run.joinpath("secret").mkdir(exist_ok=True)
        (run / "secret" / "config.yaml").write_text("data: {held_out_fraction: 0.5}\n")
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        if num_units:
            signals.write_signals(
                run / signals.SIGNALS_PATH, build_rows(num_units, shift=shift, rich=rich, shifted=shifted)
            )
        return run

    return make
