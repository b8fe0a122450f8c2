"""Studies: the grid is fixed, what is complete is never run again or overwritten, verdicts follow the numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from privtrain.cli import app
from privtrain.errors import ConfigError, RunBusy
from privtrain.files.private import locked_file
from privtrain.studies import jobs
from privtrain.studies.findings import (
    Statement,
    Verdict,
    judge_at_least,
    judge_best,
    judge_direction,
    judge_fact,
    judge_no_effect,
    judge_not_worse,
    summary,
)
from privtrain.studies.recipe import Recipe, expand, fill
from privtrain.studies.results import CellResult, Estimate, Results
from privtrain.studies.runner import Study, StudyIncompleteError, StudyOptions, run_study
from tests import jobs as real_jobs
from tests.privtrain import tiny_study

CLAIM = Statement("a is more than b", "Table 1", "1.0")

#: Stands in for training: the loss is the noise plus the seed over ten, and every start leaves a line.
FAKE = """
import json, pathlib, sys, yaml
config = yaml.safe_load(open(sys.argv[1]))
run = pathlib.Path(sys.argv[2])
with open(sys.argv[3], "a") as starts:
    starts.write(run.parent.name + chr(10))
noise = config["privacy"]["noise_multiplier"]
if noise == 3.0:
    print("something is wrong", flush=True)
    sys.exit(4)
run.mkdir(exist_ok=True)
row = {"train/step": 4, "eval/held_out_loss": noise + config["privacy"]["insecure_seed"] / 10}
(run / "metrics.jsonl").write_text(json.dumps(row))
"""


@pytest.fixture
def recipe(tree: dict[str, Any], tmp_path: pathlib.Path) -> dict[str, Any]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    base = {key: value for key, value in tree.items() if key != "run"}
    return {
        "study": "tiny",
        "module": "tests.privtrain.tiny_study",
        "settings": {"noise": 0.5},
        "base": base,
        "axes": {
            "method": {
                "quiet": {"privacy.noise_multiplier": 0.5},
                "loud": {"privacy.noise_multiplier": 2},
                "quiet-too": {"privacy.noise_multiplier": 5},
            },
            "k": {1: {"privacy.records_per_user": 1}, 2: {"privacy.records_per_user": 2}},
        },
        "exclude": [{"method": "loud", "k": 2}],
        "seeds": [0, 1, 2],
        "commands": [f"python {script} {{config}} {{run}} {tmp_path}/starts"],
    }


def _run(recipe: dict[str, Any], tmp_path: pathlib.Path, **options: Any) -> pathlib.Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    output = options.setdefault("output", tmp_path / "study")
    run_study("tiny", StudyOptions(recipe=path, **options))
    return output


def _starts(tmp_path: pathlib.Path) -> list[str]:
    return (tmp_path / "starts").read_text().splitlines()


def _as_text(recipe: dict[str, Any]) -> dict[str, Any]:
    tree = {**recipe, "axes": {a: {str(v): o for v, o in axis.items()} for a, axis in recipe["axes"].items()}}
    return {**tree, "exclude": [{k: [str(v)] for k, v in item.items()} for item in recipe["exclude"]]}


def _expanded(recipe: dict[str, Any]) -> list[Any]:
    return expand(Recipe.model_validate(_as_text(recipe)), tiny_study.settle)


def test_grid_is_deterministic_in_recipe_order(recipe):
    cells = _expanded(recipe)
    assert [c.name for c in cells if c.seed == 0] == [
        "quiet-1-s0",
        "quiet-2-s0",
        "loud-1-s0",
        "quiet-too-1-s0",
        "quiet-too-2-s0",
    ]
    assert [c.seed for c in cells][:4] == [0, 1, 2, 0]
    assert [c.digest for c in cells] == [c.digest for c in _expanded(recipe)]
    digests = {c.name: c.digest for c in cells}
    assert digests["quiet-1-s0"] == digests["quiet-too-1-s0"]  # equal noise by computation: one job
    assert len(set(digests.values())) == 9
    assert cells[0].tree["privacy"]["insecure_seed"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"base": {"lora": {"rank": 3}}},
        {"commands": ["privtrain train {config}"]},
        {"prepare": {"x.jsonl": "privtrain invent-customers {file}"}},
    ],
)
def test_whatever_decides_what_a_job_does_is_in_its_digest(recipe, change):
    before = {c.digest for c in _expanded(recipe)}
    changed = {**recipe, **{k: {**recipe["base"], **v} if k == "base" else v for k, v in change.items()}}
    assert before.isdisjoint({c.digest for c in _expanded(changed)})


def test_faults_of_all_cells_come_before_anything_starts(recipe, tmp_path):
    recipe["axes"]["method"]["quiet"] = {"privacy.nois_multiplier": 1}
    recipe["axes"]["k"][2] = {"privacy.records_per_user": 0}
    recipe["commands"] = ["python {konfig}"]
    with pytest.raises(ConfigError) as caught:
        _run(recipe, tmp_path)
    text = str(caught.value)
    assert "quiet-1-s0: privacy.nois_multiplier: unknown key; did you mean privacy.noise_multiplier?" in text
    assert "quiet-too-2-s1: privacy.records_per_user" in text
    assert "unknown place" in text
    assert not (tmp_path / "study").exists()
    with pytest.raises(ConfigError, match=r"no recipe of .no-such. at scale small"):
        run_study("no-such", StudyOptions())


@pytest.mark.parametrize(("key", "value"), [("axes", {"k": [1, 2]}), ("exclude", {"k": 2})])
def test_axes_and_rules_of_another_form_are_refused(recipe, tmp_path, key, value):
    """An axis that was left out without a word would make another study."""
    recipe[key] = value
    with pytest.raises(ConfigError, match=rf"{key}.*(dictionary|list)"):
        _run(recipe, tmp_path)


def test_a_resumed_study_runs_nothing_that_is_complete(recipe, tmp_path):
    output = _run(recipe, tmp_path, num_jobs=2)
    assert len(_starts(tmp_path)) == 9  # 15 cells, six of them the same job as another
    pages = [(output / "report" / name).read_bytes() for name in ("index.html", "report.md", "report.json")]
    _run(recipe, tmp_path)
    assert len(_starts(tmp_path)) == 9
    assert pages == [(output / "report" / name).read_bytes() for name in ("index.html", "report.md", "report.json")]


def test_a_job_that_was_cut_off_is_run_again_in_its_directory(recipe, tmp_path):
    output = _run(recipe, tmp_path)
    done = next(iter(sorted(output.glob("cells/*/done.json"))))
    done.unlink()
    _run(recipe, tmp_path)
    assert _starts(tmp_path)[9:] == [done.parent.name]


def test_changed_cell_runs_beside_the_old_one(recipe, tmp_path):
    output = _run(recipe, tmp_path)
    before = {path: path.read_bytes() for path in output.glob("cells/*/run/metrics.jsonl")}
    recipe["axes"]["method"]["loud"]["privacy.noise_multiplier"] = 2.5
    _run(recipe, tmp_path)
    assert len(_starts(tmp_path)) == 9 + 3
    assert all(path.read_bytes() == content for path, content in before.items())
    facts = json.loads((output / "report" / "report.json").read_text())
    assert facts["numbers"]["loud"]["mean"] == pytest.approx(2.6)


def test_cell_with_record_of_another_digest_is_incomplete(recipe, tmp_path):
    output = _run(recipe, tmp_path)
    done = next(iter(sorted(output.glob("cells/*/done.json"))))
    done.write_text(done.read_text().replace('"digest": "', '"digest": "0'))
    _run(recipe, tmp_path)
    assert len(_starts(tmp_path)) == 10


def test_a_failed_cell_is_reported_and_the_rest_goes_on(recipe, tmp_path):
    recipe["axes"]["method"]["quiet"]["privacy.noise_multiplier"] = 3.0
    path = tmp_path / "study"
    with pytest.raises(StudyIncompleteError, match="6 of 15 jobs failed") as caught:
        _run(recipe, tmp_path)
    assert caught.value.exit_code == 1
    assert len(list(path.glob("cells/*/done.json"))) == 9
    for name in ("index.html", "report.md", "report.json"):
        text = (path / "report" / name).read_text()
        assert "something is wrong" in text, name
        assert "quiet-1-s0" in text, name
    with pytest.raises(StudyIncompleteError):
        _run(recipe, tmp_path, only=("quiet-1-s0",))
    assert len(_starts(tmp_path)) == 16  # failed cells are tried again, the others are not
    assert "Not measured" in (path / "report" / "report.md").read_text()


def test_only_runs_what_was_asked_for_and_says_what_is_open(recipe, tmp_path):
    output = _run(recipe, tmp_path, only=("loud-*",))
    assert len(_starts(tmp_path)) == 3
    assert "6 jobs are still to be run" in (output / "report" / "report.md").read_text()
    with pytest.raises(ConfigError, match="no cell is named lout"):
        _run(recipe, tmp_path, only=("lout",))


def test_a_dry_run_touches_nothing(recipe, tmp_path, capsys):
    output = _run(recipe, tmp_path, dry_run=True)
    assert not output.exists()
    printed = capsys.readouterr().out
    assert "15 cells, 9 jobs" in printed
    assert "(shared)" in printed


def test_paper_scale_is_handed_out_unless_it_is_to_run_here(recipe, tmp_path, capsys):
    output = _run(recipe, tmp_path, scale="paper")
    printed = capsys.readouterr().out
    assert not (tmp_path / "starts").exists()
    names = (output / "cells.txt").read_text().splitlines()
    assert len(names) == 9
    assert "--array 0-8" in printed
    assert f"--here --only {names[0]}" in printed
    _run(recipe, tmp_path, scale="paper", here=True, only=(names[0],))
    assert len(_starts(tmp_path)) == 1
    _run(recipe, tmp_path, scale="paper", submit=f"{sys.executable} -c print()")
    assert len((output / "cells.txt").read_text().splitlines()) == 8


def test_one_array_task_runs_the_cell_of_its_line(recipe, tmp_path):
    output = _run(recipe, tmp_path, scale="paper")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "privtrain"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m privtrain "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "4",
        "PYTHONPATH": str(real_jobs.REPOSITORY),
    }
    script = real_jobs.REPOSITORY / "launch" / "slurm" / "study.sbatch"
    arguments = ["tiny", "--scale", "paper", "--output", str(output), "--recipe", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        ["bash", str(script), str(output / "cells.txt"), *arguments],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fifth = (output / "cells.txt").read_text().splitlines()[4]
    assert [p.parent.name.rsplit("-", 1)[0] for p in output.glob("cells/*/done.json")] == [fifth]


def test_data_are_prepared_once_and_whole(recipe, tmp_path):
    maker = tmp_path / "make.py"
    maker.write_text("import sys; open(sys.argv[1], 'w').write('x')\nif len(sys.argv) > 2: sys.exit(1)")
    recipe["prepare"] = {"x.jsonl": f"python {maker} {{file}} fail"}
    with pytest.raises(ConfigError, match=r"prepare.x.jsonl"):
        _run(recipe, tmp_path)
    assert not list(tmp_path.glob("study/data/*/x.jsonl"))
    recipe["prepare"] = {"x.jsonl": f"python {maker} {{file}}"}
    recipe["base"]["data"]["source"]["paths"] = ["{data}/x.jsonl"]
    output = _run(recipe, tmp_path)
    (made,) = output.glob("data/*/x.jsonl")
    config = yaml.safe_load(next(output.glob("cells/*/config.yaml")).read_text())
    assert config["data"]["source"]["paths"] == [str(made)]
    maker.write_text("raise SystemExit(1)")
    _run(recipe, tmp_path)


def test_two_studies_never_run_the_same_cell_at_once(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = StudyOptions(recipe=tmp_path / "recipe.yaml", output=tmp_path / "study")
    job = Study.open("tiny", options).jobs[0]
    job.directory.mkdir(parents=True)
    processes = jobs.Processes(jobs.thread_environment(1))
    with locked_file(job.directory / ".lock"), pytest.raises(RunBusy):
        jobs.run_job(job, processes)
    assert jobs.run_job(job, processes) == "complete"


def test_threads_are_said_to_every_library():
    environment = jobs.thread_environment(3)
    assert {environment[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"3"}
    assert environment["WANDB_MODE"] == os.environ["WANDB_MODE"]


def test_a_path_with_a_space_stays_one_word():
    assert fill("privtrain train {config}", {"config": "a b/c.yaml"}) == ["privtrain", "train", "a b/c.yaml"]


def test_sigterm_ends_the_jobs_and_the_same_command_goes_on(recipe, tmp_path):
    sleeper = tmp_path / "sleep.py"
    sleeper.write_text("import sys, time, pathlib\npathlib.Path(sys.argv[1]).write_text('')\ntime.sleep(60)")
    marker = tmp_path / "began"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "commands": [f"python {sleeper} {marker}"]}))
    arguments = ["study", "tiny", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "study")]
    environment = {**os.environ, "PYTHONPATH": str(real_jobs.REPOSITORY)}
    study = subprocess.Popen([sys.executable, "-m", "privtrain", *arguments], env=environment)
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    study.send_signal(signal.SIGTERM)
    assert study.wait(30) == 75
    assert not list(tmp_path.glob("study/cells/*/done.json"))
    assert not list(tmp_path.glob("study/cells/*/failed.json"))


def test_second_signal_during_the_first_stops_the_jobs():
    """Ctrl-C twice: the second handler runs in the thread in which the first one holds the lock."""
    processes, num_asked = jobs.Processes(jobs.thread_environment(1)), 0

    class InterruptedProcess:
        def terminate(self):
            nonlocal num_asked
            num_asked += 1
            if num_asked == 1:
                processes.stop()

    interrupted: Any = InterruptedProcess()
    processes._running.add(interrupted)
    first = threading.Thread(target=processes.stop, daemon=True)
    first.start()
    first.join(10)
    assert not first.is_alive(), "the second handler waits for the first one, which it interrupted"
    assert num_asked == 2


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1.0, 1.1, 0.9), Verdict.REPRODUCED),
        ((-1.0, -1.1, -0.9), Verdict.CONTRADICTED),
        ((1.0, -1.0, 0.2), Verdict.UNDECIDED),
        ((1.0,), Verdict.NOT_MEASURED),
    ],
)
def test_a_verdict_follows_from_the_interval(values, verdict):
    claim = judge_direction(CLAIM, Estimate(values))
    assert claim.verdict is verdict
    assert (f"n={len(values)}") in claim.ours


@pytest.mark.parametrize(
    ("values", "least", "verdict"),
    [
        ((0.01, 0.0, -0.01), 0.05, Verdict.CONTRADICTED),  # a zero that is known well enough
        ((0.01, 0.0, -0.01), 0.02, Verdict.UNDECIDED),
        ((0.02, 0.021, 0.019), 0.05, Verdict.REPRODUCED),  # small, and of the claimed sign
        ((0.2, 0.0, -0.2), 0.05, Verdict.UNDECIDED),
    ],
)
def test_a_true_zero_is_decided_by_the_least_that_counts(values, least, verdict):
    claim = judge_direction(CLAIM, Estimate(values), least=least)
    assert claim.verdict is verdict
    assert ("the least that counts" in claim.reason) is (verdict is Verdict.CONTRADICTED)


def test_an_undecided_claim_says_what_would_decide_it():
    claim = judge_direction(dataclasses.replace(CLAIM, expected=0.2), Estimate((1.0, -1.0, 0.2)))
    assert "0.200 (the paper's) takes" in claim.power
    assert claim.power in summary([claim])[0]
    assert claim.numbers is not None
    assert claim.numbers["power"]["num_seeds"] == 3
    json.dumps(claim.numbers, allow_nan=False)
    shown = judge_direction(CLAIM, Estimate((1.0, 1.1, 0.9)))
    assert shown.power not in summary([shown])[0]
    none = judge_no_effect(CLAIM, Estimate((0.01, -0.09, 0.03)), margin=0.05)
    assert none.verdict is Verdict.UNDECIDED
    assert "a true zero is within ± 0.050 takes" in none.power


@pytest.mark.parametrize(
    ("leads", "verdict"),
    [
        ({"a": (1.0, 1.1, 0.9), "b": (3.0, 3.1, 2.9)}, Verdict.REPRODUCED),
        ({"a": (1.0, 1.1, 0.9), "b": (9.0, -3.0, 2.9)}, Verdict.UNDECIDED),  # the nearest rival alone would do
        ({"a": (-1.0, -1.1, -0.9), "b": (3.0, 3.1, 2.9)}, Verdict.CONTRADICTED),
        (
            {"a": (-1.0, -1.5, -0.5), **dict.fromkeys("bcdef", (3.0, 3.1, 2.9))},
            Verdict.UNDECIDED,
        ),  # one in six by chance
        ({}, Verdict.NOT_MEASURED),
    ],
)
def test_the_best_of_several_is_better_than_each(leads, verdict):
    claim = judge_best(CLAIM, {rival: Estimate(values) for rival, values in leads.items()})
    assert claim.verdict is verdict
    assert bool(leads) is ("against a, the best other" in claim.ours)


def test_differences_know_whether_their_arms_had_the_same_split(recipe, tmp_path):
    """By the commitments of the runs: a pair of two splits, and a statement without one, are mutants."""
    cells = [c for c in _expanded(recipe) if c.values["k"] == "1" and c.seed < 2]
    complete = []
    for cell in cells:
        run = tmp_path / cell.name
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"train/step": 1, "x": 1.0}')
        (run / "privacy.json").write_text(json.dumps({"split_commitment": f"split {cell.seed}"}))
        complete.append(CellResult(cell, run))
    quiet, loud = {"method": "quiet"}, {"method": "loud"}

    def same(statement: dict[str, str] | None) -> bool | None:
        if statement is not None:
            (tmp_path / "loud-1-s1" / "privacy.json").write_text(json.dumps(statement))
        results = Results(Recipe.model_validate(_as_text(recipe)), [CellResult(c.cell, c.run) for c in complete], cells)
        difference = results.difference("x", quiet, loud)
        assert difference is not None
        return difference.same_split

    assert same(None) is True
    assert same({"split_commitment": "another"}) is False
    assert same({}) is None


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.4, 0.41, 0.39), Verdict.REPRODUCED),
        ((0.31, 0.35, 0.27), Verdict.REPRODUCED),  # the mean is above, the interval is not
        ((0.9, -0.2, 0.4), Verdict.UNDECIDED),  # above on average, and zero is within
        ((0.29, 0.31, 0.27), Verdict.UNDECIDED),
        ((0.1, 0.11, 0.09), Verdict.CONTRADICTED),
        ((0.4,), Verdict.NOT_MEASURED),
    ],
)
def test_a_target_for_a_share_needs_mean_and_interval(values, verdict):
    claim = judge_at_least(CLAIM, Estimate(values), 0.3)
    assert claim.verdict is verdict
    assert f"{100 * Estimate(values).mean:.1f}" in claim.ours or verdict is Verdict.NOT_MEASURED


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.0, 0.0, 0.0), Verdict.REPRODUCED),  # the same plan
        ((0.1, -0.1, 0.02), Verdict.REPRODUCED),
        ((-1.0, -1.1, -0.9), Verdict.REPRODUCED),
        ((0.1, 0.11, 0.09), Verdict.CONTRADICTED),
        ((0.4,), Verdict.NOT_MEASURED),
    ],
)
def test_not_worse_is_judged_by_the_interval(values, verdict):
    assert judge_not_worse(CLAIM, Estimate(values)).verdict is verdict
    assert judge_not_worse(CLAIM, None).verdict is Verdict.NOT_MEASURED


def test_a_verdict_without_noise_and_without_numbers():
    assert judge_fact(CLAIM, True, ours="1 ≤ 2", reason="computed").verdict is Verdict.REPRODUCED
    assert judge_fact(CLAIM, False, ours="3 > 2", reason="computed").verdict is Verdict.CONTRADICTED
    assert judge_direction(CLAIM, None).verdict is Verdict.NOT_MEASURED


def test_the_interval_is_students():
    low, high = Estimate((1.0, 2.0, 3.0)).interval or (0, 0)
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)  # table of t, 2 df
    assert Estimate((1.0,)).interval is None
    assert "no interval" in Estimate((1.0,)).text()


@pytest.mark.parametrize(("loud", "words"), [(2.0, "Reproduced"), (0.2, "Contradicted")])
def test_report_is_self_contained_and_says_what_reproduced(recipe, tmp_path, loud, words):
    recipe["axes"]["method"]["loud"]["privacy.noise_multiplier"] = loud
    output = _run(recipe, tmp_path) / "report"
    page, markdown = (output / "index.html").read_text(), (output / "report.md").read_text()
    facts = json.loads((output / "report.json").read_text())
    assert f"{words}: More noise costs | more — difference {loud - 0.5:.3f}" in markdown
    assert f"{words}: More noise costs | more" in page
    assert facts["claims"][0]["verdict"] == words.lower()
    assert facts["numbers"]["loud"]["values"] == pytest.approx([loud, loud + 0.1, loud + 0.2])
    assert "3 seeds are few" in markdown
    for text in (markdown, page):
        assert "shows 0.000 with power 80 %" in text
        assert "arms of one seed share split, sample, noise" in text
        assert f"commit {facts['software']['report']['commit'] or 'unknown'}" in text
        assert "--scale small --output" in text
    assert facts["software"]["jobs"] == [facts["software"]["report"]]
    assert "More noise costs \\| more (Table 1) | 0.5 nats |" in markdown
    assert page.count("<svg") == 3
    assert not re.search(r'(src|href)="(?!#|data:)', re.sub(r'href="#[^"]*"', "", page))
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert (output / "curves.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_a_whole_study_of_real_jobs_in_seconds(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(real_jobs.REPOSITORY))
    recipe["base"]["tracking"]["release_held_out_metrics"] = True
    recipe["axes"] = {"method": {"quiet": None, "loud": {"privacy.noise_multiplier": 50}}}
    recipe["exclude"], recipe["seeds"] = [], [0]
    recipe["commands"] = ["privtrain train {config}"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    arguments = ["study", "tiny", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "study")]
    done = CliRunner().invoke(app, [*arguments, "--jobs", "2"])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "study" / "report" / "report.json").read_text())
    assert facts["cells"] == {"planned": 2, "complete": 2, "jobs": 2}
    assert facts["numbers"]["loud"]["n"] == 1
