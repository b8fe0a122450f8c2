"""Records with masks and labels: what is predicted, what is dropped, and that a unit's loss is its own."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import processors

from privtrain.config.data import DataSection
from privtrain.config.model import ModelSection
from privtrain.data.corpus import load_corpus
from privtrain.data.encode import Encoder
from privtrain.data.formats import canonical, why_unusable
from privtrain.data.microbatch import Packer
from privtrain.errors import ConfigError
from privtrain.models.load import load_tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<end>\n{% endgeneration %}{% else %}{{ m['content'] }}<end>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: Earlier answers are shortened once a later turn exists, as reasoning models' templates do.
REWRITES = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] if loop.last else m['content'][:1] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where to?"},
    {"role": "assistant", "content": "Nörth."},
    {"role": "user", "content": "Far?"},
    {"role": "assistant", "content": "A mile."},
]


def section(**changes) -> DataSection:
    return DataSection.model_validate({"source": {"kind": "files", "paths": ["x.jsonl"]}, **changes})


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))


def predicted(tokenizer, record) -> str:
    return tokenizer.decode(record.tokens[record.is_target])


def test_text_predicts_everything_but_the_begin_mark(tokenizer):
    (record,) = Encoder(section(), tokenizer).encode(["ab"]).records
    assert record.is_target.tolist() == [False, True, True, True]


def test_only_the_completion_is_predicted(tokenizer):
    data = section(format="prompt_completion", max_length=16)
    rows = [("Q: why? ", "so"), ("", "alone"), ("a prompt that is too long", "never reached")]
    encoded = Encoder(data, tokenizer).encode([canonical(data, row) for row in rows])
    assert [predicted(tokenizer, r) for r in encoded.records] == ["so<end>", "alone<end>", ""]
    assert (encoded.num_truncated, encoded.num_without_target) == (1, 1)
    whole = encoded.records[0]
    assert tokenizer.decode(whole.tokens) == "<end>Q: why? so<end>"


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation"])
def test_only_the_assistants_turns_are_predicted(tokenizer, template):
    tokenizer.chat_template = template
    encoder = Encoder(section(format="chat"), tokenizer)
    (record,) = encoder.encode([canonical(section(format="chat"), [TALK])]).records
    assert predicted(tokenizer, record) == "Nörth.<end>\nA mile.<end>\n"
    assert tokenizer.decode(record.tokens) == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_assistant_tokens_agree_with_library_mask(tokenizer):
    masks = []
    for template in (CHATML, MARKED):
        tokenizer.chat_template = template
        (record,) = Encoder(section(format="chat"), tokenizer).encode([json.dumps(TALK)]).records
        masks.append(record.is_target)
    library = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert np.array_equal(masks[0], masks[1])
    assert library["assistant_masks"] == masks[1].astype(int).tolist()


def test_templates_with_ambiguous_turns_are_refused(tokenizer, tmp_path):
    refused = {None: "no chat template", REWRITES: "changes earlier turns", "{{ 1 / 0": "rendered"}
    for template, problem in refused.items():
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=rf"data\.chat_template_file.*{problem}"):
            Encoder(section(format="chat"), tokenizer)
    (tmp_path / "t.jinja").write_text(CHATML, encoding="utf-8")
    Encoder(section(format="chat", chat_template_file=tmp_path / "t.jinja"), tokenizer)


def test_conversation_refused_by_template_is_counted(tokenizer):
    tokenizer.chat_template = "{% if messages | length > 4 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    encoded = Encoder(section(format="chat"), tokenizer).encode([json.dumps(TALK), json.dumps(TALK[1:3])])
    assert [r.num_targets > 0 for r in encoded.records] == [False, True]
    assert encoded.num_without_target == 1


def test_a_failing_template_is_counted_by_its_error(tokenizer):
    """A record on disk is encoded when a step draws it: a job that ended there would tell who was drawn."""
    tokenizer.chat_template = "{% for m in messages %}{{ '' if 1 / (m.content | length) }}{% endfor %}" + CHATML
    encoder = Encoder(section(format="chat"), tokenizer)
    emptied = [{"role": "user", "content": ""}, *TALK[2:3]]
    assert encoder.encode([json.dumps(emptied), json.dumps(TALK)]).num_without_target == 1
    assert dict(encoder.complaints) == {"the chat template refuses it: ZeroDivisionError": 1}


def test_a_label_is_the_one_position_that_is_predicted(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", pair="<end> $A <end> $B:1", special_tokens=[("<end>", 0)]
    )
    data = section(format="classification", labels=["no", 1], text_pair_column="b", max_length=10)
    rows = [("no", "ab", "cd"), (1, "ab", "cd"), ("1", "a" * 9, "b" * 3)]
    encoded = Encoder(data, tokenizer).encode([canonical(data, row) for row in rows])
    assert [int(r.tokens[-1]) for r in encoded.records] == [0, 1, 1]
    assert all(r.is_target.tolist() == [False] * (len(r) - 1) + [True] for r in encoded.records)
    assert tokenizer.decode(encoded.records[0].tokens[:-1]) == "<end>ab<end>cd"
    assert tokenizer.decode(encoded.records[2].tokens[:-1]) == "<end>aaaa<end>bbb"
    assert (encoded.num_truncated, len(encoded.records[2])) == (1, 10)


def nested(num_levels: int) -> list:
    """A conversation whose tool call has arguments of many levels."""
    arguments = "x"
    for _ in range(num_levels):
        arguments = [arguments]
    call = {"function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]


@pytest.mark.parametrize("num_levels", [100, 600, 100_000])
def test_a_deeply_nested_conversation_is_dropped(num_levels):
    data, text = section(format="chat"), '[{"role":' + "[" * num_levels + "]" * num_levels + "}]"
    values = [text] if num_levels > 900 else [text, nested(num_levels)]
    assert [canonical(data, [value]) for value in values] == [""] * len(values)
    assert {why_unusable(data, [value]).reason for value in values} <= {
        "a conversation is nested too deeply (data.messages_column)",
        "text that is no JSON where a list of turns is needed (data.messages_column)",
    }
    assert canonical(data, [nested(20)])


UNUSABLE = [
    ("prompt_completion", ("a", "  ")),
    ("prompt_completion", ("a", None)),
    ("chat", (None,)),
    ("chat", ("not json",)),
    ("chat", ([{"role": "user", "content": "hi"}],)),
    ("chat", ([{"role": "assistant", "content": ["parts"]}],)),
    ("classification", ("maybe", "text")),
    ("classification", (True, "text")),
    ("classification", (1.0, "text")),
    ("classification", ("yes", " ")),
]


@pytest.mark.parametrize(("kind", "values"), UNUSABLE)
def test_rows_with_nothing_to_learn_are_dropped(kind, values):
    data = section(format=kind, labels=["yes", "no", "True"] if kind == "classification" else None)
    assert canonical(data, values) == ""


def test_parquet_jsonl_and_csv_give_the_same_conversations(tmp_path):
    rows = [{"user": f"u{i}", "messages": TALK[: 3 + 2 * (i % 2)]} for i in range(4)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["user", "messages"], *([r["user"], json.dumps(r["messages"])] for r in rows)])
    digests = set()
    for kind in ("parquet", "jsonl", "csv"):
        data = section(format="chat", source={"kind": "files", "paths": [str(tmp_path / f"a.{kind}")]})
        digests.add(load_corpus(data).manifest_sha256)
    assert len(digests) == 1


def test_the_columns_of_a_format_are_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"user": "a", "text": "b"}\n', encoding="utf-8")
    source = {"kind": "files", "paths": [str(tmp_path / "a.jsonl")]}
    with pytest.raises(ConfigError, match=r"data\.prompt_column.*\n.*data\.completion_column"):
        load_corpus(section(format="prompt_completion", source=source))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "classification"}, "data.labels"),
        ({"labels": ["a", "b"]}, "data.labels"),
        ({"format": "classification", "labels": ["1", 1]}, "twice"),
        ({"text_pair_column": "b"}, "text_pair_column"),
        ({"chat_template_file": "t"}, "chat_template_file"),
        ({"format": "chat", "source": {"kind": "plays"}}, "plays"),
    ],
)
def test_keys_that_do_not_fit_the_format_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        section(**changes)


def test_a_units_weight_counts_its_own_predicted_tokens(tokenizer):
    data = section(format="prompt_completion", max_length=16)
    rows = [("ab", "cd"), ("a", "bcd"), ("a prompt that is too long", "x"), ("a", "b")]
    records = Encoder(data, tokenizer).encode([canonical(data, row) for row in rows]).records
    units = [records[:2], records[2:3], records[3:]]
    packer = Packer(4, 16, 0)
    weights, num_targets = {}, {}
    for batch in packer.pack(units, packer.num_batches(units)):
        for owner, weight, mask in zip(batch.owner.tolist(), batch.row_weight.tolist(), batch.target_mask, strict=True):
            if owner >= 0:
                unit = batch.owners[owner]
                weights[unit] = weight
                num_targets[unit] = num_targets.get(unit, 0) + int(mask.sum())
    assert weights == pytest.approx({0: 1 / 7, 1: 1.0, 2: 1 / 2})
    assert num_targets == {0: 7, 1: 0, 2: 2}


# What is released of the tokenizer.

_KINDS = {
    "text": ({}, lambda text: text),
    "prompt_completion": ({}, lambda text: json.dumps({"prompt": text, "completion": text})),
    "chat": ({}, lambda text: json.dumps([{"role": "assistant", "content": text}])),
    "classification": ({"labels": [0, 1]}, lambda text: json.dumps({"texts": [text], "label": 1})),
}


def _saved_after(tokenizer, kind: str, texts, directory) -> dict[str, bytes]:
    changes, written = _KINDS[kind]
    tokenizer.chat_template = CHATML
    Encoder(section(format=kind, max_length=12, **changes), tokenizer).encode([written(text) for text in texts])
    tokenizer.save_pretrained(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _tells_of_records(tiny_llama, kind: str, directory) -> bool:
    """Whether the files of a tokenizer say what its last record was like."""
    saved = [
        _saved_after(load_tokenizer(ModelSection(name_or_path=str(tiny_llama))), kind, texts, directory / str(number))
        for number, texts in enumerate((["short", "long " * 20], ["long " * 20, "short"]))
    ]
    return saved[0] != saved[1]


@pytest.mark.parametrize("kind", _KINDS)
def test_saved_tokenizer_tells_nothing_of_the_records(tiny_llama, kind, tmp_path):
    assert not _tells_of_records(tiny_llama, kind, tmp_path)


def test_mutant_the_released_tokenizer_cuts_records(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("privtrain.data.encode.copy.deepcopy", lambda tokenizer: tokenizer)
    assert _tells_of_records(tiny_llama, "classification", tmp_path)
