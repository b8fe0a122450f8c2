from __future__ import annotations

import pathlib
import stat

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attacks import signals
from attacks.errors import AttackInputError
from attacks.signals import DocumentSignals
from privtrain.errors import DamagedFile
from privtrain.run import directory as rundir
from tests.attacks.signal_files import read_signals


def row(user: str = "u", document: str = "d", side: str = "held_in", target=(-1.0, -2.0), base=(-1.5, -2.5)):
    return DocumentSignals(user, document, side, np.array(target), np.array(base))


ROWS = [
    row("b", "1"),
    row("a", "2", target=[-0.25], base=[-4.0]),
    row("a", "1"),
    row("c", "1", "held_out", target=[-1.0, -2.0, -3.0], base=[0.0, -1.0, -2.0]),
]


def test_what_is_written_is_read_back_sorted(tmp_path):
    path = tmp_path / signals.SIGNALS_PATH
    signals.write_signals(path, ROWS)
    found = read_signals(path)
    assert [(r.side, r.user, r.document, r.num_tokens) for r in found] == [
        ("held_in", "a", "1", 2),
        ("held_in", "a", "2", 1),
        ("held_in", "b", "1", 2),
        ("held_out", "c", "1", 3),
    ]
    np.testing.assert_array_equal(found[1].target_logp, np.float32([-0.25]))
    np.testing.assert_array_equal(found[1].base_logp, np.float32([-4.0]))
    np.testing.assert_array_equal(found[3].base_logp, np.float32([0.0, -1.0, -2.0]))
    assert all(r.target_logp.dtype == np.float32 for r in found)


def test_the_file_has_the_declared_columns(tmp_path):
    signals.write_signals(tmp_path / "s.parquet", ROWS)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.schema.equals(signals.SCHEMA)
    assert table.column("num_tokens").type == pa.int32()
    assert table.column("num_tokens").to_pylist() == [2, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_row_order_does_not_change_the_bytes(tmp_path, seed):
    shuffled = [ROWS[place] for place in np.random.default_rng(seed).permutation(len(ROWS))]
    signals.write_signals(tmp_path / "a.parquet", ROWS)
    signals.write_signals(tmp_path / "b.parquet", shuffled)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_only_owner_can_read_file_and_new_directories(tmp_path):
    path = tmp_path / signals.SIGNALS_PATH
    signals.write_signals(path, ROWS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "secret/attack").stat().st_mode) == 0o700


def test_a_crash_while_writing_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "s.parquet"
    signals.write_signals(path, ROWS)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(rundir.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        signals.write_signals(path, ROWS[:2])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.parquet"]


def test_no_rows_round_trip(tmp_path):
    signals.write_signals(tmp_path / "s.parquet", [])
    assert read_signals(tmp_path / "s.parquet") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": "train"}, "side is none of"),
        ({"user": ""}, "without a name or an owner"),
        ({"target": [-1.0]}, "two lists of the same tokens"),
        ({"target": [], "base": []}, "at least one"),
        ({"target": [-1.0, float("nan")]}, "target_logp of document .* holds a value that is NaN"),
        ({"base": [-1.0, float("-inf")]}, "base_logp of document .* holds a value that is NaN, infinite"),
        ({"target": [-1.0, 0.5]}, "above 0"),
    ],
)
def test_a_row_that_is_no_log_probability_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        row(**changes)


def test_a_document_counted_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 documents occur more than once"):
        signals.write_signals(tmp_path / "s.parquet", [row(), row()])


def test_a_user_on_both_sides_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 users stand on both sides"):
        signals.write_signals(tmp_path / "s.parquet", [row("u", "1"), row("u", "2", "held_out")])


def test_reading_checks_what_another_writer_may_have_broken(tmp_path):
    path = tmp_path / "s.parquet"
    signals.write_signals(path, ROWS)
    table = pq.read_table(path)
    wrong = table.set_column(
        signals.SCHEMA.get_field_index("num_tokens"),
        signals.SCHEMA.field("num_tokens"),
        pa.array([2, 2, 2, 3], pa.int32()),
    )
    pq.write_table(wrong.cast(signals.SCHEMA), path)
    with pytest.raises(DamagedFile, match="row 2 cannot be used: num_tokens differs"):
        read_signals(path)
    pq.write_table(pa.concat_tables([table, table]), path)
    with pytest.raises(DamagedFile, match="occur more than once"):
        read_signals(path)
    pq.write_table(table.drop_columns(["base_logp"]), path)
    with pytest.raises(DamagedFile, match="run next: attacks score"):
        read_signals(path)
    pq.write_table(table.replace_schema_metadata({"schema": "privtrain/signals/9"}), path)
    with pytest.raises(DamagedFile, match="privtrain/signals/9"):
        read_signals(path)


def test_a_missing_or_torn_file_names_the_next_command(tmp_path):
    with pytest.raises(AttackInputError, match=r"no signals at .*run next: attacks score"):
        read_signals(tmp_path / "s.parquet")
    signals.write_signals(tmp_path / "s.parquet", ROWS)
    torn = (tmp_path / "s.parquet").read_bytes()[:-40]
    pathlib.Path(tmp_path / "s.parquet").write_bytes(torn)
    with pytest.raises(DamagedFile, match="not a readable parquet file"):
        read_signals(tmp_path / "s.parquet")


def test_a_record_with_nan_is_named():
    """Whoever gets the error must find the record: which document, of whom, of which kind."""
    with pytest.raises(ValueError, match=r"target_logp of document 'doc-7' of user 'u1' \(fresh\)"):
        signals.DocumentSignals("u1", "doc-7", signals.HELD_IN, np.array([-1.0, np.nan]), np.array([-1.0, -2.0]))
