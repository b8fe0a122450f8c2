"""``privtrain init``: from a model and a file to a configuration that trains, with every guess shown."""

from __future__ import annotations

import csv
import json
import math

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import privtrain
from privtrain.cli import app
from privtrain.commands.init import guess_columns, write_config
from privtrain.commands.starting_point import plan_for, rounded
from privtrain.config import load_config, validate
from privtrain.config.commented import commented_yaml
from privtrain.errors import ConfigError
from tests.privtrain.bases import save_base, save_tokenizer
from tests.privtrain.test_rows import TALK, TEMPLATE


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


CHATS = [{"conversation_id": i, "customer_id": f"c{i % 40}", "messages": TALK} for i in range(120)]
LABELLED = [{"author": f"a{i % 30}", "review": f"text number {i}", "stars": i % 5, "label": i % 3} for i in range(90)]
TEXTS = [{"UserID": i % 25, "lang": "en", "body": f"some words {i} " * 5} for i in range(100)]


def test_the_columns_of_chats_labels_and_texts_are_guessed(tmp_path):
    chats = guess_columns(write_jsonl(tmp_path / "c.jsonl", CHATS))
    assert chats.tree == {"user_column": "customer_id", "format": "chat", "messages_column": "messages"}
    labelled = guess_columns(write_csv(tmp_path / "l.csv", LABELLED))
    assert labelled.tree == {
        "user_column": "author",
        "format": "classification",
        "text_column": "review",
        "label_column": "label",
        "labels": [0, 1, 2],
    }
    pa.parquet.write_table(pa.Table.from_pylist(TEXTS), tmp_path / "t.parquet")
    texts = guess_columns(tmp_path / "t.parquet")
    assert texts.tree == {"user_column": "UserID", "format": "text", "text_column": "body"}
    pairs = [{"user": "a", "instruction": "q", "output": "a"}] * 3
    found = guess_columns(write_jsonl(tmp_path / "p.jsonl", pairs)).tree
    assert (found["prompt_column"], found["completion_column"]) == ("instruction", "output")


def test_without_a_users_column_nothing_is_guessed(tmp_path):
    """Whose records are whose is no guess: ε would be for nobody."""
    path = write_jsonl(tmp_path / "d.jsonl", [{"id": i, "text": "x"} for i in range(9)])
    with pytest.raises(ConfigError, match=r"no column that looks like a user's id among id, text; .* --user-column"):
        guess_columns(path)
    assert guess_columns(path, "id").tree["user_column"] == "id"
    with pytest.raises(ConfigError, match="no column 'nobody' among"):
        guess_columns(path, "nobody")


def test_what_is_written_is_complete_commented_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tokenizer(save_base(tmp_path / "m"), TEMPLATE)
    write_jsonl(tmp_path / "chats.jsonl", CHATS)
    output = tmp_path / "privtrain.yaml"
    written = write_config("m", [tmp_path / "chats.jsonl"], output)
    assert load_config(output) == written
    shown = capsys.readouterr().out
    assert "data.user_column: customer_id   # Guessed: 40 ids in the first 120 rows" in shown
    assert "data.format: chat   # Guessed: messages holds lists of turns" in shown
    assert written.data.max_length % 64 == 0
    assert written.data.max_length <= 128
    text = output.read_text()
    for part in ("Guessed: messages holds lists of turns", "For 40 users", "# rank: 8", "# if_worse: warn"):
        assert part in text
    with pytest.raises(ConfigError, match="exists already"):
        write_config("m", [tmp_path / "chats.jsonl"], output)


def test_a_faulty_model_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file: .*none\.jsonl"):
        write_config(str(tmp_path), [tmp_path / "none.jsonl"], tmp_path / "o.yaml")
    path = write_jsonl(tmp_path / "d.jsonl", TEXTS)
    with pytest.raises(ConfigError, match="no such model directory"):
        write_config(str(tmp_path / "nowhere"), [path], tmp_path / "o.yaml", user_column="UserID")
    assert not (tmp_path / "o.yaml").exists()


@given(num_users=st.integers(1, 10**9), held_out=st.floats(0, 0.9))
def test_every_starting_point_is_a_valid_plan(num_users, held_out):
    plan = plan_for(num_users, held_out)
    num_training = max(1.0, num_users * (1 - held_out))
    assert 0 < plan["sampling_prob"] <= 1
    assert plan["target_delta"] <= 0.1 / num_training * (1 + 1e-9)
    assert plan["expected_batch_size"] == pytest.approx(plan["sampling_prob"] * num_training, rel=0.01)
    assert plan["num_steps"] >= 20
    assert rounded(num_users) <= num_users
    assert len(str(rounded(num_users)).rstrip("0")) == 1


def test_a_commented_configuration_reads_as_it_was_given(tree, tmp_path):
    tree["data"]["labels"] = ["yes", "no", "010", "1e3", "a: b # c"]
    tree["data"]["format"] = "classification"
    tree["privacy"]["noised_metrics"] = {"loss_range": [0, 4]}
    path = tmp_path / "c.yaml"
    path.write_text(commented_yaml(tree, "a head", {"privacy.target_epsilon": "Needed: this."}))
    assert load_config(path) == validate(tree)
    assert "# Needed: this." in path.read_text()
    assert math.isclose(len(path.read_text().splitlines()), 200, rel_tol=0.5)


def test_init_names_columns_that_it_has_no_use_for(tmp_path):
    """A label in another language is no guess, but the way to a classifier is said."""
    lines = [f"k{n // 2};text {n};{('Lob', 'Tadel')[n % 2]};{n}" for n in range(20)]
    (tmp_path / "rows.csv").write_text("\n".join(["Kunde;Text;Kategorie;Nr", *lines]), encoding="utf-8")
    guess = guess_columns(tmp_path / "rows.csv", "Kunde")
    assert guess.tree == {"user_column": "Kunde", "format": "text", "text_column": "Text"}
    assert guess.notes["format"] == "texts; no use for Kategorie, Nr"
    assert (
        "few values stand in Kategorie: for a classifier of them set data.format: classification"
        in (guess.notes["text_column"])
    )
    wide = {"user": "u", "text": "x", **{f"c{n}": n for n in range(20)}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(wide) + "\n")
    assert guess_columns(tmp_path / "rows.jsonl").notes["format"].endswith(" c6, c7 and 12 more")


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_init_plans_for_those_who_are_not_held_out(tmp_path, tiny_llama, fraction):
    """The README holds half of the users out for the attack job; the batch is then that of the other half."""
    rows = [{"user": f"u{n}", "text": f"text {n}"} for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["init", str(tiny_llama), str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "c.yaml")]
    done = CliRunner().invoke(app, [*words, *(["--held-out-fraction", "0.5"] if fraction else [])])
    assert done.exit_code == 0, done.output
    settings = {"data.held_out_fraction": fraction} if fraction else None
    by_python = privtrain.configure(tiny_llama, tmp_path / "rows.jsonl", settings=settings)
    for config in (load_config(tmp_path / "c.yaml"), by_python):
        assert config.data.held_out_fraction == (fraction or 0.1)
        assert config.privacy.expected_batch_size is not None
        assert config.privacy.sampling_prob is not None
        drawn = config.privacy.sampling_prob * 400 * (1 - config.data.held_out_fraction)
        assert config.privacy.expected_batch_size == pytest.approx(drawn, rel=0.01)
