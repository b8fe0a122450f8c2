"""How long a reservation takes in a registry of many runs. Run: python -m tests.bench.bench_registry [--postgresql]

Three registries, each with ``--runs`` settled runs: one budget that all runs of 20 recipes share; the same close to its
end, where the Rényi bound no longer decides; and one budget whose runs all differ, as no organisation's do.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
import uuid
from collections.abc import Iterator

import numpy as np
import sqlalchemy as sa

from privtrain.registry import spending, views
from privtrain.registry.database import Database
from privtrain.registry.evidence import LedgerEvidence
from privtrain.registry.spending import Part, Settings
from privtrain.registry.store import Registry
from privtrain.registry.tables import Dataset, DatasetVersion, Mechanism, ReservationRow, Run, Settlement
from tests.privtrain.registry_work import DATASET, request

NUM_STEPS = 200


def recipes(count: int, rng: np.random.Generator) -> list[Settings]:
    return [
        Settings(round(float(rng.uniform(2, 6)), 4), round(float(rng.uniform(0.001, 0.01)), 6), NUM_STEPS)
        for _ in range(count)
    ]


def fill(registry: Registry, chosen: list[Settings], num_runs: int) -> None:
    """Settled runs, written directly: reserving each would take as long as the benchmark is about to say."""
    now = time.time()
    # Divergences take milliseconds each to compute; what they are makes no difference to how long a reservation takes.
    known = [spending.part_of(one.event()).divergences for one in chosen[:20]]
    steps = [Settings(one.noise_multiplier, one.sampling_prob, 1).event().event for one in chosen]
    parts = [Part(spending.event_text(step), NUM_STEPS, known[i % 20]) for i, step in enumerate(steps)]

    def work(connection: sa.Connection) -> None:
        dataset = connection.execute(sa.select(Dataset.id).where(Dataset.name == DATASET)).scalar_one()
        version = {"id": 1, "dataset_id": dataset, "manifest": "m", "created_at": now}
        connection.execute(sa.insert(DatasetVersion), [version])
        connection.execute(
            sa.insert(Mechanism),
            [
                {
                    "id": i + 1,
                    "digest": spending.event_digest(part.text),
                    "event": part.text,
                    "divergences": part.divergences.tobytes(),
                }
                for i, part in enumerate(parts)
            ],
        )
        names = [uuid.uuid4().hex for _ in range(num_runs)]
        connection.execute(
            sa.insert(Run),
            [
                {"id": i + 1, "uid": n, "name": n, "fingerprint": n, "dataset_version_id": 1, "created_at": now}
                for i, n in enumerate(names)
            ],
        )
        shared = {"dataset_id": dataset, "state": "closed", "epsilon": 0.1, "delta": 1e-6, "num_opt_outs": 0}
        counts = {"num_reserved": NUM_STEPS, "num_charged": NUM_STEPS}
        times = {"created_at": now, "lease_until": now, "closed_at": now}
        connection.execute(
            sa.insert(ReservationRow),
            [
                {"id": n, "run_id": i + 1, "mechanism_id": i % len(chosen) + 1, **shared, **counts, **times}
                for i, n in enumerate(names)
            ],
        )
        ends = {"kind": "settle", "num_charged": NUM_STEPS, "epsilon": 0.1, "ledger_head": "h", "created_at": now}
        connection.execute(sa.insert(Settlement), [{"reservation_id": n, **ends} for n in names])
        if connection.dialect.name == "postgresql":
            for table in (DatasetVersion, Mechanism, Run):
                name = table.__tablename__
                connection.execute(sa.text(f"SELECT setval('{name}_id_seq', (SELECT max(id) FROM {name}))"))

    registry.database.write(work)


def measure(registry: Registry, asked: Settings, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Wall-clock and processor seconds of each reservation; the second says what a quiet machine would take."""
    seconds, processor = [], []
    for index in range(repeats):
        one = request(f"asked-{index}-{uuid.uuid4().hex}", asked)
        began, began_processor = time.perf_counter(), time.process_time()
        registry.reserve(one)
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - began_processor)
        registry.refund(one.uid, LedgerEvidence(0, ""))
    return np.array(seconds), np.array(processor)


@contextlib.contextmanager
def urls(use_postgresql: bool) -> Iterator[Iterator[str]]:
    if not use_postgresql:
        with tempfile.TemporaryDirectory() as directory:
            yield (f"{directory}/{name}.db" for name in "abcdefgh")
        return
    from tests.privtrain.registry_server import PostgresServer

    server = PostgresServer()
    try:
        yield (server.new_database() for _ in range(8))
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--postgresql", action="store_true")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| registry | decided by | reserve p50 | p95 | processor p50 |\n|---|---|---|---|---|")
    with urls(arguments.postgresql) as addresses:
        for label, num_recipes, share in (
            ("20 recipes", 20, 0.5),
            ("20 recipes, close to the end", 20, 0.985),
            ("every run differs", arguments.runs, 0.5),
        ):
            url = next(addresses)
            Database(url).upgrade()
            registry = Registry(url)
            registry.set_budget(DATASET, epsilon=1.0, delta=1e-6)
            chosen = recipes(num_recipes, rng)
            fill(registry, chosen, arguments.runs)
            spent = views.budgets(registry.database)[0].spent
            registry.set_budget(DATASET, epsilon=spent / share, delta=1e-6)
            measure(registry, chosen[0], 2)
            seconds, processor = measure(registry, chosen[0], arguments.repeats)
            decided = "composition" if share > 0.9 else "Rényi bound"
            middle, late = 1000 * np.percentile(seconds, [50, 95])
            own = 1000 * np.median(processor)
            timed = f"{middle:.0f} ms | {late:.0f} ms | {own:.0f} ms"
            print(f"| {arguments.runs:,} runs, {label} | {decided} | {timed} |", flush=True)


if __name__ == "__main__":
    main()
