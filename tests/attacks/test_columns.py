"""Further columns are read by the rules that made the training data: dropped duplicates, records on disk."""

from __future__ import annotations

import csv
import json
import math
import pathlib
import types
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from attacks import evidence
from attacks.analysis.analyse import analyse_run
from attacks.errors import AttackInputError
from attacks.scoring import columns
from attacks.scoring.columns import days_of, read_columns, spans_of
from attacks.scoring.documents import read_manifest, read_used
from attacks.scoring.score import ScoreOptions, score_run
from attacks.signals import FRESH, HELD_IN, SIGNALS_PATH, TRAINING
from privtrain.config import load_config
from privtrain.config.data import DataSection, FilesSource
from privtrain.config.training import PerformanceSection
from privtrain.data.corpus import Corpus, digests_of, load_corpus, source_files
from privtrain.errors import EXIT_WRONG_INPUT, DamagedFile, PrivtrainError
from privtrain.job.train import train
from privtrain.run.directory import RunDirectory
from privtrain.run.sources import read_sources
from tests.attacks.signal_files import read_signals
from tests.conftest import write_config

pytestmark = pytest.mark.usefixtures("no_self_test")

NUM_DISTINCT = 8


def rows_of(user: int) -> list[dict[str, object]]:
    """Each record three times: as it is, with other white space, and again as it is; spans tell the rows apart."""
    rows = []
    for record in range(NUM_DISTINCT):
        text = f"user {user} says {record}"
        for copy, written in enumerate((f" {text}", text.replace(" ", "  "), text)):
            rows.append({"user": f"u{user}", "text": written, "spans": [[1 + copy, 3 + copy]], "day": copy})
    return rows


def read_now(data: DataSection, corpus: Corpus, names: list[str], wanted: Any = None) -> Any:
    """Read columns of the files as they are now: the rules of the rows alone decide."""
    assert isinstance(data.source, FilesSource)
    return read_columns(data, corpus, names, digests_of(source_files(data.source)), wanted)


@pytest.fixture
def rows(tmp_path):
    """Rows of all users, taking turns, and one that nobody owns."""
    of_users = [rows_of(user) for user in range(8)]
    mixed = [row for turn in zip(*of_users, strict=True) for row in turn]
    mixed.insert(5, {"user": None, "text": "nobody's", "spans": [], "day": 0})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    return path


@pytest.fixture
def config_of(tree, rows, tmp_path):
    def make(name: str, *, on_disk: bool, selection: bool = False):
        tree["run"]["name"] = name
        tree["data"] |= {"source": {"kind": "files", "paths": [str(rows)]}, "deduplicate": "within_user"}
        tree["data"] |= {"held_out_fraction": 0.5, "attack_min_records": 2, "attack_fraction": 0.25}
        tree["performance"].pop("index_dir", None)
        if on_disk:
            tree["performance"]["index_dir"] = str(tmp_path / "index")
        if selection:
            tree["privacy"] |= {"records_per_user": 2, "selection": "longest"}
        return write_config(tree, tmp_path / f"{name}.yaml"), RunDirectory(tmp_path / "runs" / name)

    return make


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_record_has_the_columns_of_the_row_that_was_kept(config_of, on_disk):
    config = load_config(config_of("columns", on_disk=on_disk)[0])
    corpus = load_corpus(config.data, config.performance.index_dir)
    found = read_now(config.data, corpus, ["spans", "day"])
    assert set(found) == {(f"u{user}", index) for user in range(8) for index in range(NUM_DISTINCT)}
    assert all(row == {"spans": [[1, 3]], "day": 0, "offset": 1} for row in found.values())
    assert read_now(config.data, corpus, ["day"], [("u3", 2)]) == {("u3", 2): {"day": 0, "offset": 1}}


@pytest.mark.parametrize("on_disk", [False, True])
def test_without_deduplication_every_row_counts(config_of, on_disk):
    config = load_config(config_of("all", on_disk=on_disk)[0], ["data.deduplicate=none"])
    corpus = load_corpus(config.data, config.performance.index_dir)
    found = read_now(config.data, corpus, ["day"])
    assert [found["u1", index]["day"] for index in range(6)] == [0, 1, 2, 0, 1, 2]


def test_rows_that_changed_are_refused(config_of, rows):
    config = load_config(config_of("changed", on_disk=False)[0])
    corpus = load_corpus(config.data)
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(line.replace("user 1 says 2", "user 1 said 2") for line in lines))
    with pytest.raises(AttackInputError, match="not those that were trained on"):
        read_now(config.data, corpus, ["day"])
    rows.write_text("\n".join(line for line in lines if "user 1 says 2" not in line.replace("  ", " ")))
    with pytest.raises(AttackInputError, match="not those that were trained on"):
        read_now(config.data, corpus, ["day"], [("u1", NUM_DISTINCT - 1)])


def test_dropped_duplicates_are_not_scored_in_memory_or_on_disk(config_of):
    contents = []
    for on_disk in (False, True):
        path, run = config_of("scored", on_disk=on_disk)
        if on_disk:
            path, run = config_of("scored-on-disk", on_disk=True)
        train(path)
        score_run(run.root, ScoreOptions(spans_column="spans", date_column="day", num_training_records=8))
        rows = read_signals(run.root / SIGNALS_PATH)
        fresh = {user: set(indices) for user, indices in read_manifest(run)["attacker"].items()}
        assert len(rows) == 8 * NUM_DISTINCT
        assert all(int(row.document) < NUM_DISTINCT for row in rows)
        assert {row.kind for row in rows} == {FRESH, TRAINING}
        assert sum(row.kind == FRESH for row in rows) == sum(map(len, fresh.values()))
        for row in rows:
            assert row.date == 0.0
            assert np.flatnonzero(row.sensitive).tolist() == [0, 1]
        contents.append([(row.document, row.kind, row.base_logp.tolist()) for row in rows])
    assert contents[0] == contents[1]


def test_training_records_that_selection_left_out_are_counted(config_of):
    path, run = config_of("selected", on_disk=False, selection=True)
    train(path)
    score_run(run.root, ScoreOptions(num_training_records=8))
    rows = read_signals(run.root / SIGNALS_PATH)
    left_out = read_used(run)["left_out"]
    num_scored = sum(row.kind == TRAINING and row.side == HELD_IN for row in rows)
    num_left_out = sum(map(len, left_out.values()))
    assert 0 < num_left_out < num_scored
    assert analyse_run(run.root)["num_training_records_left_out_by_selection"] == num_left_out


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, "yesterday", "nan"])
def test_a_date_that_is_no_finite_number_is_refused(value):
    with pytest.raises(AttackInputError, match="date column"):
        days_of(value)


@pytest.mark.parametrize("value", ["[[0, 1e999]]", "[[0]]", "{", [[0, math.inf]], 5, "[" * 100_000])
def test_spans_that_are_none_are_refused(value):
    with pytest.raises(AttackInputError, match="spans column"):
        spans_of(value, 0)


def written(kind: str, place: pathlib.Path) -> pathlib.Path:
    rows = [{"user": f"user-{n:03d}", "text": f"says {n}", "day": str(n)} for n in range(30)]
    path = place / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read_all(path: pathlib.Path, known: Corpus) -> None:
    data = DataSection.model_validate({"source": {"kind": "files", "paths": [str(path)]}})
    config: Any = types.SimpleNamespace(data=data, performance=PerformanceSection())
    evidence.read_corpus(config)
    read_now(data, known, ["day"])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_damaged_rows_are_one_line_without_a_value(kind, tmp_path):
    path, rng = written(kind, tmp_path), np.random.default_rng(0)
    content = path.read_bytes()
    known = load_corpus(DataSection.model_validate({"source": {"kind": "files", "paths": [str(path)]}}))
    read_all(path, known)
    told = []
    for place in rng.integers(0, len(content), 60).tolist():
        flipped = bytearray(content)
        flipped[place] ^= int(rng.integers(1, 256))
        deep = content[:place] + b"[" * 100_000 + content[place:]
        for spoiled in (bytes(flipped), content[:place], deep):
            path.write_bytes(spoiled)
            try:
                read_all(path, known)
            except PrivtrainError as error:
                told.append((error.exit_code, str(error)))
    assert len(told) > 30
    for code, message in told:
        assert code == EXIT_WRONG_INPUT
        assert not any(part in message for part in ("\n", "user-0", "says")), message
    path.write_bytes(content)
    aside = path.rename(tmp_path / "aside")
    path.symlink_to(aside)  # data may lie behind links
    read_all(path, known)


def test_mutant_without_the_guard_ends_in_a_traceback(tmp_path, monkeypatch):
    path = written("parquet", tmp_path)
    data = DataSection.model_validate({"source": {"kind": "files", "paths": [str(path)]}})
    known = load_corpus(data)
    monkeypatch.setattr(columns, "READ_FAULTS", ())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(pa.ArrowInvalid):
        read_now(data, known, ["day"])


@hypothesis.settings(max_examples=60)
@hypothesis.given(kind=st.sampled_from(["jsonl", "csv", "parquet"]), place=st.floats(0, 1), bits=st.integers(1, 255))
def test_columns_of_a_file_with_any_other_byte_are_refused(tmp_path, kind, place, bits):
    """The digest of the data covers the columns that are trained on; a date beside them could say anything."""
    path = written(kind, tmp_path)
    data = DataSection.model_validate({"source": {"kind": "files", "paths": [str(path)]}})
    known, digests, content = load_corpus(data), digests_of([path]), bytearray(path.read_bytes())
    assert read_columns(data, known, ["day"], digests)
    content[int(place * (len(content) - 1))] ^= bits
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=path.name) as refused:
        read_columns(data, known, ["day"], digests)
    assert refused.value.exit_code == EXIT_WRONG_INPUT
    assert "\n" not in str(refused.value)


def test_mutant_without_digests_of_files_reads_another_date(tmp_path):
    path = written("jsonl", tmp_path)
    data = DataSection.model_validate({"source": {"kind": "files", "paths": [str(path)]}})
    known, digests = load_corpus(data), digests_of([path])
    path.write_text(path.read_text().replace('"day": "7"', '"day": "8"'))
    with pytest.raises(DamagedFile):
        read_columns(data, known, ["day"], digests)
    assert read_now(data, known, ["day"])["user-007", 0]["day"] == "8"


@pytest.mark.parametrize("on_disk", [False, True])
def test_scoring_reads_dates_of_training_files(config_of, rows, on_disk):
    path, run = config_of("dated", on_disk=on_disk)
    train(path)
    assert read_sources(run) == digests_of([rows])
    content = rows.read_text()
    rows.write_text(content.replace('"day": 0', '"day": 9', 1))
    with pytest.raises(PrivtrainError, match=r"rows\.jsonl changed since the run was prepared or began"):
        score_run(run.root, ScoreOptions(date_column="day"))
    rows.write_text(content)
    run.sources.write_text(run.sources.read_text().replace("sources/1", "sources/2"))
    with pytest.raises(DamagedFile, match=r"sources\.json"):
        score_run(run.root, ScoreOptions(date_column="day"))
    run.sources.unlink()
    with pytest.raises(DamagedFile, match=r"sources\.json is missing"):
        score_run(run.root, ScoreOptions(date_column="day"))
