from __future__ import annotations

import copy
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attacks import evidence, signals
from attacks.analysis import analyse
from attacks.reporting import record, report
from privtrain.files.private import make_private_directory
from privtrain.run.directory import RunDirectory

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
    "split_commitment": "c0" * 32,
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


def put_signals(
    run: pathlib.Path,
    rows: list[signals.DocumentSignals],
    *,
    prob_held_in: float | None = 0.5,
    shadow: int | None = None,
) -> pathlib.Path:
    """Writes and seals signals as scoring would, of a target that nobody trained or of a shadow of it."""
    path = run / (signals.SIGNALS_PATH if shadow is None else signals.REFERENCES_PATH / f"shadow-{shadow}.parquet")
    signals.write_signals(path, rows)
    facts = {
        "options": {"sampling": "temperature=1,top_k=40,top_p=1", "num_training_records": 2},
        "target": {"statement": "", "released": {"adapter": f"model {shadow}"}, "base": {}, "precision": "fp32"},
        "documents": {},
        "prob_held_in": prob_held_in,
    }
    record.write_scoring(RunDirectory(run), path, facts)
    return path


@pytest.fixture
def make_rows() -> Callable[..., list[signals.DocumentSignals]]:
    return build_rows


@pytest.fixture
def make_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pathlib.Path]:
    """Writes a finished, scored run; keyword arguments replace keys of the privacy statement.

    Nobody trained it, so it has no release, no target and no coins to be compared with; its seals are real.
    """
    monkeypatch.setattr(evidence, "check_release", lambda run: None)
    monkeypatch.setattr(evidence, "check_target", lambda *_: None)
    monkeypatch.setattr(analyse, "check_documents", lambda scoring: None)

    def make(
        num_units: int = 40,
        *,
        shift: float = 0.02,
        name: str = "run",
        perplexity: bool = True,
        rich: bool = False,
        shifted: bool = False,
        prob_held_in: float | None = 0.5,
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
        make_private_directory(run / "secret")
        RunDirectory(run).create_key("root")
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        if num_units:
            put_signals(run, build_rows(num_units, shift=shift, rich=rich, shifted=shifted), prob_held_in=prob_held_in)
        return run

    return make


@pytest.fixture(scope="session")
def analysed_runs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Analysed and reported runs by what made them; copied, never changed."""
    return tmp_path_factory.mktemp("analysed")


@pytest.fixture
def analysed(
    make_run: Callable[..., pathlib.Path], analysed_runs: pathlib.Path, tmp_path: pathlib.Path
) -> Callable[..., pathlib.Path]:
    """Writes and analyses a run as ``make_run`` does; equal arguments are analysed once a session."""

    def make(num_units: int = 40, **arguments: Any) -> pathlib.Path:
        def make_analysed() -> pathlib.Path:
            run = make_run(num_units, **arguments)
            analyse.analyse_run(run)
            return run

        kept = analysed_runs / _digest(num_units, arguments)
        return _copied(kept, make_analysed, tmp_path / arguments.get("name", "run"))

    return make


@pytest.fixture
def reported(
    analysed: Callable[..., pathlib.Path], analysed_runs: pathlib.Path, tmp_path: pathlib.Path
) -> Callable[..., pathlib.Path]:
    """As ``analysed``, with the report, which is written once for equal arguments."""

    def make(num_units: int = 40, **arguments: Any) -> pathlib.Path:
        def make_reported() -> pathlib.Path:
            run = analysed(num_units, **arguments)
            report.write_report(run)
            return run

        kept = analysed_runs / f"reported-{_digest(num_units, arguments)}"
        return _copied(kept, make_reported, tmp_path / arguments.get("name", "run"))

    return make


def _digest(num_units: int, arguments: dict[str, Any]) -> str:
    return hashlib.sha256(repr((num_units, sorted(arguments.items()))).encode()).hexdigest()


def _copied(kept: pathlib.Path, make: Callable[[], pathlib.Path], place: pathlib.Path) -> pathlib.Path:
    """A copy of what is kept; what is not there yet is made, and a copy of it kept."""
    if kept.exists():
        return shutil.copytree(kept, place)
    made = make()
    shutil.copytree(made, kept)
    return made
