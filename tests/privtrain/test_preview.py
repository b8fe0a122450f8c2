"""``privtrain preview``, and its findings that stop a start."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privtrain.commands.preview import as_text, preview
from privtrain.config.model import ModelSection
from privtrain.data.corpus import group_by_user, load_corpus
from privtrain.data.look import check_rows, look_at, sample_of
from privtrain.errors import ConfigError
from privtrain.inputs import load_checked
from privtrain.job.train import train
from privtrain.models.load import load_tokenizer
from tests.conftest import write_config
from tests.privtrain.bases import save_base, save_tokenizer
from tests.privtrain.test_rows import TALK, TEMPLATE, Encoder, section


@pytest.fixture
def chat(tree, tmp_path):
    """Conversations of which every second is refused by the template, one has no user, and one no answer."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE
    save_tokenizer(save_base(tmp_path / "m"), refuses)
    talks = [TALK, [{"role": "system", "content": "s"}, *TALK]] * 10
    rows = [{"user": f"u{number}", "messages": talk} for number, talk in enumerate(talks)]
    rows += [{"user": None, "messages": TALK}, {"user": "u1", "messages": TALK[:1]}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["model"]["name_or_path"] = str(tmp_path / "m")
    files = {"kind": "files", "paths": [str(tmp_path / "d.jsonl")]}
    tree["data"] |= {"source": files, "format": "chat", "max_length": 64}
    return tree


def test_preview_shows_rows_by_rule_and_what_is_predicted(chat, tmp_path, capsys):
    path = write_config(chat, tmp_path / "c.yaml")
    assert preview(path, ["data.max_unusable_fraction=0.6"], num_shown=22, as_json=False) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "dropped: no user id",
        "no assistant turn with content or tool_calls",
        "the chat template refuses it",
        "no system turns",
        "⟦a</s>⟧",
    ):
        assert part in shown
    assert not (tmp_path / "runs").exists()


def test_preview_and_training_refuse_the_same_rows(chat, tmp_path, capsys):
    path = write_config(chat, tmp_path / "c.yaml")
    assert preview(path, [], num_shown=0, as_json=True) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["num_without_user"] == found["num_empty"] == 1
    assert (found["num_predicting_nothing"], found["num_looked_at"]) == (10, 20)
    (fault,) = found["faults"]
    assert "55% of 22 rows would teach the model nothing" in fault["problem"]
    assert "no system turns" in fault["problem"]
    with pytest.raises(ConfigError, match="55% of 22 rows would teach the model nothing") as caught:
        train(path)
    assert fault["problem"] in str(caught.value)


@pytest.mark.parametrize("share", [0.54, 0.55])
def test_a_start_is_refused_above_the_allowed_share_only(chat, tmp_path, share):
    chat["data"]["max_unusable_fraction"] = share
    config = load_checked(write_config(chat, tmp_path / "c.yaml"))
    encoder = Encoder(config.data, load_tokenizer(config.model))

    found = look_at(load_corpus(config.data), encoder, config.data)
    assert bool(found.faults) == (share < 12 / 22)
    assert not encoder.complaints, "training counts them itself"


def test_absent_labels_and_truncation_are_warned_of(tmp_path):
    save_tokenizer(tmp_path / "t")
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tmp_path / "t")))
    data = section("x", format="classification", labels=["no", "yes", "perhpas"], max_length=8)
    rows = [(f"u{number}", json.dumps({"label": number % 2, "texts": ["x" * 20]})) for number in range(9)]
    encoder = Encoder(data, tokenizer)
    warnings = check_rows(group_by_user(rows), encoder, data)
    assert any("has the label 'perhpas'" in warning for warning in warnings)
    assert any("100% of records are cut at data.max_length=8" in warning for warning in warnings)
    (record,) = encoder.encode([rows[1][1]]).records
    assert as_text(record, encoder, data.labels).plain.endswith("⟦yes⟧")


@pytest.mark.parametrize(("num_ids", "is_warned"), [(None, False), (258, False), (300, False), (400, True)])
def test_tokenizer_of_another_model_is_asked_about(tmp_path, num_ids, is_warned):
    """Its ids are all embedded, so nothing else would show it."""
    save_tokenizer(tmp_path / "t")
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tmp_path / "t")))
    warnings = check_rows(group_by_user([("u", "x")]), Encoder(section("x"), tokenizer, num_ids), section("x"))
    assert any("is it this model's tokenizer?" in warning for warning in warnings) == is_warned


def test_a_record_cannot_move_the_cursor(tmp_path):
    save_tokenizer(tmp_path / "t")
    encoder = Encoder(section("x"), load_tokenizer(ModelSection(name_or_path=str(tmp_path / "t"))))
    (record,) = encoder.encode(["a\x1b[2Jb\r[red]c"]).records
    assert as_text(record, encoder).plain == "<s>⟦a\\x1b[2Jb\\r[red]c</s>⟧"


def test_the_sample_is_spread_over_all_users():
    corpus = group_by_user([(f"u{number:03d}", f"{number}") for number in range(100)])
    assert sample_of(corpus, 4) == ["0", "25", "50", "75"]
    assert len(sample_of(corpus, 1000)) == 100


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), size=st.integers(1, 40))
def test_the_sample_is_every_nth_record_of_all(sizes, size):
    corpus = group_by_user([(f"u{user:02d}", f"{user} {n}") for user, num in enumerate(sizes) for n in range(num)])
    records = [text for texts in corpus.records.values() for text in texts]
    found = sample_of(corpus, size)
    assert found == records[:: -(-len(records) // size)]
    assert len(found) <= size
