"""Images: not root, pinned, checked by the doctor, and their entry point starts what it is told to."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

REPOSITORY = pathlib.Path(__file__).parents[2]
DOCKERFILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))
ENTRYPOINT = REPOSITORY / "docker" / "entrypoint.sh"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.stem)
def test_an_image_is_pinned_not_root_and_has_a_health_check(path):
    text = path.read_text(encoding="utf-8")
    bases = re.findall(r"^FROM (\S+)(?: AS \w+)?$", text, re.M)
    assert len(bases) == 2, "what is needed to install stays behind"
    assert all(re.fullmatch(r"\S+:\d\S+", base) for base in bases)
    last = text[text.rindex("FROM ") :]
    assert "COPY --from=build" in last
    assert not re.search(r"apt-get install.*\b(git|make)\b", last)
    (install,) = re.findall(r"^RUN (make install .*)$", text, re.M)
    assert "--no-cache-dir" in install
    assert re.search(r"\bDEV= ", install), "no tools for tests"
    assert re.findall(r"^USER (\S+)$", text, re.M)[-1] == "1000:1000"
    assert text.index("USER 1000") < text.index("RUN make install"), "packages are installed by the user"
    assert re.search(r'^HEALTHCHECK .*CMD \["privtrain", "doctor"\]$', text, re.M)
    (entrypoint,) = re.findall(r'^ENTRYPOINT \["(\S+)"\]$', text, re.M)
    assert os.access(REPOSITORY / entrypoint, os.X_OK)


def test_secrets_and_runs_are_never_sent_to_the_builder():
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split()
    assert {"tests", "**/*.whl"} <= set(ignored), "of no use in an image"
    assert {"runs", "**/secret", "**/checkpoints", "**/*.key", ".git", ".venv"} <= set(ignored)


def entrypoint(tmp_path: pathlib.Path, *arguments: str, **environment: str) -> list[str]:
    for name in ("accelerate", "privtrain"):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        stub.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    run = subprocess.run(
        [str(ENTRYPOINT), *arguments], env={"PATH": path, **environment}, capture_output=True, text=True, check=True
    )
    return run.stdout.split()


def test_the_entry_point_trains_on_one_machine_or_several(tmp_path):
    one = entrypoint(tmp_path, "a.yaml", "b.yaml", "run.name=x")
    launch = ["accelerate", "launch", "--config_file", "a.yaml"]
    assert one == [*launch, "-m", "privtrain", "train", "b.yaml", "run.name=x"]
    several = entrypoint(
        tmp_path, "a.yaml", "b.yaml", NUM_MACHINES="2", MACHINE_RANK="1", MAIN_ADDRESS="m0", NUM_PROCESSES="16"
    )
    flags = "--num_processes 16 --num_machines 2 --machine_rank 1 --main_process_ip m0 --main_process_port 29500"
    assert several == [*launch, *flags.split(), "-m", "privtrain", "train", "b.yaml"]
    assert entrypoint(tmp_path, "privtrain", "plan", "b.yaml") == ["privtrain", "plan", "b.yaml"]
    assert entrypoint(tmp_path) == ["privtrain", "--help"]


def test_a_forgotten_address_stops_the_entry_point(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        entrypoint(tmp_path, "a.yaml", "b.yaml", NUM_MACHINES="2")


def test_the_rehearsal_is_two_machines_of_one_job():
    services = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    environments = [service["environment"] for service in services.values()]
    assert [e["MACHINE_RANK"] for e in environments] == ["0", "1"]
    assert {(e["NUM_MACHINES"], e["MAIN_ADDRESS"]) for e in environments} == {("2", "machine-0")}
    config, recipe, _ = next(iter(services.values()))["command"]
    assert (REPOSITORY / config).exists()
    assert (REPOSITORY / recipe).exists()


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_cpu_image_install_steps_work_in_clean_directory(tmp_path):
    """The commands of the Dockerfile, in the place of its WORKDIR, with what the builder would be sent."""
    app, home = tmp_path / "app", tmp_path / "home"
    app.mkdir()
    home.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=app, input=archive, check=True)
    for name in (app / ".dockerignore").read_text(encoding="utf-8").split():
        if "*" not in name:
            shutil.rmtree(app / name, ignore_errors=True)
    text = (app / "docker" / "cpu.Dockerfile").read_text(encoding="utf-8")
    (step,) = re.findall(r"^RUN (make install .*)$", text, re.M)
    assert shutil.which("make")
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    subprocess.run(["bash", "-c", step], cwd=app, env=environment, check=True)
    assert not (home / ".cache" / "pip").exists()
    installed = {path.name for path in app.glob(".venv/lib/python3.*/site-packages/*")}
    assert not {"pytest", "ruff", "hypothesis"} & installed
    assert not list(app.rglob("*.whl"))
    (check,) = re.findall(r'HEALTHCHECK .*CMD \["privtrain", "doctor"\]', text)
    assert check
    environment |= {"PATH": f"{app / '.venv/bin'}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true"}
    options = {"cwd": app, "env": environment, "capture_output": True, "text": True}
    healthy = subprocess.run(["privtrain", "doctor"], check=False, **options)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    helped = subprocess.run(["docker/entrypoint.sh"], check=True, **options)
    assert "contribution ledger" in helped.stdout
