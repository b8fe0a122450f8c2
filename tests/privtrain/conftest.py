"""Fixtures: a finished run to copy; a registry in a SQLite file, and on a real PostgreSQL server where there is one."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator

import pytest

from privtrain.registry.store import Registry
from tests.cluster import fork_server
from tests.conftest import tiny_tree, write_config
from tests.privtrain.registry_server import PostgresServer, binaries, unprivileged
from tests.privtrain.registry_work import DATASET


@pytest.fixture(autouse=True)
def _no_registry_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.delenv("PRIVTRAIN_REGISTRY", raising=False)
    monkeypatch.delenv("PRIVTRAIN_REGISTRY_KEY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data-home"))


@pytest.fixture(scope="session")
def released_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: pathlib.Path, users_file: pathlib.Path
) -> pathlib.Path:
    """A finished, private run of the tiny model; copy it, never change it."""
    from privtrain.job.train import train

    place = tmp_path_factory.mktemp("released")
    tree = tiny_tree(tiny_llama, users_file, place / "runs")
    del tree["privacy"]["insecure_seed"]
    train(write_config(tree, place / "c.yaml"))
    return place / "runs" / "tiny"


@pytest.fixture
def finished(released_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a finished run, to be changed."""
    return shutil.copytree(released_run, tmp_path / "runs" / "tiny")


@pytest.fixture(scope="session")
def places(released_run: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Every kind of directory that may be handed on: the run with and without ``secret/``, its adapter, exports.

    Copy them, never change them.
    """
    from privtrain.commands.export import export_run

    place = tmp_path_factory.mktemp("places")
    shutil.copytree(released_run, place / "run")
    shutil.copytree(released_run, place / "public", ignore=shutil.ignore_patterns("secret", "checkpoints"))
    shutil.copytree(released_run / "adapter", place / "adapter")
    export_run(released_run, place / "copied", merge=False, dtype="bf16")
    export_run(released_run, place / "merged", merge=True, dtype="bf16")
    return {path.name: path for path in place.iterdir()}


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    if binaries() is None:
        pytest.skip("Debian's postgresql is not installed (/usr/lib/postgresql/*/bin/postgres)")
    import os

    if os.getuid() == 0 and unprivileged() is None:
        pytest.skip("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")
    server = PostgresServer()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_url(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    """A registry with an ε of 8 at δ 1e-6 for every user of the data set."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/registry.db"
    else:
        url = request.getfixturevalue("postgres").new_database()
    from privtrain.registry.database import Database

    Database(url).upgrade()
    Registry(url).set_budget(DATASET, epsilon=8, delta=1e-6)
    return url


@pytest.fixture
def registry(registry_url: str) -> Registry:
    return Registry(registry_url, retry_seconds=5)


@pytest.fixture(scope="session")
def processes():
    """Processes that share the imports of one server."""
    return fork_server()
