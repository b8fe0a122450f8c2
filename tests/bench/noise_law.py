"""Measure what noise, batch, steps, rank and learning rate do to a small model: the table behind ``plan --optimize``.

``python -m tests.bench.noise_law DIRECTORY [PURPOSE...]`` adds to ``privtrain/privacy/noise_law.csv`` what it lacks;
delete the file to measure everything again (about half an hour of one core). The base model and the data are those of
``privtrain study user-level-dp``: a Llama of half a million weights trained on Shakespeare's plays, and synthetic
customers. Every run is the product's own trainer under a public seed, which decides users, initial weights and noise.

Purposes: ``fit`` (steps x noise x learning rate, at one batch), ``rank`` and ``records`` (the same for other ranks, and
for other numbers of records of a user in a step) are what the law is fitted to; ``grid`` (one compute budget and one ε,
over batch, bands and learning rate) is what it is judged by; its regret is printed last.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import itertools
import math
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from privtrain.config import Config, validate
from privtrain.config.privacy import PrivacySection
from privtrain.data.invented_customers import customer_records, write_customers
from privtrain.privacy import noise_law
from privtrain.privacy.noise_law import Measured, Setting
from privtrain.privacy.plan import PrivacyPlan
from tests.bench.trained import Bench

TABLE = pathlib.Path(noise_law.__file__).with_suffix(".csv")
BASE_SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "recipes" / "studies" / "user-level-dp" / "base_model.py"
NUM_USERS, HELD_OUT, MAX_LENGTH = 2000, 0.2, 24

#: Of ``grid``: user-draws of a run, and the guarantee.
DRAWS, EPSILON, DELTA = 2048, 4.0, 1e-5
GRID_RATES = (3e-3, 1e-2, 3e-2, 1e-1)


def settings(purpose: str) -> Iterator[Setting]:
    """Yield what a purpose measures."""
    if purpose == "fit":
        for seed, steps, noise in itertools.product((0, 1), (8, 24, 72, 200), (0.0, 0.1, 0.25, 0.7, 2.0)):
            for rate in _rates(steps, noise):
                yield Setting(purpose, steps, 8, noise, 1, 4, 1, rate, seed)
    elif purpose == "rank":
        for rank, noise in itertools.product((1, 4, 16), (0.1, 0.7)):
            for rate in _rates(32, noise):
                yield Setting(purpose, 32, 8, noise, 1, rank, 1, rate, 0)
    elif purpose == "records":
        for records, noise in itertools.product((2, 4), (0.1, 0.7)):
            for rate in _rates(32, noise):
                yield Setting(purpose, 32, 8, noise, 1, 4, records, rate, 0)
    elif purpose == "grid":
        for steps, bands in itertools.product((8, 16, 32, 64, 128, 256), (1, 4, 8)):
            if bands * DRAWS / steps > NUM_USERS * (1 - HELD_OUT):
                continue  # more groups than a step's probability allows
            noise = _calibrated(steps, DRAWS // steps, bands)
            for rate in GRID_RATES:
                yield Setting(purpose, steps, DRAWS // steps, noise, bands, 4, 1, rate, 0)
    else:
        raise SystemExit(f"{purpose}: one of fit, rank, records, grid")


def _rates(num_steps: int, noise: float) -> list[float]:
    """Return learning rates around what short runs liked; the best one should be inside."""
    middle = 2e-2 * (32 / num_steps) ** 0.5 / (1 + noise) ** 0.5
    return [float(f"{middle * 2.5**k:.3g}") for k in (-1.5, -0.5, 0.5, 1.5)]


def _section(steps: int, batch: int, bands: int, records: int = 1, **noise: float) -> dict[str, Any]:
    section: dict[str, Any] = {
        "records_per_user": records,
        "sampling_prob": batch / (NUM_USERS * (1 - HELD_OUT)),
        "expected_batch_size": batch,
        "target_delta": DELTA,
        "num_steps": steps,
        **noise,
    }
    return section | ({"noise": "banded", "num_bands": bands} if bands > 1 else {})


def _calibrated(steps: int, batch: int, bands: int) -> float:
    section = PrivacySection(**_section(steps, batch, bands, target_epsilon=EPSILON), accountant="tilted")
    return PrivacyPlan.uncertified(section).noise_multiplier


def make_inputs(directory: pathlib.Path) -> None:
    """Write the customers and the base model into a directory that may have them already."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "customers.jsonl").exists():
        write_customers(directory / "customers.jsonl", customer_records(NUM_USERS, seed=0, mean_records=8.0))
    if not (directory / "base").exists():
        subprocess.run([sys.executable, str(BASE_SCRIPT), str(directory / "base")], check=True)


class Measuring:
    """The trainings of the table, with model and data loaded once for each rank and seed."""

    def __init__(self, directory: pathlib.Path) -> None:
        make_inputs(directory)
        self._directory = directory
        self._loaded: tuple[tuple[int, int], Bench] | None = None

    def _config(self, setting: Setting) -> Config:
        section = _section(
            setting.num_steps,
            setting.batch,
            setting.num_bands,
            setting.records_per_user,
            noise_multiplier=setting.noise_multiplier,
        )
        rows = min(64, setting.batch * setting.records_per_user * 3 // 2)
        return validate(
            {
                "run": {"name": "noise-law", "output_dir": str(self._directory)},
                "model": {"name_or_path": str(self._directory / "base")},
                "lora": {"rank": setting.rank, "alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
                "data": {
                    "source": {"kind": "files", "paths": [str(self._directory / "customers.jsonl")]},
                    "max_length": MAX_LENGTH,
                    "held_out_fraction": HELD_OUT,
                    "attack_fraction": 0.0,
                    "num_evaluation_records": 256,
                },
                "privacy": {**section, "insecure_seed": setting.seed},
                "training": {"learning_rate": setting.learning_rate, "schedule": "linear"},
                "performance": {"microbatch_size": rows, "precision": "fp32"},
                "tracking": {"wandb": False},
            }
        )

    def measure(self, setting: Setting) -> Measured:
        """Train and return what came of it."""
        config = self._config(setting)
        if self._loaded is None or self._loaded[0] != (setting.rank, setting.seed):
            self._loaded = (setting.rank, setting.seed), Bench(config, setting.seed)
        bench = self._loaded[1]
        plan, loss = bench.train(config, "noise law")
        relative_noise = plan.noise_of_run(config.training) * math.sqrt(bench.num_trained)
        return Measured(
            **dataclasses.asdict(setting),
            num_trained=bench.num_trained,
            relative_noise=float(f"{relative_noise:.6g}"),
            loss_before=round(bench.loss_before, 5),
            loss=round(loss, 5),
        )


def regret(rows: Sequence[Measured]) -> str:
    """Return what the law's choice of batch, bands and learning rate loses against the best cell of the grid.

    The law chooses among the settings of the grid, and the tried rate nearest to its own; only whole settings count.
    """
    law = noise_law.fitted()
    cells = [row for row in rows if row.purpose == "grid"]
    settings_of = collections.defaultdict(list)
    for row in cells:
        settings_of[row.num_steps, row.num_bands].append(row)
    whole = {key: tried for key, tried in settings_of.items() if len(tried) == len(GRID_RATES)}
    if not whole:
        return f"{len(cells)} cells of the grid: no setting is whole"

    def is_offered(num_steps: int, num_bands: int) -> bool:
        alone = settings_of[num_steps, 1][0]
        return num_bands == 1 or alone.noise_multiplier / alone.batch * math.sqrt(alone.num_trained) > 1

    offered = {key: tried for key, tried in whole.items() if is_offered(*key)}
    chosen = max(offered.values(), key=lambda tried: law.gain(tried[0].point))
    rate = law.learning_rate(chosen[0].point)
    row = min(chosen, key=lambda row: abs(math.log(row.learning_rate / rate)))
    best = min((row for tried in whole.values() for row in tried), key=lambda row: row.loss)
    lost = (row.loss - best.loss) / (best.loss_before - best.loss)
    return (
        f"{sum(map(len, whole.values()))} cells of {sum(1 for _ in settings('grid'))}: the law takes {row.num_steps} "
        f"steps, {row.num_bands} bands, rate {row.learning_rate:g}: loss {row.loss:.4f}; best {best.num_steps} steps, "
        f"{best.num_bands} bands, rate {best.learning_rate:g}: loss {best.loss:.4f}; regret {lost:.1%} of the gap"
    )


def main() -> None:
    """Measure what the table lacks, one row after another."""
    directory, purposes = pathlib.Path(sys.argv[1]), sys.argv[2:] or ["fit", "rank", "records", "grid"]
    names = [field.name for field in dataclasses.fields(Measured)]
    known = {
        Setting(**{f.name: getattr(row, f.name) for f in dataclasses.fields(Setting)}) for row in noise_law.table()
    }
    bench = Measuring(directory)
    wanted = [setting for purpose in purposes for setting in settings(purpose) if setting not in known]
    wanted.sort(key=lambda setting: setting.seed)  # one seed of everything first
    is_new = not TABLE.exists()
    with open(TABLE, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for number, setting in enumerate(wanted, start=1):
            row = bench.measure(setting)
            writer.writerow(dataclasses.asdict(row))
            file.flush()
            print(f"{number}/{len(wanted)} {row}", flush=True)
    noise_law.table.cache_clear()
    print(regret(noise_law.table()))


if __name__ == "__main__":
    main()
