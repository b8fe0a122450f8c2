"""Train the same users with old defaults, optimised plans, correlated noise, and no noise; print what is won back.

``python -m tests.bench.more_per_epsilon DIRECTORY CORPUS [ARM...]`` adds a row to DIRECTORY/results.csv for each
training that it lacks, all arms of a seed before the next seed, and may be stopped at any time. Corpora: ``demo``
(that recipe, ten core minutes a training) and ``customers-1`` to ``customers-8`` (synthetic customers at that ε and a
Llama of half a million weights, half a core minute a training).

Arms spend the same number of records, and split, records and initial weights are the seed's alone, so that differences
between arms are paired. Arms: ``old`` (the plan before there was ``plan --optimize``), ``rate`` (the same with the
learning rate of the law), ``optimised`` and ``banded`` (``plan --optimize`` without and with correlated noise),
``none`` (the plan of ``optimised`` without noise, at the law's rate for none).
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from privtrain.commands.optimize import optimize
from privtrain.config import Config, load_config, validate
from privtrain.privacy.noise_law import Point, fitted
from tests.bench import noise_law
from tests.bench.trained import Bench

RECIPE = pathlib.Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
ARMS = ("old", "rate", "optimised", "banded", "none")
SEEDS = {"demo": 1, "customers": 5}
#: Of synthetic customers: training users, user-draws of a run, and the old plan's steps and rate.
NUM_TRAINED_ON, DRAWS, OLD_STEPS, OLD_RATE = 1600, 4096, 128, 2e-3
#: Two-sided 95 % quantiles of Student's t by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclasses.dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        corpus, arm, seed: which.
        plan: steps x batch x records of a user, bands, learning rate.
        loss_before, loss: of the evaluation records, in nats a token.
        seconds: of training and one evaluation.
    """

    corpus: str
    arm: str
    seed: int
    plan: str
    loss_before: float
    loss: float
    seconds: float


def demo(seed: int) -> Config:
    """Return the demo's recipe without canaries and audit, as it was before ``plan --optimize``."""
    return load_config(
        RECIPE,
        [
            "canaries.num_users=0",
            "canaries.num_gradient_users=0",
            "audit.keep_noised_sums=false",
            "tracking.wandb=false",
            "performance.num_threads=2",
            f"privacy.insecure_seed={seed}",
            *("privacy.num_steps=40", "privacy.expected_batch_size=50", "privacy.sampling_prob=0.06"),
            *("privacy.records_per_user=2", "training.learning_rate=2.0e-3"),
        ],
    )


def customers(directory: pathlib.Path, epsilon: float, seed: int) -> Config:
    """Return a plan for synthetic customers of the kind that people wrote before ``plan --optimize``."""
    batch = DRAWS // OLD_STEPS
    return validate(
        {
            "run": {"name": "more-per-epsilon", "output_dir": str(directory)},
            "model": {"name_or_path": str(directory / "base")},
            "lora": {"rank": 4, "alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            "data": {
                "source": {"kind": "files", "paths": [str(directory / "customers.jsonl")]},
                "max_length": noise_law.MAX_LENGTH,
                "held_out_fraction": noise_law.HELD_OUT,
                "attack_fraction": 0.0,
                "num_evaluation_records": 256,
            },
            "privacy": {
                "records_per_user": 1,
                "sampling_prob": batch / NUM_TRAINED_ON,
                "expected_batch_size": batch,
                "target_epsilon": epsilon,
                "target_delta": noise_law.DELTA,
                "num_steps": OLD_STEPS,
                "insecure_seed": seed,
            },
            "training": {"learning_rate": OLD_RATE, "schedule": "linear"},
            "performance": {"microbatch_size": 48, "precision": "fp32"},
            "tracking": {"wandb": False},
        }
    )


@functools.cache
def changes_of(arm: str, corpus: str, directory: pathlib.Path, num_trained: int) -> dict[str, Any]:
    """Return the keys that an arm changes in the old configuration, from no data."""
    if arm == "old":
        return {}
    config = config_of(corpus, directory, 0)
    if arm != "banded":  # which a kept sum rules out
        config = config.model_copy(update={"audit": config.audit.model_copy(update={"keep_noised_sums": True})})
    privacy = config.privacy
    num_units = 713 if corpus == "demo" else NUM_TRAINED_ON
    records = privacy.num_steps * privacy.expected_batch_size * (privacy.records_per_user or 1)
    found = optimize(config, num_units, num_trained, records)
    if arm == "rate":
        assert found.now is not None
        return {"training.learning_rate": found.now.learning_rate}
    changes = found.best.overrides(config)
    if arm == "none":
        rate = fitted().learning_rate(Point(found.best.num_steps, 0.0, found.best.records_per_unit, config.lora.rank))
        return {
            **changes,
            "training.learning_rate": float(f"{rate:.2g}"),
            "privacy.noise_multiplier": 0.0,
            "privacy.target_epsilon": None,
        }
    return changes


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """Return a configuration with other values under ``section.key``."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        section, name = key.split(".")
        if value is None:
            tree[section].pop(name, None)
        else:
            tree[section][name] = value
    return validate(tree)


def config_of(corpus: str, directory: pathlib.Path, seed: int) -> Config:
    """Return the old configuration of a corpus."""
    return demo(seed) if corpus == "demo" else customers(directory, float(corpus.removeprefix("customers-")), seed)


def measure(corpus: str, arms: Sequence[str], directory: pathlib.Path, known: set[tuple[str, int]]) -> Iterator[Row]:
    """Yield the trainings that are not known."""
    if corpus != "demo":
        noise_law.make_inputs(directory)
    for seed in range(SEEDS[corpus.partition("-")[0]]):
        wanted = [arm for arm in arms if (arm, seed) not in known]
        if not wanted:
            continue
        old = config_of(corpus, directory, seed)
        bench = Bench(old, seed)
        for arm in wanted:
            config = changed(old, changes_of(arm, corpus, directory, bench.num_trained))
            started = time.monotonic()
            plan, loss = bench.train(config, "more per epsilon")
            bands = 1 if plan.strategy is None else plan.strategy.num_bands
            text = f"{plan.num_steps}x{plan.expected_batch_size:g}x{plan.records_per_unit} b{bands}"
            text += f" lr {config.training.learning_rate:g}"
            seconds = round(time.monotonic() - started, 1)
            yield Row(corpus, arm, seed, text, round(bench.loss_before, 5), round(loss, 5), seconds)


def report(rows: Sequence[Row], corpus: str) -> Iterator[str]:
    """Yield, for each arm, the mean loss, the share of the gap between base and no noise, and of the gap to ``old``."""
    loss = {(row.arm, row.seed): row.loss for row in rows if row.corpus == corpus}
    before = {row.seed: row.loss_before for row in rows if row.corpus == corpus}
    for arm in ARMS:
        seeds = [seed for seed in before if (arm, seed) in loss]
        if not seeds:
            continue
        losses = [loss[arm, seed] for seed in seeds]
        text = f"{corpus} {arm}: {len(seeds)} seeds, loss {statistics.mean(losses):.4f}"
        text += f" (perplexity {math.exp(statistics.mean(losses)):.1f})"
        paired = [seed for seed in seeds if ("none", seed) in loss]
        if paired:
            shares = [(before[s] - loss[arm, s]) / (before[s] - loss["none", s]) for s in paired]
            text += f"; {_interval(shares)} of what training without noise gains"
        paired = [seed for seed in paired if ("old", seed) in loss]
        if paired and arm not in ("old", "none"):
            shares = [(loss["old", s] - loss[arm, s]) / (loss["old", s] - loss["none", s]) for s in paired]
            text += f"; closes {_interval(shares)} of the old plan's gap to it"
        yield text


def _interval(shares: Sequence[float]) -> str:
    mean = statistics.mean(shares)
    if len(shares) < 2:
        return f"{mean:.0%}"
    half = _STUDENT[len(shares) - 1] * statistics.stdev(shares) / math.sqrt(len(shares))
    return f"{mean:.0%} ± {half:.0%}"


def read(path: pathlib.Path) -> list[Row]:
    """Return the trainings of a table; none without it."""
    if not path.exists():
        return []
    kinds = {field.name: {"str": str, "int": int, "float": float}[str(field.type)] for field in dataclasses.fields(Row)}
    with open(path, newline="", encoding="utf-8") as file:
        return [Row(**{name: kinds[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]


def main() -> None:
    """Measure what the table lacks and print what it says."""
    directory, corpus, arms = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or ARMS
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.csv"
    rows = read(path)
    known = {(row.arm, row.seed) for row in rows if row.corpus == corpus}
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        if not rows:
            writer.writeheader()
        for row in measure(corpus, arms, directory, known):
            writer.writerow(dataclasses.asdict(row))
            file.flush()
            print(row, flush=True)
            rows.append(row)
    print("\n".join(report(rows, corpus)))


if __name__ == "__main__":
    main()
