"""What a ledger of 10 million contributions costs to write, check and ask.

    python -m tests.bench.bench_ledger [--users N] [--steps N] [--draws N] [--directory DIR]

Each phase runs in a process of its own, so that its peak memory is its own. Wall and CPU time are both printed, since
the machine may be shared; a CPU time above the wall time means that two threads worked.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from privtrain.files.private import make_private_directory
from privtrain.ledger.log import open_ledger, verify, verify_chain
from privtrain.ledger.proof import check_proof, prove
from privtrain.ledger.query import opened_contributions
from privtrain.privacy.secret import SecretKey, pseudonym
from tests.privtrain.ledgers import manifest_of

_KEY = SecretKey.insecure(0, "pseudonym")
_RECORDS_PER_UNIT = 4
#: A step that an append is compared with.
_STEP_SECONDS = 1.0


def append(path: pathlib.Path, num_users: int, num_steps: int, num_draws: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    wall, cpu = np.zeros(num_steps), 0.0
    with open_ledger(path, plan_fingerprint="p", records_per_unit=_RECORDS_PER_UNIT, pseudonym_key=_KEY) as ledger:
        ledger.begin_session(generation=0, from_step=0, environment="e")
        for step in range(num_steps):
            counts = rng.integers(1, _RECORDS_PER_UNIT + 1, num_draws).tolist()
            users = rng.choice(num_users, num_draws, replace=False).tolist()
            units = [(f"user-{user}", count) for user, count in zip(users, counts, strict=True)]
            began, began_cpu = time.perf_counter(), time.process_time()
            ledger.intend(0, step, units)
            ledger.commit(0, step, "0" * 64, [units[0][0]] if step % 1000 == 0 else [])
            wall[step], cpu = time.perf_counter() - began, cpu + time.process_time() - began_cpu
        ledger.release(1.0, 1e-6, manifest_of(ledger.prepare_release()))
    return {
        "append_mean_ms": 1e3 * float(wall.mean()),
        "append_median_ms": 1e3 * float(np.median(wall)),
        "append_p99_ms": 1e3 * float(np.quantile(wall, 0.99)),
        "append_max_ms": 1e3 * float(wall.max()),
        "append_cpu_ms": 1e3 * cpu / num_steps,
        "share_of_a_1_s_step": float(wall.mean()) / _STEP_SECONDS,
    }


def timed(name: str, function: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    began, began_cpu = time.perf_counter(), time.process_time()
    result = function()
    return {
        f"{name}_seconds": time.perf_counter() - began,
        f"{name}_cpu_seconds": time.process_time() - began_cpu,
    }, result


def measure(phase: str, path: pathlib.Path, arguments: argparse.Namespace) -> dict[str, float]:
    if phase == "append":
        found = append(path, arguments.users, arguments.steps, arguments.draws)
    elif phase == "verify":
        found, state = timed("verify", lambda: verify(path))
        found["verify_per_second"] = state.num_contributions / found["verify_seconds"]
        found["verify_per_cpu_second"] = state.num_contributions / found["verify_cpu_seconds"]
    elif phase == "user":
        name = pseudonym(_KEY, "user-12345")
        found, _ = timed("user", lambda: _ask(path, lambda c: c.user(name)))
    elif phase == "stats":
        found, _ = timed("stats", lambda: _ask(path, lambda c: c.statistics(10)))
    elif phase == "top":
        found, _ = timed("top", lambda: _ask(path, lambda c: c.top(20)))
    elif phase == "chain":
        found, _ = timed("chain", lambda: verify_chain(path))
    else:
        found, proof = timed("prove", lambda: prove(path, pseudonym(_KEY, "user-12345"), "user-12345"))
        found["proof_mib"] = len(json.dumps(proof, separators=(",", ":"))) / 2**20
        found |= timed("check_proof", lambda: check_proof(proof, proof["head"]))[0]
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def _ask(path: pathlib.Path, question: Callable[..., Any]) -> Any:
    with opened_contributions(path) as contributions:
        return question(contributions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=1_000)
    parser.add_argument("--directory", type=pathlib.Path)
    parser.add_argument("--phase")
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps(measure(arguments.phase, arguments.directory / "ledger.jsonl", arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = arguments.directory or pathlib.Path(scratch)
        make_private_directory(place)
        phases = ["append", "chain", "verify", "user", "stats", "top", "prove"]
        for phase in phases if not (place / "ledger.jsonl").exists() else phases[1:]:
            command = [sys.executable, "-m", "tests.bench.bench_ledger", "--phase", phase, "--directory", str(place)]
            sizes = ["--users", str(arguments.users), "--steps", str(arguments.steps), "--draws", str(arguments.draws)]
            done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True)
            print(phase, {name: float(f"{value:.4g}") for name, value in json.loads(done.stdout).items()}, flush=True)
        num_bytes = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        print("size on disk", f"{num_bytes / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
