"""Presidio itself, with its packaged model: what it finds is measured, and nothing calls out."""

from __future__ import annotations

import json
import socket
import sys

import pytest

from attacks.errors import AttackInputError
from attacks.reporting.report import write_report
from attacks.scoring import labeller, pii
from attacks.scoring.score import ScoreOptions, score_run
from attacks.signals import FRESH, SIGNALS_PATH, TRAINING
from privtrain.data.invented_customers import CustomerRecord, Span
from privtrain.job.train import train
from privtrain.run.directory import RunDirectory
from tests.attacks.signal_files import read_signals
from tests.conftest import write_config

pytestmark = pytest.mark.usefixtures("no_self_test")


@pytest.fixture
def no_network(monkeypatch):
    """Any look-up of a name and any connection fails the test, also where the caller would swallow the error."""
    calls = []

    def refuse(*arguments, **_):
        calls.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    pii._analyzer.cache_clear()
    yield
    assert calls == []


@pytest.fixture(scope="module")
def measured():
    return {row["kind"]: row for row in labeller.measure_presidio()["rows"]}


def test_presidio_finds_personal_data_without_a_network(no_network):
    text = "This is Norma Fisher, write to norma@fisher.co.uk or call 759-382-4219."
    found = {text[start:end] for start, end in pii.find_personal_data(text)}
    assert {"Norma Fisher", "norma@fisher.co.uk", "759-382-4219"} <= found


def test_the_guard_sees_a_suffix_list_being_fetched(monkeypatch, tmp_path):
    import tldextract

    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **_: calls.append(a) or (_ for _ in ()).throw(OSError("no")))
    tldextract.TLDExtract(cache_dir=str(tmp_path))("norma@fisher.co.uk")
    assert calls, "tldextract as it comes calls out: the other test would notice"


def test_recall_is_measured_kind_by_kind(measured):
    assert list(measured) == ["account", "birthday", "email", "name", "phone", "street", "all"]
    assert (
        sum(row["num_characters"] for kind, row in measured.items() if kind != "all")
        == (measured["all"]["num_characters"])
    )
    for kind in ("birthday", "email", "name", "phone"):
        assert measured[kind]["recall"] > 0.9
    # Why recall is measured and never assumed: house numbers and this form of account number are missed.
    assert 0.2 < measured["street"]["recall"] < 0.6
    assert measured["account"]["recall"] < 0.2
    assert measured["street"]["found_whole"] + measured["account"]["found_whole"] < 0.1
    assert 0.6 < measured["all"]["recall"] < 0.8
    assert 0.85 < measured["all"]["precision"] < 1


def test_recall_counts_characters_and_whole_spans():
    record = CustomerRecord("u", "Ada, 12 Elm Street", (Span(0, 3, "name"), Span(5, 18, "street")))
    rows = labeller.measure(lambda _: [(0, 5), (8, 11)], [record])
    assert rows == [
        {"kind": "name", "num_spans": 1, "num_characters": 3, "recall": 1.0, "found_whole": 1.0},
        {"kind": "street", "num_spans": 1, "num_characters": 13, "recall": 3 / 13, "found_whole": 0.0},
        {
            "kind": "all",
            "num_spans": 2,
            "num_characters": 16,
            "recall": 6 / 16,
            "found_whole": 0.5,
            "precision": 6 / 8,
        },
    ]


def test_a_run_scored_with_presidio_says_what_it_missed(tree, tmp_path, capsys, no_network):
    source = tmp_path / "customers.jsonl"
    messages = [
        {"user": f"u{n % 12}", "text": f"{n}: call Norma Fisher at 759-382-42{n:02d} about the tent"} for n in range(72)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in messages))
    tree["data"] |= {"source": {"kind": "files", "paths": [str(source)]}, "max_length": 80, "held_out_fraction": 0.5}
    run = RunDirectory(tmp_path / "runs" / "tiny")
    train(write_config(tree, tmp_path / "c.yaml"))
    score_run(run.root, ScoreOptions(spans_column=pii.PRESIDIO))
    for row in read_signals(run.root / SIGNALS_PATH):
        assert row.kind in (FRESH, TRAINING)
        assert 20 <= row.sensitive.sum() <= 40, "a name and a telephone number; a token is a byte"
    assert "of the sensitive characters of 200 invented messages (account 8%" in capsys.readouterr().out
    from attacks.analysis.analyse import analyse_run

    panel = analyse_run(run.root)["panels"]["labeller"]
    assert panel["rows"][-1]["kind"] == "all"
    write_report(run.root)
    for name in ("index.html", "report.md"):
        assert "Recall of the labeller of sensitive tokens" in (run.report / name).read_text(encoding="utf-8")


def test_presidio_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    pii._analyzer.cache_clear()
    with pytest.raises(AttackInputError, match=r"privtrain\[pii\]"):
        pii.find_personal_data("Ada Lovelace")


def test_a_missing_model_is_not_downloaded(monkeypatch, no_network):
    monkeypatch.setattr(pii, "_SPACY_MODELS", ("en_core_web_of_nobody",))
    with pytest.raises(AttackInputError, match=r"privtrain\[pii\]"):
        pii.find_personal_data("Ada Lovelace")
