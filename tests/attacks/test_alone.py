"""Two attack jobs at once, and a ``report/`` that leads or lies open to others: nothing is written into another's."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import shutil
import types
from collections.abc import Callable

import pytest

from attacks.alone import alone
from attacks.analysis import analyse
from attacks.analysis.analyse import analyse_run
from attacks.errors import AttackInputError
from attacks.reporting import record, verify
from attacks.reporting.report import write_report
from attacks.scoring import score
from attacks.signals import REFERENCES_PATH, SIGNALS_PATH
from privtrain.errors import DamagedFile, RunBusy, UnsafePath

SCORER = types.SimpleNamespace(is_main_process=True)


def held_by_a_scorer(path: pathlib.Path) -> None:
    with score._held(path, SCORER):  # pyright: ignore[reportArgumentType]
        pass


USES: dict[str, Callable[[pathlib.Path], object]] = {
    "score": lambda run: held_by_a_scorer(run / SIGNALS_PATH),
    "analyse": analyse_run,
    "report": write_report,
}


@pytest.mark.parametrize("use", USES)
def test_a_second_attack_job_is_refused(make_run, use):
    run = make_run()
    with alone(run / SIGNALS_PATH), pytest.raises(RunBusy, match="another attack job"):
        USES[use](run)


def test_shadows_of_one_run_are_scored_at_the_same_time(make_run):
    run = make_run()
    with alone(run / SIGNALS_PATH), alone(run / REFERENCES_PATH / "shadow-0.parquet", is_writer=True):
        held_by_a_scorer(run / REFERENCES_PATH / "shadow-1.parquet")


def test_without_the_lock_two_jobs_write_at_once(make_run, monkeypatch):
    """The mutant."""
    run = make_run()
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with alone(run / SIGNALS_PATH):
        held_by_a_scorer(run / SIGNALS_PATH)


def test_what_is_no_scored_run_gets_no_private_directory(make_run):
    run = make_run(num_units=0)
    for use in (analyse_run, write_report):
        with pytest.raises(AttackInputError):
            use(run)
    assert not (run / "secret" / "attack").exists()


def linked(path: pathlib.Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def foreign(path: pathlib.Path) -> None:
    path.mkdir()
    os.chown(path, 65534, 65534)


def opened_to(mode: int) -> Callable[[pathlib.Path], None]:
    def leave(path: pathlib.Path) -> None:
        path.mkdir()
        path.chmod(mode)

    return leave


REPORTS = [
    pytest.param(linked, "is a link", id="link"),
    pytest.param(lambda path: path.write_text(""), "is a link or no directory", id="file"),
    pytest.param(opened_to(0o777), "chmod go-w", id="everybody"),
    pytest.param(opened_to(0o1777), "chmod go-w", id="sticky"),
    pytest.param(opened_to(0o775), "chmod go-w", id="group"),
    pytest.param(
        foreign,
        "belongs to user 65534",
        id="foreign",
        marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away"),
    ),
]


@pytest.mark.parametrize(("leave", "why"), REPORTS)
def test_a_planted_report_directory_is_refused(make_run, leave, why):
    run = make_run()
    leave(run / "report")
    with pytest.raises(UnsafePath, match=why):
        analyse_run(run)
    assert not (run / "elsewhere" / "attacks.json").exists()


def test_opened_report_directory_is_refused(analysed):
    run = analysed()
    (run / "report").chmod(0o777)
    with pytest.raises(UnsafePath, match="chmod go-w"):
        write_report(run)


def test_without_its_check_results_are_written_behind_a_link(make_run, monkeypatch):
    """The mutant."""
    run = make_run()
    linked(run / "report")
    monkeypatch.setattr(analyse, "make_public_directory", lambda path: None)
    analyse_run(run)
    assert (run / "elsewhere" / "attacks.json").exists()


@pytest.mark.parametrize("name", ["evil.html", "index.html.bak", "index\u0301.html"])
def test_a_page_that_is_not_the_reports_is_named(reported, name, monkeypatch):
    run = reported()
    monkeypatch.setattr(verify, "_check_target", lambda *_: None)
    verify.verify_report(run)
    (run / "report" / name).write_text("verdict: consistent")
    with pytest.raises(AttackInputError, match="no part of the report"):
        verify.verify_report(run)
    monkeypatch.setattr(verify, "_check_nothing_else", lambda _: None)
    verify.verify_report(run)


def test_a_report_behind_a_link_is_told(reported, monkeypatch):
    run = reported()
    monkeypatch.setattr(verify, "_check_target", lambda *_: None)
    (run / "report").rename(run / "elsewhere")
    (run / "report").symlink_to(run / "elsewhere")
    with pytest.raises(AttackInputError, match="is a link"):
        verify.verify_report(run)


def test_the_report_knows_its_own_files(reported):
    verify._check_nothing_else(reported() / "report")


@pytest.mark.parametrize("value", [None, [], "x", 3])
@pytest.mark.parametrize(("file", "name"), [("report", "files"), ("attacks", "target"), ("attacks", "scoring")])
def test_a_published_report_of_another_form_is_one_line(reported, file, name, value):
    """Without the key, whoever hands it over may have written anything."""
    run = reported()
    shutil.rmtree(run / "secret")
    for path in (run / "report" / "attacks.json", run / "report" / "report.json"):
        facts = json.loads(path.read_text())
        changed = facts if path.stem == file else facts["attacks"] if file == "attacks" else {}
        changed[name] = value
        path.write_text(json.dumps(facts))
    with pytest.raises(DamagedFile, match=f"lacks what a report holds .{name}"):
        verify.verify_report(run)


def test_huge_signals_are_refused_before_hashing(make_run, monkeypatch):
    run = make_run()
    os.truncate(run / SIGNALS_PATH, 1 << 40)  # sparse: it takes no room
    monkeypatch.setattr(record, "sha256_of", lambda *_: pytest.fail("hashed"))
    with pytest.raises(DamagedFile, match="not the file that was sealed"):
        analyse_run(run)
