"""Measure what noise, batch, steps, rank and learning rate do to a small model: the table behind ``plan --optimize``.

``python -m tests.bench.noise_law DIRECTORY [PURPOSE...]`` adds to ``privtrain/privacy/noise_law.csv`` what it lacks;
delete the file to measure everything again (about half an hour of one core). The base model and the data are those of
``privtrain study user-level-dp``: a Llama of half a million weights trained on Shakespeare's plays, and synthetic
customers. Every run is the product's own trainer under a public seed, which decides users, initial weights and noise.

Purposes: ``fit`` (steps x noise x learning rate, at one batch), ``batch``, ``rank``, ``records`` and ``bands`` (the
same for other batches, ranks, records of a user in a step, and bands) are what the law is fitted to. ``grid``,
``other-grid`` and ``last-grid`` (one compute budget and one ε each, over batch, bands and learning rate), ``choice``,
``other-choice`` and ``last-choice`` (what the law takes of each grid, at the law's own learning rate) are what it is
judged by; the regrets are printed last. A grid and its choice need the same base model: where that was trained again,
delete their rows.
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

from privtrain.commands.optimize import Choice, ranked
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

DELTA = 1e-5
#: Grid → user-draws of a run and ε.
GRIDS = {"grid": (2048, 4.0), "other-grid": (1024, 8.0), "last-grid": (4096, 1.0)}
#: What the law takes → of which grid.
CHOICES = {"choice": "grid", "other-choice": "other-grid", "last-choice": "last-grid"}
GRID_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
PURPOSES = ("fit", "batch", "rank", "records", "bands", *itertools.chain(*zip(GRIDS, CHOICES, strict=True)))


def settings(purpose: str) -> Iterator[Setting]:
    """Yield what a purpose measures."""
    if purpose == "fit":
        for seed, steps, noise in itertools.product((0, 1), (8, 24, 72, 200), (0.0, 0.1, 0.25, 0.7, 2.0)):
            for rate in _rates(steps, noise):
                yield Setting(purpose, steps, 8, noise, 1, 4, 1, rate, seed)
    elif purpose == "batch":
        shapes = ((8, 64), (24, 64), (72, 64), (8, 256), (24, 256))
        for (steps, batch), noise in itertools.product(shapes, (0.06, 0.25, 0.7)):
            for rate in _rates(steps, noise):  # the multiplier grows with the batch: the noise in the mean stays
                yield Setting(purpose, steps, batch, noise * batch / 8, 1, 4, 1, rate, 0)
    elif purpose == "rank":
        for rank, noise in itertools.product((1, 4, 16), (0.1, 0.7)):
            for rate in _rates(32, noise):
                yield Setting(purpose, 32, 8, noise, 1, rank, 1, rate, 0)
    elif purpose == "records":
        for records, noise in itertools.product((2, 4), (0.1, 0.7)):
            for rate in _rates(32, noise):
                yield Setting(purpose, 32, 8, noise, 1, 4, records, rate, 0)
    elif purpose == "bands":
        few = itertools.product((24, 72, 200), (4, 8), (0.25, 0.7, 2.0))
        many = itertools.product((64,), (16, 32), (0.7, 2.0)), itertools.product((192,), (16, 64), (0.7, 2.0))
        for steps, bands, noise in itertools.chain(few, *many):
            for rate in _rates(steps, noise):
                yield Setting(purpose, steps, 8, noise, bands, 4, 1, float(f"{2 * rate:.3g}"), 0)
    elif purpose in GRIDS:
        draws, epsilon = GRIDS[purpose]
        for steps, bands in itertools.product((8, 16, 32, 64, 128, 256), (1, 4, 8)):
            if bands * draws / steps > NUM_USERS * (1 - HELD_OUT):
                continue  # more groups than a step's probability allows
            noise = _calibrated(steps, draws // steps, bands, epsilon)
            for rate in GRID_RATES:
                yield Setting(purpose, steps, draws // steps, noise, bands, 4, 1, rate, 0)
    elif purpose in CHOICES:
        yield choice(noise_law.table(), purpose)
    else:
        raise SystemExit(f"{purpose}: one of {', '.join(PURPOSES)}")


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


def _calibrated(steps: int, batch: int, bands: int, epsilon: float) -> float:
    section = PrivacySection(**_section(steps, batch, bands, target_epsilon=epsilon), accountant="tilted")
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
            noise_kept=float(f"{plan.noise_kept(config.training):.6g}"),
            loss_before=round(bench.loss_before, 5),
            loss=round(loss, 5),
        )


def choice(rows: Sequence[Measured], purpose: str) -> Setting:
    """Return what the law takes of a grid, by the rule of ``plan --optimize``, at the law's own learning rate."""
    grid = CHOICES[purpose]
    settings_of = _settings_of(rows, grid)
    if len(settings_of) * len(GRID_RATES) < sum(1 for _ in settings(grid)):
        raise SystemExit(f"measure the whole grid first: python -m tests.bench.noise_law DIRECTORY {grid}")
    some = [tried[0] for tried in settings_of.values()]
    _, best = ranked([_choice(row) for row in some], some[0].num_trained)
    row = settings_of[best.num_steps, best.num_bands][0]
    given = {field.name: getattr(row, field.name) for field in dataclasses.fields(Setting)}
    return Setting(**given | {"purpose": purpose, "learning_rate": best.learning_rate})


def _choice(row: Measured) -> Choice:
    """Return a setting as ``plan --optimize`` compares it."""
    law = noise_law.fitted()
    return Choice(
        num_steps=row.num_steps,
        batch=row.batch,
        records_per_unit=row.records_per_user,
        num_bands=row.num_bands,
        sampling_prob=row.batch / (NUM_USERS * (1 - HELD_OUT)),
        noise_multiplier=row.noise_multiplier,
        relative_noise=row.relative_noise,
        predicted_gain=law.gain(row.point),
        learning_rate=float(f"{law.learning_rate(row.point):.3g}"),
    )


def _settings_of(rows: Sequence[Measured], grid: str) -> dict[tuple[int, int], list[Measured]]:
    """Return the rows of each (steps, bands) of a grid whose learning rates were all tried."""
    found = collections.defaultdict(list)
    for row in rows:
        if row.purpose == grid:
            found[row.num_steps, row.num_bands].append(row)
    return {key: tried for key, tried in found.items() if len(tried) == len(GRID_RATES)}


def regret(rows: Sequence[Measured], purpose: str) -> str:
    """Return what the law's choice of batch, bands and learning rate loses against the best cell of a grid."""
    chosen = [row for row in rows if row.purpose == purpose]
    tried = [row for tried in _settings_of(rows, CHOICES[purpose]).values() for row in tried]
    if not chosen or not tried:
        return f"{CHOICES[purpose]}: {len(tried)} cells, {len(chosen)} choices: no regret yet"
    row, best = chosen[0], min(tried, key=lambda row: row.loss)
    lost = (row.loss - best.loss) / (best.loss_before - best.loss)
    return (
        f"{CHOICES[purpose]}: {len(tried)} cells; the law takes {row.num_steps} steps, {row.num_bands} bands, rate "
        f"{row.learning_rate:g}: loss {row.loss:.4f}; best {best.num_steps} steps, {best.num_bands} bands, rate "
        f"{best.learning_rate:g}: loss {best.loss:.4f}; regret {lost:.1%} of the gap"
    )


def main() -> None:
    """Measure what the table lacks, one row after another."""
    directory, purposes = pathlib.Path(sys.argv[1]), sys.argv[2:] or PURPOSES
    names = [field.name for field in dataclasses.fields(Measured)]
    bench = Measuring(directory)
    if not TABLE.exists():
        TABLE.write_text(",".join(names) + "\n", encoding="utf-8")
    for purpose in purposes:
        noise_law.table.cache_clear()
        noise_law.fitted.cache_clear()
        known = {
            Setting(**{f.name: getattr(row, f.name) for f in dataclasses.fields(Setting)}) for row in noise_law.table()
        }
        wanted = sorted((s for s in settings(purpose) if s not in known), key=lambda setting: setting.seed)
        with open(TABLE, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            for number, setting in enumerate(wanted, start=1):
                row = bench.measure(setting)
                writer.writerow(dataclasses.asdict(row))
                file.flush()
                print(f"{purpose} {number}/{len(wanted)} {row}", flush=True)
    noise_law.table.cache_clear()
    for purpose in CHOICES:
        print(regret(noise_law.table(), purpose))


if __name__ == "__main__":
    main()
