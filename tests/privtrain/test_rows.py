"""Rows and conversations that people have: read as meant, or refused with file, row, rule and key, never a value."""

from __future__ import annotations

import json
import os
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privtrain import cli
from privtrain.config import validate
from privtrain.config.data import DataSection
from privtrain.config.model import ModelSection
from privtrain.data import look
from privtrain.data.corpus import load_corpus
from privtrain.data.encode import Encoder
from privtrain.data.formats import canonical
from privtrain.data.look import check_rows
from privtrain.errors import ConfigError, Fault, PlanMismatch, PrivtrainError
from privtrain.files.writable import why_unwritable
from privtrain.inputs import check_inputs, load_checked
from privtrain.job.train import train
from privtrain.models.load import load_tokenizer
from privtrain.process.launcher import launch
from tests.conftest import write_config
from tests.privtrain.bases import save_base, save_tokenizer

pytestmark = pytest.mark.usefixtures("no_self_test")

SECRET = "my own secret words"
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}],
}
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def section(path: pathlib.Path | str, **changes) -> DataSection:
    return DataSection.model_validate({"source": {"kind": "files", "paths": [str(path)]}, **changes})


def corpus_of(tmp_path, name: str, content: str | bytes, **changes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_corpus(section(path, **changes))


def refused(tmp_path, name: str, content: str | bytes, **changes) -> str:
    with pytest.raises(ConfigError) as caught:
        corpus_of(tmp_path, name, content, **changes)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


READ = {
    "a mark of a spreadsheet": ("d.csv", "\ufeffuser,text\nann,x\n"),
    "a mark before JSON": ("d.jsonl", '\ufeff{"user": "ann", "text": "x"}\n'),
    "a long field": ("d.csv", f"user,text\nann,{'x' * 200_000}\n"),
    "columns that the first line lacks": ("d.jsonl", '{"text": "x"}\n{"user": "ann", "text": "x"}\n'),
    "blank lines first": ("d.jsonl", '\n\n{"user": "ann", "text": "x"}\n'),
    "lines that end as on Windows": ("d.jsonl", '{"user": "ann", "text": "x"}\r\n\r\n'),
}


@pytest.mark.parametrize("case", READ)
def test_files_as_people_have_them_are_read(tmp_path, case):
    corpus = corpus_of(tmp_path, *READ[case])
    assert list(corpus.records) == ["ann"]


def test_broken_line_is_named_by_its_number(tmp_path):
    lines = [json.dumps({"user": "a", "text": "x"})] * 400 + ["{" + SECRET]
    assert "line 401" in refused(tmp_path, "d.jsonl", "\n".join(lines))
    assert "line 801" in refused(tmp_path, "e.jsonl", "\n\n".join(lines))


@pytest.mark.parametrize(
    "content", [f'[{{"user": "a", "text": "{SECRET}"}}]', f'["{SECRET}"]', "5", "null", "[\n{}\n]"]
)
def test_json_that_is_not_one_object_a_line_says_so(tmp_path, content):
    said = refused(tmp_path, "d.jsonl", content)
    assert "holds one object with named columns a line" in said
    assert "d.jsonl" in said


@pytest.mark.parametrize(
    "line",
    [
        f'{{"user": "a", "text": "{SECRET}", "text": "y"}}',
        '{"user": "a", "user": "b", "text": "x"}',
        f'{{"user": "a", "text": "x", "more": [{{"{SECRET}": 1, "{SECRET}": 2}}]}}',
    ],
)
def test_a_row_that_names_a_key_twice_is_refused(tmp_path, line):
    """Whose record it is, or what it says, would depend on the reader."""
    said = refused(tmp_path, "d.jsonl", '{"user": "a", "text": "x"}\n' * 2000 + line + "\n")
    assert "line 2001: an object names a key twice" in said
    talk = f'[{{"role": "assistant", "content": "{SECRET}", "content": ""}}]'.replace('"', '""')
    assert "a turn names a key twice" in refused(tmp_path, "d.csv", f'user,messages\na,"{talk}"\n', format="chat")


def test_other_encodings_are_named(tmp_path):
    assert "UTF-16); save it as UTF-8" in refused(tmp_path, "d.csv", "user,text\nann,x\n".encode("utf-16"))


WHY = {
    "content parts": (
        "chat",
        [{"role": "assistant", "content": [{"type": "text", "text": SECRET}]}],
        "a list for content",
    ),
    "from and value": ("chat", [{"from": "gpt", "value": SECRET}], "a turn has no role"),
    "no content": ("chat", [{"role": "user"}], "no content"),
    "no answer": ("chat", [{"role": "user", "content": SECRET}], "no assistant turn"),
    "turns that are texts": ("chat", [SECRET], "a turn is a value of type str"),
    "a text for turns": ("chat", SECRET, "text that is no JSON"),
    "nothing": ("chat", None, "no conversation"),
    "turns as completion": ("prompt_completion", [{"role": "assistant", "content": SECRET}], "is data.format: chat"),
    "numbers": ("text", 17, "a number where data.text_column needs text"),
    "blank": ("text", "  ", "no text in the column"),
    "another label": ("classification", SECRET, "a label that data.labels does not name"),
}
COLUMNS = {"chat": "messages", "prompt_completion": "completion", "text": "text", "classification": "label"}


@pytest.mark.parametrize("case", WHY)
def test_no_usable_row_says_why_with_counts(tmp_path, case):
    kind, value, expected = WHY[case]
    row = {"prompt": "p", "completion": "c", "text": "t", "messages": TALK, COLUMNS[kind]: value}
    rows = [{"user": f"u{i}", **row} for i in range(7)] + [{**row, "user": None}]
    changes = {"labels": ["no", "yes"]} if kind == "classification" else {}
    said = refused(tmp_path, "d.jsonl", "".join(json.dumps(r) + "\n" for r in rows), format=kind, **changes)
    assert "no usable row among 8: 7 × " in said
    assert expected in said
    assert f"data.{COLUMNS[kind]}_column" in said
    assert "1 × no user id in the column that data.user_column names" in said


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(value=json_values, kind=st.sampled_from(["chat", "text", "prompt_completion", "classification"]))
def test_whatever_a_row_holds_it_is_used_or_has_a_reason(tmp_path, value, kind):
    row = {"user": "u", "prompt": "p", "completion": "c", "text": "t", "messages": TALK, COLUMNS[kind]: value}
    changes = {"labels": ["no", "yes"]} if kind == "classification" else {}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    data = section(path, format=kind, **changes)
    values = [row[getattr(data, key)] for key in data.column_keys]
    if canonical(data, values):
        assert load_corpus(data).num_records == 1
    else:
        with pytest.raises(ConfigError, match="1 × "):
            load_corpus(data)


def test_an_older_form_of_tool_calls_is_named(tmp_path):
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    with pytest.raises(ConfigError, match="function_call, the older form of tool_calls; convert it"):
        corpus_of_talks(tmp_path, [[TALK[0], call]])


def test_tool_calls_without_content_are_kept(tmp_path):
    talks = [[TALK[0], CALL, {"role": "tool", "content": "5"}, TALK[1]], [TALK[0], CALL], TALK]
    rows = "".join(json.dumps({"user": f"u{i}", "messages": talk}) + "\n" for i, talk in enumerate(talks))
    corpus = corpus_of(tmp_path, "d.jsonl", rows, format="chat")
    assert corpus.num_records == 3
    (kept,) = corpus.records["u1"]
    assert json.loads(kept)[1]["content"] == ""  # templates expect a text


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}INSIDE"
    "{% endgeneration %}OUTSIDE{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def encoder_with(tmp_path, template: str | None, **changes) -> Encoder:
    save_tokenizer(tmp_path / "t", template)
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tmp_path / "t")))
    return Encoder(section("x.jsonl", format="chat", **changes), tokenizer)


@pytest.mark.parametrize(("inside", "outside"), [("", "{{ eos_token }}"), ("\n", "{{ eos_token }}\n"), ("", "")])
def test_a_generation_block_without_its_end_mark_is_refused(tmp_path, inside, outside):
    with pytest.raises(ConfigError, match="would never learn to stop"):
        encoder_with(tmp_path, MARKED.replace("INSIDE", inside).replace("OUTSIDE", outside))


def test_a_generation_block_with_its_end_mark_is_taken(tmp_path):
    encoder = encoder_with(tmp_path, MARKED.replace("INSIDE", "{{ eos_token }}").replace("OUTSIDE", "\n"))
    (record,) = encoder.encode([json.dumps(TALK)]).records
    assert record.tokens[record.is_target].tolist()[-1] == 1


@pytest.mark.parametrize("marks_itself", [False, True])
@pytest.mark.parametrize("weight", [0, 0.0, False, "0"])
def test_turns_of_weight_zero_are_context(tmp_path, marks_itself, weight):
    """OpenAI's files of chats mark so what is not to be learned."""
    template = MARKED.replace("INSIDE", "{{ eos_token }}").replace("OUTSIDE", "") if marks_itself else TEMPLATE
    encoder = encoder_with(tmp_path, template)

    def learned(*weights) -> str:
        talk = [{"role": "user", "content": "q"}]
        for number, value in enumerate(weights):
            talk.append({"role": "assistant", "content": f"answer{number}", "weight": value})
            talk.append({"role": "user", "content": "q"})
        (record,) = encoder.encode([canonical(section("x.jsonl", format="chat"), [talk])]).records
        return encoder.tokenizer.decode(record.tokens[record.is_target])

    assert learned(weight, 1) == "answer1</s>"
    assert learned(1, weight, None) == "answer0</s>answer2</s>"
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": weight}]
    with pytest.raises(ConfigError, match="those of weight 0 are context"):
        corpus_of_talks(tmp_path, [talk])


def test_blocks_that_are_no_turns_leave_weights_unread(tmp_path):
    """The template marks two blocks in one turn: which is whose cannot be told, so nothing is predicted."""
    marked = MARKED.replace("INSIDE", "{{ eos_token }}").replace("OUTSIDE", "")
    further_block = "{% if m.content == 'two' %}{% generation %}!{% endgeneration %}{% endif %}"
    template = marked.replace("{% endgeneration %}", "{% endgeneration %}" + further_block)
    encoder = encoder_with(tmp_path, template)
    talk = [*TALK, {"role": "user", "content": "q"}, {"role": "assistant", "content": "two", "weight": 0}]
    (record,) = encoder.encode([json.dumps(talk)]).records
    assert record.num_targets == 0
    assert encoder.complaints == {"the chat template keeps no assistant turn apart in it": 1}


def corpus_of_talks(tmp_path, talks):
    rows = "".join(json.dumps({"user": f"u{i}", "messages": talk}) + "\n" for i, talk in enumerate(talks))
    return corpus_of(tmp_path, "talks.jsonl", rows, format="chat")


def test_template_that_refuses_everything_is_quoted(tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE
    encoder = encoder_with(tmp_path, refuses)
    talks = [[{"role": "system", "content": SECRET}, *TALK]] * 70
    with pytest.raises(ConfigError) as caught:
        check_rows(corpus_of_talks(tmp_path, talks), encoder, section("x", format="chat"))
    assert "70 × the chat template refuses it: no system turns" in str(caught.value)
    most = section("x", format="chat", max_unusable_fraction=1)
    check_rows(corpus_of_talks(tmp_path, [*talks, TALK]), encoder, most)  # then one that teaches is enough


def test_template_error_that_quotes_a_record_is_hidden(tmp_path):
    quotes = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('bad: ' + messages[0].content) }}{% endif %}"
        + TEMPLATE
    )
    encoder = encoder_with(tmp_path, quotes)
    with pytest.raises(ConfigError) as caught:
        check_rows(
            corpus_of_talks(tmp_path, [[{"role": "system", "content": SECRET}, *TALK]]),
            encoder,
            section("x", format="chat"),
        )
    assert SECRET not in str(caught.value)
    assert "1 × the chat template refuses it: TemplateError" in str(caught.value)


def test_records_cut_before_their_answer_say_which_key(tmp_path):
    encoder = encoder_with(tmp_path, TEMPLATE, max_length=8)
    with pytest.raises(ConfigError, match=r"raise data\.max_length"):
        check_rows(corpus_of_talks(tmp_path, [TALK]), encoder, section("x", format="chat"))


def test_a_template_among_several_is_the_default(tmp_path):
    save_tokenizer(tmp_path / "t")
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tmp_path / "t")))
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ 1 / 0 }}"}
    Encoder(section("x.jsonl", format="chat"), tokenizer)


@settings(max_examples=25)
@given(text=st.text("ab ", max_size=6), before=st.integers(0, 2), after=st.integers(0, 2))
def test_marks_that_a_text_carries_are_not_doubled(tmp_path_factory, text, before, after):
    place = tmp_path_factory.getbasetemp() / "marks"
    if not place.exists():
        save_tokenizer(place)
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(place)))
    (plain, marked) = (
        Encoder(section("x.jsonl"), tokenizer).encode([text, "<s>" * before + text + "</s>" * after]).records
    )
    assert plain.tokens.tolist() == marked.tokens.tolist()
    data = section("x.jsonl", format="prompt_completion")
    rows = [canonical(data, ("p", f"c{text}c")), canonical(data, ("<s>" * before + "p", f"c{text}c" + "</s>" * after))]
    (plain, marked) = Encoder(data, tokenizer).encode(rows).records
    assert plain.tokens.tolist() == marked.tokens.tolist()


def test_a_classifiers_marks_are_not_doubled(tmp_path):
    from tokenizers import processors

    save_tokenizer(tmp_path / "t")
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tmp_path / "t")))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    data = section("x.jsonl", format="classification", labels=["no", "yes"])
    rows = [canonical(data, ("no", text)) for text in ("ab", "<s>ab</s>")]
    plain, marked = Encoder(data, tokenizer).encode(rows).records
    assert plain.tokens.tolist() == marked.tokens.tolist()


def test_a_data_set_of_a_script_is_refused_in_words(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text("import datasets\n")
    data = DataSection.model_validate({"source": {"kind": "hub", "name": str(tmp_path / "old")}})
    with pytest.raises(ConfigError, match="loaded by a script"):
        load_corpus(data)


def test_places_that_cannot_be_written_are_seen_before_training(tree, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    tree["run"]["output_dir"] = str(tmp_path / "file" / "runs")
    with pytest.raises(ConfigError, match=r"run\.output_dir: .*file is not a directory"):
        load_checked(write_config(tree, tmp_path / "c.yaml"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "may not write into" in why_unwritable(tmp_path / "runs")


def test_faults_of_schema_model_and_files_come_at_once(tree, tmp_path):
    tree["privacy"]["num_steps"] = True
    tree["data"]["user_column"] = "author"
    tree["model"]["name_or_path"] = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError) as caught:
        load_checked(write_config(tree, tmp_path / "c.yaml"))
    assert {fault.path for fault in caught.value.faults} == {
        "privacy.num_steps",
        "data.user_column",
        "model.name_or_path",
    }


@pytest.mark.parametrize("is_whole", [True, False])
def test_faulty_template_comes_with_the_other_faults(tree, tmp_path, is_whole):
    chats(tree, tmp_path, "{% for m in messages %}{{ m.content }")
    tree["run"]["output_dir"] = str(write_config({}, tmp_path / "a file"))
    tree["privacy"]["num_steps"] = 4 if is_whole else True
    with pytest.raises(ConfigError) as caught:
        load_checked(write_config(tree, tmp_path / "c.yaml"))
    second = "run.output_dir" if is_whole else "privacy.num_steps"
    assert {fault.path for fault in caught.value.faults} == {"data.chat_template_file", second}
    tree["data"]["chat_template_file"] = str(tmp_path / "t.jinja")
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"data\.chat_template_file: .*t\.jinja is not UTF-8"):
        load_checked(write_config(tree, tmp_path / "c.yaml"))


def test_faulty_template_comes_with_rows_that_cannot_be_used(tree, tmp_path):
    chats(tree, tmp_path, "{% for m in messages %}{{ m.content }{% endfor %}")
    assert {fault.path for fault in _faults_of(tree)} == {"data.chat_template_file"}
    part = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    rows = "".join(json.dumps({"user": f"u{i}", "messages": [part]}) + "\n" for i in range(9))
    (tmp_path / "d.jsonl").write_text(rows)
    template, source = _faults_of(tree)
    assert template.path == "data.chat_template_file"
    assert "no usable row among 9: 9 × a turn has a list for content" in source.problem


def _faults_of(tree) -> tuple[Fault, ...]:
    with pytest.raises(ConfigError) as caught:
        check_inputs(validate(tree))
    return tuple(caught.value.faults)


def chats(tree, tmp_path, template: str):
    """A job on conversations that the template refuses."""
    base = save_base(tmp_path / "m")
    save_tokenizer(base, template)
    rows = "".join(
        json.dumps({"user": f"u{i % 9}", "messages": [{"role": "system", "content": "s"}, *TALK]}) + "\n"
        for i in range(30)
    )
    (tmp_path / "d.jsonl").write_text(rows)
    tree["model"]["name_or_path"] = str(base)
    tree["data"] |= {
        "source": {"kind": "files", "paths": [str(tmp_path / "d.jsonl")]},
        "format": "chat",
        "max_length": 64,
    }


def test_refused_start_leaves_directory_free(tree, tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE
    chats(tree, tmp_path, refuses)
    path = write_config(tree, tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="no system turns"):
        train(path)
    save_tokenizer(tmp_path / "m", TEMPLATE)
    train(path, ["privacy.num_steps=2", "lora.rank=1"])
    assert (tmp_path / "runs" / "tiny" / "release.json").exists()
    with pytest.raises(PlanMismatch, match=r"is finished and was trained with another training\.learning_rate"):
        train(path, ["privacy.num_steps=2", "lora.rank=1", "training.learning_rate=0.5"])
    train(path, ["privacy.num_steps=2", "lora.rank=1", "performance.num_checkpoints_kept=5"])  # changes nothing


def test_mutant_without_the_look_noise_alone_is_trained_on(tree, tmp_path, monkeypatch):
    """Plant: nobody looks whether anything is learned."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE
    chats(tree, tmp_path, refuses)
    monkeypatch.setattr("privtrain.job.train.check_rows", lambda *_: ())
    train(write_config(tree, tmp_path / "c.yaml"))
    assert (tmp_path / "runs" / "tiny" / "release.json").exists()
    assert look.check_rows is check_rows


def test_a_launch_file_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    command = [
        "accelerate",
        "launch",
        "--config_file",
        "launch/accelerate/cpu.yaml",
        "-m",
        "privtrain",
        "train",
        "c.yaml",
    ]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrivtrainError, match=r"no such file: launch/accelerate/cpu\.yaml"):
        launch(command)
    monkeypatch.setattr("sys.argv", ["privtrain", "launch", "accelerate", "launch", "--config_file=none.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "no such file: none.yaml" in capsys.readouterr().err
