"""What clusters do to a job: kill or stop a rank, ask it to leave, fill its disk, damage its files."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import signal
import time
from collections.abc import Callable

import pytest

from tests.cluster import Fault, Job
from tests.launch import faults

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("no_self_test")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("faults")
    faults.prepare(directory)
    return directory


@pytest.fixture(scope="module")
def expected(place: pathlib.Path) -> Callable[..., bytes]:
    """Backend, and bands of the noise → adapter of a run that nobody disturbs."""
    return functools.cache(functools.partial(faults.undisturbed, place))


@pytest.mark.parametrize("case", faults.short_cases(), ids=lambda case: case.name)
def test_struck_job_resumes_to_undisturbed_result(place, expected, case):
    faults.run_case(place, case, faults.short_cases().index(case), expected(case.backend))


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("backend", "num_bands"), [("ddp", 1), ("zero3", 1), ("fsdp2", 1), ("zero3", 3)])
def test_every_second_case_of_the_campaign(place, expected, backend, num_bands):
    for index, case in enumerate(faults.long_cases()[::2]):
        chosen = dataclasses.replace(case, backend=backend, num_bands=num_bands)
        faults.run_case(place, chosen, 100 + index, expected(backend, num_bands))


@pytest.mark.parametrize("phase", ["join", "load", "evaluate"])
def test_stop_before_first_step_exits_75(place, phase):
    """In the rendezvous, where Python cannot act, too; nothing is charged."""
    name = f"early-{phase}"
    job = Job(faults.job_config(place, name), place / name, fault=Fault(phase, -1, "before", "term", 1))
    assert job.wait(60) == [75, 75], job.output()
    intents = place / "runs" / name / "secret" / "ledger.jsonl"
    assert not intents.exists() or b'"intent"' not in intents.read_bytes()


def test_sigusr1_to_one_rank_stops_all_at_a_step_boundary(place, expected):
    name = "usr1"
    config = faults.job_config(place, name)
    job = Job(config, place / name, fault=Fault("forward", 2, "before", "usr1", 1))
    assert job.wait(60) == [75, 75], job.output()
    assert "saved after step 3 of 6" in job.output(0)
    assert Job(config, place / name).wait() == [0, 0]
    assert faults.adapter_of(place / "runs" / name) == expected("ddp")


@pytest.mark.parametrize(("action", "rank"), [("stop", 1), ("kill", 0)])
def test_lost_rank_without_launcher_is_named(place, expected, action, rank):
    """A stopped rank leaves its connections open: nothing but its silence tells. Rank 0 takes the store along."""
    name = f"lost-{action}"
    config = faults.job_config(place, name, heartbeat_timeout_seconds=5)
    job = Job(config, place / name, fault=Fault("reduce", 3, "before", action, rank))
    survivor = 1 - rank
    job.ranks[survivor].join(timeout=60)
    code, output = job.ranks[survivor].exitcode, job.output(survivor)
    job.send(rank, signal.SIGKILL)
    job.wait(10)
    assert code == 4, output
    assert ("no sign of life from rank 1" if rank else "rank 0's machine") in output
    assert Job(config, place / name).wait() == [0, 0]
    assert faults.adapter_of(place / "runs" / name) == expected("ddp")


def test_an_error_of_one_rank_ends_the_others_with_its_reason(place):
    """A rank that fails alone must not leave the others in a collective until it times out."""
    name = "alone"
    config = faults.job_config(place, name, heartbeat_timeout_seconds=60)
    job = Job(config, place / name, fault=Fault("forward", 2, "before", "raise", 1))
    codes = job.wait(45, as_launcher=False)
    assert codes[1] == 1
    assert "MemoryError: planted" in job.output(1)
    assert codes[0] in (1, 4)
    assert "rank 1" in job.output(0)
    assert "planted" in job.output(0)


def test_suspended_and_continued_job_loses_nobody(place, expected):
    """As schedulers do to make room: no rank hears the others for longer than the time-out, and none is lost."""
    name = "suspended"
    config = faults.job_config(place, name, heartbeat_timeout_seconds=4)
    job = Job(config, place / name, fault=Fault("forward", 2, "before", "stop", 1))
    end = time.monotonic() + 60
    while not (place / name / "struck").exists() and time.monotonic() < end:
        time.sleep(0.005)
    job.send(0, signal.SIGSTOP)
    time.sleep(6)
    for rank in (0, 1):
        job.send(rank, signal.SIGCONT)
    assert job.wait() == [0, 0], job.output()
    assert faults.adapter_of(place / "runs" / name) == expected("ddp")


@pytest.mark.parametrize(("phase", "step"), [("checkpoint", 4), ("export", 0)])
def test_rank_0_alone_may_outlast_collective_timeout(place, expected, phase, step):
    """Else a model that is large enough could never be released: each start would fail at the same place."""
    name = f"slow-{phase}"
    config = faults.job_config(place, name, collective_timeout_seconds=10, heartbeat_timeout_seconds=3)
    job = Job(config, place / name, fault=Fault(phase, step, "inside", "slow"))
    assert job.wait(90) == [0, 0], job.output()
    assert (place / name / "struck").exists()
    assert faults.adapter_of(place / "runs" / name) == expected("ddp")


def test_rank_0_lost_while_alone_is_found_missing(place):
    name = "lost-alone"
    config = faults.job_config(place, name, heartbeat_timeout_seconds=3)
    job = Job(config, place / name, fault=Fault("export", 0, "inside", "stop", 0))
    job.ranks[1].join(timeout=60)
    code = job.ranks[1].exitcode  # in words it is told by the first rank of a machine, which is stopped here
    job.send(0, signal.SIGKILL)
    job.wait(10)
    assert code == 4, job.output()
