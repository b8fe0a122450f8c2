"""Many users without their text in memory: time to index, to split and to draw a step, and the peak of resident memory.

    python -m tests.bench.bench_data [users] [directory]

Writes users with two short records on average into Parquet shards (10 million users: about 1 GiB), indexes them, flips
every user's coin, and draws, reads and tokenises some steps of 1,000 users. Peak memory is the process' own, pages of
mapped files included.
"""

from __future__ import annotations

import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow
import pyarrow.parquet

from privtrain.config.data import DataSection
from privtrain.config.privacy import PrivacySection
from privtrain.data.corpus import load_corpus
from privtrain.data.encode import Encoder
from privtrain.data.manifest import used_facts
from privtrain.data.split import split_users
from privtrain.data.units_on_disk import units_on_disk
from privtrain.files.atomic import write_json
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.sampling import UnitSampler
from privtrain.privacy.secret import SecretKey

NUM_SHARDS = 64
STEP_UNITS = 1000
NUM_STEPS = 5


@contextmanager
def timed(what: str) -> Iterator[None]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    started, begun = time.monotonic(), usage.ru_utime + usage.ru_stime
    yield
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds, cpu_seconds = time.monotonic() - started, usage.ru_utime + usage.ru_stime - begun
    print(f"{what:38} {seconds:8.2f} s  CPU {cpu_seconds:8.2f} s  peak {usage.ru_maxrss / 2**20:.2f} GiB", flush=True)


def write_shards(directory: pathlib.Path, num_users: int) -> None:
    """Users in no order over all shards; one to three records each, two on average."""
    rng = np.random.default_rng(0)
    words = np.array(["alder", "birch", "cedar", "elm", "fir", "gorse", "hazel", "ivy", "larch", "maple"])
    for shard in range(NUM_SHARDS):
        users = rng.permutation(np.arange(shard, num_users, NUM_SHARDS))
        owners = np.repeat(users, 1 + users % 3)
        texts = [" ".join(words[row]) for row in rng.integers(0, len(words), size=(len(owners), 6))]
        names = [f"user-{owner:09d}" for owner in owners.tolist()]
        pyarrow.parquet.write_table(pyarrow.table({"user": names, "text": texts}), directory / f"{shard:03d}.parquet")


def tiny_encoder(data: DataSection) -> Encoder:
    from transformers import AutoTokenizer

    from tests.conftest import save_tiny_llama

    with tempfile.TemporaryDirectory() as directory:
        save_tiny_llama(pathlib.Path(directory))
        return Encoder(data, AutoTokenizer.from_pretrained(directory))


def main(num_users: int, directory: pathlib.Path) -> None:
    """Measure and print."""
    shards = directory / "shards"
    if not shards.exists():
        shards.mkdir(parents=True)
        with timed(f"write {num_users:,} users"):
            write_shards(shards, num_users)
    data = DataSection.model_validate(
        {"source": {"kind": "files", "paths": [str(shards / "*.parquet")]}, "max_length": 48}
    )
    with timed("index"):
        corpus = load_corpus(data, directory / "index")
    with timed("open the index again"):
        corpus = load_corpus(data, directory / "index")
    print(f"{len(corpus.records):,} users", flush=True)
    key = SecretKey.insecure(0, "bench")
    with timed("split"):
        split = split_users(corpus, data, key)
    encoder = tiny_encoder(data)
    with timed("units and their digest"):
        units = units_on_disk(corpus, split, encoder, unit="user")
        units.sha256()
    with timed("seal and write the manifest (rank 0)"):
        manifest = split.manifest(corpus)
        write_json(directory / "manifest.json", manifest)
        seal = manifest.pop("sha256")
        del manifest
    with timed("what training may use (rank 0)"):
        used_facts(corpus, split, units, manifest_sha256=seal, records_per_unit=1)
    privacy = PrivacySection(
        sampling_prob=STEP_UNITS / len(units),
        expected_batch_size=STEP_UNITS,
        noise_multiplier=1.0,
        target_delta=1e-8,
        num_steps=NUM_STEPS,
    )
    plan = PrivacyPlan.build(privacy)
    sampler = UnitSampler(plan.scheme, plan.records_per_unit, key, units.num_records)
    with timed(f"draw {NUM_STEPS} steps"):
        drawn = [sampler.draw(step) for step in range(NUM_STEPS)]
    with timed(f"read and tokenise {NUM_STEPS} steps of {STEP_UNITS}"):
        for step in drawn:
            units.fetch([(d.unit, d.record_indices) for d in step])


if __name__ == "__main__":
    users = int(float(sys.argv[1])) if len(sys.argv) > 1 else 10_000_000
    if len(sys.argv) > 2:
        main(users, pathlib.Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(users, pathlib.Path(temporary))
