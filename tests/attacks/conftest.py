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
    "num_units": 700,
    "ledger": {"head": "5d" * 32, "num_commits": 60},
    "plan_fingerprint": "a7" * 32,
    "assumptions": ["The secret key of the run stays secret."],
    "not_covered": ["Hyper-parameters chosen on private rows."],
}


def build_rows(
    num_units: int, *, shift: float, seed: int = 0, num_documents: int = 3, noise: float = 0.1
) -> list[signals.DocumentSignals]:
    """Users of both sides whose fine-tuning gain per token is normal with the given shift of the held-in mean."""
    rng = np.random.default_rng(seed)
    rows = []
    for side, mean in ((signals.HELD_IN, 0.1 + shift), (signals.HELD_OUT, 0.1)):
        for number in range(num_units):
            gain = rng.normal(mean, noise)
            for document in range(num_documents):
                base = -rng.gamma(2.0, 1.5, size=rng.integers(5, 60))
                target = np.minimum(base + gain + rng.normal(0, 0.05, base.size), 0.0)
                rows.append(
                    signals.DocumentSignals(f"pseudonym-{side}-{number:04d}", f"doc-{document}", side, target, base)
                )
    return rows


@pytest.fixture
def make_rows() -> Callable[..., list[signals.DocumentSignals]]:
    return build_rows


@pytest.fixture
def make_run(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Writes a finished, scored run; keyword arguments replace keys of the privacy statement."""

    def make(
        num_units: int = 40, *, shift: float = 0.02, name: str = "run", perplexity: bool = True, **changes: object
    ) -> pathlib.Path:
        run = tmp_path / name
        run.mkdir()
        statement = copy.deepcopy(STATEMENT) | changes
        (run / "privacy.json").write_text(json.dumps(statement))
        metrics = [{"train/step": 0}, {"train/step": 0}, {"train/step": 60, "privacy/epsilon": 7.99}]
        if perplexity:
            metrics[0] |= {"eval/held_out_perplexity": 31.4}
            metrics[2] |= {"eval/held_out_perplexity": 22.05}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        if num_units:
            signals.write_signals(run / signals.SIGNALS_PATH, build_rows(num_units, shift=shift))
        return run

    return make
