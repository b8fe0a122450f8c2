"""The fault campaign: strike a job at a chosen phase, resume it, and compare with the job that nobody disturbed.

``make faults`` runs the long form and prints its table; ``test_faults.py`` runs a short one. Every case checks:

- every resume ends in the adapter of the uninterrupted run, bit by bit;
- the ledger holds, charges each step once, and the statement's ε is the accountant's for exactly these steps;
- whatever was applied to the parameters had been charged before (an account kept outside the product);
- no step's noise ever covered two different sums.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from privtrain.config import load_config
from privtrain.errors import PrivtrainError
from privtrain.ledger.chain import read_records
from privtrain.ledger.log import verify
from privtrain.ledger.view import verify_run
from privtrain.privacy.plan import PrivacyPlan
from tests.cluster import LAUNCH_FILES, PHASES, Fault, Job
from tests.conftest import save_tiny_llama, tiny_tree, write_config, write_users

NUM_STEPS = 6
CHECKPOINT_INTERVAL = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A fault, whether the newest checkpoint is damaged before the job is started again, and in which kind of job."""

    fault: Fault
    is_checkpoint_damaged: bool = False
    backend: str = "ddp"
    num_bands: int = 1

    @property
    def name(self) -> str:
        fault = self.fault
        who = "disk full" if fault.action == "fill" else f"{fault.action} rank {fault.rank}"
        damaged = ", newest checkpoint cut" if self.is_checkpoint_damaged else ""
        where = "" if self.backend == "ddp" else f"{self.backend}: "
        where += "" if self.num_bands == 1 else f"{self.num_bands} bands: "
        return f"{where}{who} {fault.moment} {fault.phase} of step {fault.step}{damaged}"

    @property
    def kind(self) -> str:
        """The column of the table."""
        if self.is_checkpoint_damaged:
            return "SIGKILL, newest checkpoint cut"
        return {"kill": "SIGKILL", "term": "SIGTERM", "fill": "disk full"}[self.fault.action]


def job_config(
    place: pathlib.Path, name: str, output: pathlib.Path | None = None, *, num_bands: int = 1, **performance: float
) -> pathlib.Path:
    tree = tiny_tree(place / "model", place / "users.jsonl", output or place / "runs")
    tree["run"]["name"] = name
    tree["privacy"] |= {"num_steps": NUM_STEPS, "insecure_seed": 11}
    if num_bands > 1:
        tree["privacy"] |= {"noise": "banded", "num_bands": num_bands, "sampling_prob": 1 / num_bands}
    tree["performance"] |= {"heartbeat_timeout_seconds": 20, **performance}
    return write_config(tree, place / f"{name}.yaml")


def prepare(place: pathlib.Path) -> None:
    """The model and the data."""
    save_tiny_llama(place / "model", num_layers=1)
    write_users(place / "users.jsonl")


def undisturbed(place: pathlib.Path, backend: str = "ddp", num_bands: int = 1) -> bytes:
    """The adapter of a run that nobody disturbs."""
    name = f"undisturbed-{backend}-{num_bands}"
    job = Job(job_config(place, name, num_bands=num_bands), place / name, backend=backend)
    assert job.wait() == [0, 0], job.output()
    return adapter_of(place / "runs" / name)


def adapter_of(run: pathlib.Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def run_case(place: pathlib.Path, case: Case, index: int, expected: bytes) -> str:
    """Strike, look, resume, compare; returns how the job that was struck ended."""
    name = f"case-{index:03d}"
    with small_disk(place / name / "disk", case.fault.action == "fill") as output:
        config = job_config(place, name, output, num_bands=case.num_bands)
        run = output / name
        struck = Job(config, place / name, fault=case.fault, backend=case.backend)
        codes = struck.wait()
        assert (place / name / "struck").exists(), f"{case.name}: the fault did not strike"
        check_ending(case, codes, struck.output())
        check_charged(place / name, run)
        (output / "filler").unlink(missing_ok=True)
        if case.is_checkpoint_damaged:
            newest = sorted((run / "checkpoints").glob("step-*"))[-1] / "state.pt"
            os.truncate(newest, newest.stat().st_size // 2)
        resumed = Job(config, place / name, backend=case.backend)
        assert resumed.wait() == [0, 0], f"{case.name}: {resumed.output()}"
        if case.is_checkpoint_damaged:
            assert "is damaged" in resumed.output(0), resumed.output(0)
        check_result(place / name, run, config, expected)
    shutil.rmtree(place / name)
    return " ".join(str(code) for code in codes)


def check_ending(case: Case, codes: list[int], output: str) -> None:
    """How a struck job ends: 75 where it was asked, 4 with a message where the machine failed it, never a hang."""
    assert -99 not in codes, f"{case.name}: a rank hung; {output}"
    if case.fault.action == "term":
        is_over = case.fault.phase == "export"
        assert codes == ([0, 0] if is_over else [75, 75]), f"{case.name}: {codes} {output}"
    elif case.fault.action == "kill":
        assert codes[case.fault.rank] == -9, f"{case.name}: {codes}"
        assert codes[1 - case.fault.rank] in (0, 4), f"{case.name}: {codes} {output}"
    else:
        assert codes[0] == 4, f"{case.name}: {codes} {output}"
        assert "make room for the run directory" in output, f"{case.name}: {output}"


def applied(directory: pathlib.Path) -> dict[tuple[int, int], set[str]]:
    """(step, rank) → the noised sums, or the rank's parts of them, that any of the jobs of this run applied."""
    sums: dict[tuple[int, int], set[str]] = collections.defaultdict(set)
    for path in directory.glob("applied-*"):
        for line in path.read_text().splitlines():
            step, digest = json.loads(line)
            sums[step, int(path.name.removeprefix("applied-"))].add(digest)
    return sums


def check_charged(directory: pathlib.Path, run: pathlib.Path) -> None:
    """Every step that touched the parameters stands in the ledger, also when its last write was torn."""
    intents = {r["step"] for r in read_records(run / "secret" / "ledger.jsonl") if r["kind"] == "intent"}
    assert {step for step, _ in applied(directory)} <= intents, "a step was applied that was not charged"


def check_result(directory: pathlib.Path, run: pathlib.Path, config: pathlib.Path, expected: bytes) -> None:
    assert adapter_of(run) == expected, "another adapter than the uninterrupted run's"
    state = verify(run / "secret" / "ledger.jsonl")
    assert len(state.commits) == state.num_charged == NUM_STEPS
    assert state.generation == 0
    sums = applied(directory)
    assert {step for step, _ in sums} == set(range(NUM_STEPS))
    assert all(len(digests) == 1 for digests in sums.values()), "one step's noise covered two sums"
    statement = json.loads((run / "privacy.json").read_text())
    loaded = load_config(config, ())
    plan = PrivacyPlan.build(loaded.privacy, loaded.training)
    assert statement["steps_released"] == NUM_STEPS
    assert statement["epsilon"] == statement["accountants"][0]["upper"] == plan.epsilon_after(NUM_STEPS) > 0
    assert "matches privacy.json" in verify_run(run)


@contextlib.contextmanager
def small_disk(directory: pathlib.Path, is_wanted: bool) -> Iterator[pathlib.Path]:
    """A file system of 4 MB where mounting is allowed; otherwise the directory itself."""
    directory.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "privtrain-test", str(directory)]
    is_mounted = is_wanted and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield directory
    finally:
        if is_mounted:
            subprocess.run(["umount", str(directory)], check=True)


def long_cases(seed: int = 0) -> list[Case]:
    """Every phase x moment x rank x {SIGKILL, SIGTERM}, full disks, cut checkpoints; steps at random."""
    rng = np.random.default_rng(seed)

    def step_of(phase: str, lowest: int = 0) -> int:
        if phase == "checkpoint":
            return int(rng.choice(range(max(2, lowest), NUM_STEPS + 1, CHECKPOINT_INTERVAL)))
        return int(rng.integers(lowest, NUM_STEPS))

    moments = ("before", "inside", "after")
    cases = [
        Case(Fault(phase, step_of(phase), moment, action, rank))
        for phase in PHASES
        for action in ("kill", "term")
        for moment in moments
        for rank in (0, 1)
    ]
    for phase in PHASES:
        cases.append(Case(Fault(phase, step_of(phase), "before", "fill")))
        rank = int(rng.integers(2)) if phase != "export" else 0  # without rank 1 the release is finished
        cases.append(Case(Fault(phase, step_of(phase, 4), "before", "kill", rank), is_checkpoint_damaged=True))
    return cases


def short_cases() -> list[Case]:
    """A few of the hardest, for every test run."""
    return [
        Case(Fault("intent", 3, "inside", "kill", 0)),
        Case(Fault("checkpoint", 4, "inside", "kill", 0), is_checkpoint_damaged=True),
        Case(Fault("reduce", 2, "inside", "term", 1)),
        Case(Fault("commit", 3, "before", "fill")),
        Case(Fault("optimizer", 3, "inside", "kill", 1), backend="zero3"),
    ]


def table(results: list[tuple[Case, str]]) -> str:
    """Markdown: phase x fault → runs, all of which passed."""
    kinds = ["SIGKILL", "SIGTERM", "disk full", "SIGKILL, newest checkpoint cut"]
    counts = collections.Counter((case.fault.phase, case.kind) for case, _ in results)
    lines = ["| struck in | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    lines += ["| " + " | ".join([phase, *(str(counts[phase, kind]) for kind in kinds)]) + " |" for phase in PHASES]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-cases", type=int, default=None, help="stop after so many")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of single cases")
    parser.add_argument("--backend", choices=LAUNCH_FILES, default="ddp")
    parser.add_argument("--num-bands", type=int, choices=(1, 2, 3), default=1, help="of the noise")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        prepare(place)
        expected = undisturbed(place, arguments.backend, arguments.num_bands)
        results, failures = [], []
        for index, planned in enumerate(long_cases()[: arguments.num_cases]):
            if arguments.only and index + 1 not in arguments.only:
                continue
            case = dataclasses.replace(planned, backend=arguments.backend, num_bands=arguments.num_bands)
            try:
                codes = run_case(place, case, index, expected)
            except (AssertionError, PrivtrainError, ValueError) as error:
                failures.append(case)
                print(f"FAILED {case.name}: {error}", flush=True)
                continue
            results.append((case, codes))
            print(f"{index + 1:3d} ok  {case.name}: exit codes {codes}", flush=True)
    print(f"\n{table(results)}\n")
    print(
        f"{len(results)} of {len(results) + len(failures)} runs resumed to the uninterrupted run's adapter bit by bit, "
        f"{time.monotonic() - began:.0f} s"
    )
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
