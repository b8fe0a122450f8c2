"""privtrain from Python: ten names, loaded lazily, typed and documented, over the code of the command line."""

from __future__ import annotations

import hashlib
import inspect
import json
import pathlib
import re
import stat
import subprocess
import sys
import typing

import pytest
from typer.testing import CliRunner

import privtrain
from attacks.cli import app as attacks_app
from privtrain import api
from privtrain.config import public_tree
from privtrain.data.store import store_rows
from privtrain.errors import ConfigError, Preempted
from tests.conftest import tiny_tree

REPOSITORY = pathlib.Path(__file__).parents[2]


def rows_of(num_users: int = 24) -> list[dict[str, str]]:
    return [
        {"author": f"u{user:02d}", "text": f"{word} of {user} and {word}"}
        for user in range(num_users)
        for word in ("alder", "birch", "cedar", "elm", "fir", "gorse")
    ]


def test_the_package_offers_ten_names_and_imports_no_torch():
    code = (
        "import sys, privtrain; names = set(privtrain.__all__); assert len(names) <= 10 and names <= {*dir(privtrain)};"
        "print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        privtrain.trian  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]


def test_every_name_is_typed_and_documented_and_in_the_stub():
    stub = (REPOSITORY / "privtrain" / "__init__.pyi").read_text()
    for name in privtrain.__all__:
        found = getattr(privtrain, name)
        assert found is getattr(api, name)
        assert re.search(rf"\b{name}\b", stub)
        assert inspect.getdoc(found)
        if inspect.isfunction(found):
            hints = typing.get_type_hints(found, {**vars(api), **_only_for_types()})
            assert set(hints) == {*inspect.signature(found).parameters, "return"}


def _only_for_types() -> dict[str, object]:
    from privtrain.commands.verify import Verified
    from privtrain.data.look import Look
    from privtrain.privacy.plan import PrivacyPlan

    return {"Verified": Verified, "Look": Look, "PrivacyPlan": PrivacyPlan}


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tiny_llama, tmp_path, monkeypatch):
    """Five lines, as they stand there, with a tiny model in place of the named one.

    Of the three processes of the attack one is started; the others would import again what is imported here.
    """
    (block,) = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    lines = [line for line in block.splitlines() if line and not line.startswith("import")]
    assert len(lines) <= 5
    named = re.search(r'configure\("([^"]+)"', block)
    assert named is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(subprocess, "run", _without_torch_twice(subprocess.run))
    names: dict[str, typing.Any] = {"rows": rows_of()}
    exec(block.replace(named[1], str(tiny_llama)), names)
    assert names["run"].is_complete
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def _without_torch_twice(start: typing.Callable[..., typing.Any]) -> typing.Callable[..., typing.Any]:
    """``subprocess.run`` that does not import torch for ``attacks score`` and ``attacks report`` again."""

    def run(command: list[str], **options: typing.Any) -> subprocess.CompletedProcess[str]:
        if command[:3] != [sys.executable, "-m", "attacks"] or command[3] == "analyse":
            return start(command, **options)
        done = CliRunner().invoke(attacks_app, command[3:])
        return subprocess.CompletedProcess(command, done.exit_code, done.output, "")

    return run


def test_a_run_is_trained_watched_resumed_verified_and_exported(tiny_llama, users_file, tmp_path):
    tree = tiny_tree(tiny_llama, users_file, tmp_path / "runs")
    del tree["privacy"]["insecure_seed"]
    seen: list[tuple[int, dict[str, typing.Any]]] = []

    def stop_after_two(step, values):
        seen.append((step, dict(values)))
        if step == 3:
            raise Preempted("enough for today")

    with pytest.raises(Preempted):
        privtrain.train(tree, {"tracking.wandb": False}, on_step=stop_after_two)
    run = privtrain.open_run(tmp_path / "runs" / "tiny")
    assert not run.is_complete
    run = privtrain.resume(run)
    assert run.is_complete
    assert run.epsilon == run.statement.epsilon == pytest.approx(privtrain.plan(tree).epsilon)
    assert run.delta == 1e-3
    assert run.metrics[-1]["train/step"] == 4
    assert privtrain.verify(run).release_digest == privtrain.verify(run.released).release_digest
    output = privtrain.export(run, tmp_path / "copy")
    assert (output / "adapter_model.safetensors").is_file()
    released = {name for row in run.metrics for name in row}
    assert {name for _, values in seen for name in values} <= released, "released values alone"
    assert not any(name in ("train/loss", "train/num_units", "perf/step_seconds") for _, v in seen for name in v)


def test_rows_are_kept_privately_and_once(tmp_path):
    first, again = store_rows(rows_of(), tmp_path), store_rows(iter(rows_of()), tmp_path)
    assert first == again
    kept = [path for path in (tmp_path / "rows").rglob("*") if path.is_file()]
    assert {path.name for path in kept} == {first.name, "key", "key.lock"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (first.parent, first.parent.parent)} == {0o700}
    assert json.loads(first.read_text().splitlines()[0]) == rows_of()[0]


def test_name_of_kept_rows_tells_nothing_of_them(tmp_path):
    """A plain hash of the same rows would be the same elsewhere, and could be tried."""
    here, there = store_rows(rows_of(), tmp_path / "a"), store_rows(rows_of(), tmp_path / "b")
    assert here.read_bytes() == there.read_bytes()
    assert here.parent.name != there.parent.name
    assert hashlib.sha256(here.read_bytes()).hexdigest()[:16] not in str(here)


def published_of(model: pathlib.Path, rows: list[dict[str, str]], parent: pathlib.Path) -> dict[str, typing.Any]:
    return public_tree(privtrain.configure(model, rows, num_users=20, output_dir=parent))


def test_what_is_published_does_not_say_whether_rows_changed(tiny_llama, tmp_path):
    """Two runs over rows of one directory: who joined or left in between shows in nothing that both publish."""
    before, after = rows_of(), [*rows_of(), {"author": "u24", "text": "one more text"}]
    assert store_rows(before, tmp_path) != store_rows(after, tmp_path)
    assert published_of(tiny_llama, before, tmp_path) == published_of(tiny_llama, after, tmp_path)


def test_mutant_the_name_that_tells_rows_apart_is_published(tiny_llama, tmp_path, monkeypatch):
    def named_by_rows(rows, parent):
        path = store_rows(rows, parent)
        return path.rename(path.parent / f"rows-{path.parent.name}.jsonl")

    monkeypatch.setattr("privtrain.data.store.store_rows", named_by_rows)
    before, after = rows_of(), [*rows_of(), {"author": "u24", "text": "one more text"}]
    assert published_of(tiny_llama, before, tmp_path) != published_of(tiny_llama, after, tmp_path)


def test_what_is_no_rows_says_what_to_give(tmp_path):
    """A frame iterates over the names of its columns."""

    class Frame:
        def iterrows(self): ...

    for rows in (None, "rows.jsonl", {"user": ["a"], "text": ["x"]}, 3):
        with pytest.raises(ConfigError, match=f"given {type(rows).__name__}; give mappings, one a row"):
            store_rows(rows, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"frame\.to_dict\('records'\)"):
        store_rows(Frame(), tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", [{"user": "a", "text": object()}, {"user": "a", "score": float("nan")}, ["a", "b"], 7])
def test_unusable_rows_are_refused_without_their_values(tmp_path, row):
    with pytest.raises(ConfigError, match="row 2 cannot be kept as JSON"):
        store_rows([{"user": "a", "text": "x"}, row], tmp_path)
    assert not list((tmp_path / "rows").rglob("*.jsonl"))
    with pytest.raises(ConfigError, match="there is none"):
        store_rows([], tmp_path)


def test_a_dataset_is_a_source(tiny_llama, tmp_path):
    import datasets

    table = datasets.Dataset.from_list(rows_of())
    config = privtrain.configure(
        str(tiny_llama), table, num_users=20, output_dir=tmp_path, settings={"privacy.target_epsilon": 4}
    )
    assert (config.data.user_column, config.data.text_column) == ("author", "text")
    assert config.privacy.target_epsilon == 4
    look = privtrain.preview(config)
    assert not look.faults
    assert len(look.lengths) == len(table)


def test_settings_and_directories_that_are_none_are_refused(tree, tmp_path):
    with pytest.raises(ConfigError, match="epsilon: unknown key"):
        privtrain.plan(tree, {"epsilon": 4})
    with pytest.raises(ConfigError, match=r"privacy\.target_epsilom: unknown key"):
        privtrain.plan(tree, {"privacy.target_epsilom": 4})
    with pytest.raises(ConfigError, match="is not the directory of a run"):
        privtrain.open_run(tmp_path)
