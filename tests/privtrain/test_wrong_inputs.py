"""What would train, merge or price something else than was meant is refused, by the key to change."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from attacks.scoring.columns import _rows
from privtrain import cli
from privtrain.commands.export import export_run
from privtrain.commands.init import guess_columns, guess_configuration
from privtrain.config import load_config, validate
from privtrain.config.data import DataSection, FilesSource
from privtrain.config.model import ModelSection
from privtrain.data.corpus import check_source, digests_of, load_corpus
from privtrain.errors import ConfigError
from privtrain.inputs import check_inputs
from privtrain.job.advice import warnings
from privtrain.models.load import load_base, load_tokenizer
from privtrain.privacy.plan import PrivacyPlan
from privtrain.process.exit import run_command
from privtrain.run.base_model import check_model
from tests.conftest import write_config
from tests.privtrain.bases import change_weights


def config_over(tree, folder, name: str, content: str | bytes, **data):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tree["data"] |= {"source": {"kind": "files", "paths": [str(path)]}, **data}
    return validate(tree)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"user_column": "text"}, r"data\.user_column and data\.text_column name one column, 'text'"),
        (
            {"format": "prompt_completion", "prompt_column": "q", "completion_column": "q"},
            r"data\.prompt_column and data\.completion_column name one column",
        ),
        (
            {"format": "classification", "labels": ["a", "b"], "label_column": "text"},
            r"data\.label_column and data\.text_column name one column",
        ),
        ({"format": "chat", "messages_column": "user"}, r"data\.user_column and data\.messages_column name one column"),
    ],
)
def test_one_column_for_two_things_is_refused(tree, data, words):
    """A text as the user id makes every text a user; a label as the text gives the answer away."""
    tree["data"] |= data
    with pytest.raises(ConfigError, match=words):
        validate(tree)


def test_columns_of_other_formats_may_have_any_name(tree):
    tree["data"] |= {"user_column": "prompt", "label_column": "text"}
    validate(tree)


@pytest.mark.parametrize("again", ["{users}", "{folder}/*.jsonl", "{folder}/../{name}/users.jsonl"])
def test_file_that_is_named_twice_is_refused(tree, users_file, again):
    """Its records would be two units each, where the unit is the record."""
    folder = users_file.parent
    further = again.format(users=users_file, folder=folder, name=folder.name)
    tree["data"]["source"]["paths"] = [str(users_file), further]
    (fault,) = check_source(validate(tree).data)
    assert fault.path == "data.source.paths"
    assert "is named 2 times; each row would count as often" in fault.problem


@pytest.mark.parametrize("number", [1, 7])
def test_fields_behind_the_last_column_are_refused(tree, tmp_path, number):
    """A text with a comma and without quotes would be cut there in silence."""
    rows = ["user,text", *(f"u{row},a text" for row in range(9))]
    rows[number] += ", with more"
    config = config_over(tree, tmp_path, "rows.csv", "\n".join(rows) + "\n")
    with pytest.raises(ConfigError, match=rf"row {number}: it has more fields than the first line.*put quotes"):
        load_corpus(config.data)


def test_fields_that_are_missing_are_counted(tree, tmp_path):
    config = config_over(tree, tmp_path, "rows.csv", "user,text\nu1,a text\nu2\n")
    corpus = load_corpus(config.data)
    assert (corpus.num_records, corpus.counts.num_empty) == (1, 1)


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_ids_that_are_one_number_in_two_forms_are_refused(tree, tmp_path, is_on_disk):
    """A table library writes 12.0 where another row of the column is empty."""
    index_dir = tmp_path / "index" if is_on_disk else None
    config = config_over(tree, tmp_path, "rows.csv", "user,text\n12,a\n12.0,b\n7.0,c\nv1.0,d\nv1,e\n")
    with pytest.raises(ConfigError, match=r"data\.user_column: 1 ids stand both as whole numbers and with \.0"):
        load_corpus(config.data, index_dir)
    config = config_over(tree, tmp_path, "rows.csv", "user,text\n12.0,b\n7.0,c\nv1.0,d\nv1,e\n")
    assert len(load_corpus(config.data, index_dir).records) == 4


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("user;text", 'u1;"größer, und; mehr"'),
        ("user\ttext", "u1\tgrößer, und; mehr"),
        ("user|text", "u1|größer, und; mehr"),
        ("\ufeffuser;text", 'u1;"größer, und; mehr"'),
        ('"user";"a, b";text', 'u1;;"größer, und; mehr"'),
        ("sep=;\r\nuser;text", 'u1;"größer, und; mehr"'),
        ('"sep=\t"\r\nuser\ttext', "u1\tgrößer, und; mehr"),
        ("a;b,user,text", 'x,u1,"größer, und; mehr"'),
        ('"a;b",user,text', 'x,u1,"größer, und; mehr"'),
    ],
)
def test_first_line_of_a_table_says_what_separates(tree, tmp_path, head, row):
    """Spreadsheets write semicolons where a comma is the decimal mark. Rows, which are private, decide nothing."""
    config = config_over(tree, tmp_path, "rows.csv", f"{head}\r\n{row}\r\n")
    assert check_source(config.data) == []
    assert dict(load_corpus(config.data).records) == {"u1": ("größer, und; mehr",)}
    assert isinstance(config.data.source, FilesSource)
    (read,) = _rows(config.data.source, digests_of(config.data.source.paths))  # as the attack job reads them
    assert (read["user"], read["text"]) == ("u1", "größer, und; mehr")


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_files_are_named(tree, tmp_path, name, content):
    (fault,) = check_source(config_over(tree, tmp_path, name, content).data)
    assert fault.path == "data.source.paths"
    assert "is empty, or its first line is" in fault.problem


@pytest.mark.parametrize(("header", "shown"), [("user, text", "' text'"), ("\ufeff\ufeffuser,text", "'\\ufeffuser'")])
def test_columns_whose_names_cannot_be_seen_are_quoted(tree, tmp_path, header, shown):
    (fault,) = check_source(config_over(tree, tmp_path, "rows.csv", f"{header}\nu1,x\n").data)
    assert shown in fault.problem


@pytest.mark.parametrize("role", ["Assistant", "model", "gpt"])
def test_other_names_of_the_assistant_are_said(tree, tmp_path, role):
    turns = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
    row = json.dumps({"user": "u", "messages": turns})
    config = config_over(tree, tmp_path, "rows.jsonl", row + "\n", format="chat")
    with pytest.raises(ConfigError, match=r"1 × no assistant turn .*; rename the model's to assistant"):
        load_corpus(config.data)


def test_labels_of_a_column_with_gaps_are_said(tree, tmp_path):
    """A table library makes floats of whole numbers where one is missing."""
    rows = "".join(json.dumps({"user": "u", "text": "x", "label": label}) + "\n" for label in (0.0, 1.0))
    config = config_over(tree, tmp_path, "rows.jsonl", rows, format="classification", labels=[0, 1])
    with pytest.raises(ConfigError, match=r"2 × a number that is neither whole nor text for a label"):
        load_corpus(config.data)


def test_override_that_is_given_twice_is_refused(tree, tmp_path):
    path = write_config(tree, tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"privacy\.num_steps: given twice"):
        load_config(path, ["privacy.num_steps=4", "privacy.num_steps=8"])
    assert load_config(path, ["privacy.num_steps=8"]).privacy.num_steps == 8


@pytest.mark.parametrize("num", [4, 5])
def test_warm_up_that_never_ends_is_said(tree, num):
    tree["training"]["num_warmup_steps"] = num
    config = validate(tree)
    found = warnings(config, PrivacyPlan.build(config.privacy, config.training), 24, 24)
    assert any("num_warmup_steps=5 exceeds num_steps=4" in text for text in found) == (num == 5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rows.jsonl.gz", "gunzip"),
        ("rows.json", "jq -c"),
        ("rows.JSONL", "lower case"),
        ("rows.tsv", "name it .csv"),
        ("rows.xlsx", "is not one of"),
    ],
)
def test_files_of_other_endings_say_what_to_do(tree, tmp_path, name, words):
    (fault,) = check_source(config_over(tree, tmp_path, name, "{}").data)
    assert words in fault.problem


def test_a_file_for_a_directory_and_the_other_way_round(tmp_path, tiny_llama):
    (fault,) = check_model(ModelSection(name_or_path=str(tiny_llama / "model.safetensors")))
    assert "is a file; give the directory" in fault.problem
    with pytest.raises(ConfigError, match="is a directory; give the YAML file in it"):
        load_config(tmp_path)


def test_bases_that_cannot_serve_are_said_in_words(tmp_path, tiny_llama):
    import transformers

    bare = shutil.copytree(tiny_llama, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"it has no tokenizer\.json, nor another tokenizer file"):
        load_tokenizer(ModelSection(name_or_path=str(bare)))
    transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(bare)
    with pytest.raises(ConfigError, match="transformers has no causal language model of its kind"):
        load_base(ModelSection(name_or_path=str(bare)))


@pytest.fixture
def finished(released_run, tmp_path):
    return shutil.copytree(released_run, tmp_path / "runs" / "tiny")


def test_adapter_is_merged_into_no_other_base(finished, tiny_llama, tmp_path):
    """The base was changed in its place after training: merged, it would be a third model."""
    moved = shutil.copytree(tiny_llama, tmp_path / "base")
    config = finished / "secret" / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_llama), str(moved)))
    export_run(finished, tmp_path / "same", merge=True, dtype="fp32")
    change_weights(moved, lambda tensors: {name: value * 1.01 for name, value in tensors.items()})
    with pytest.raises(ConfigError, match=r"--merge: .*is not the base model.*other model\.safetensors"):
        export_run(finished, tmp_path / "other", merge=True, dtype="fp32")
    assert not (tmp_path / "other").exists()
    export_run(finished, tmp_path / "adapter", merge=False, dtype="fp32")


def test_export_into_its_own_run_is_refused(finished):
    for place in (finished / "merged", finished / "adapter" / "again"):
        with pytest.raises(ConfigError, match=r"OUTPUT: .*is inside the run"):
            export_run(finished, place, merge=False, dtype="fp32")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl.gz", b"\x1f\x8b\x08", "gunzip"),
        ("rows.json", b"[{}]", "jq -c"),
        ("rows.csv", b"", "is empty"),
        ("rows.jsonl", '{"user": "u", "text": "x"}\n'.encode("utf-16"), "UTF-16"),
        ("rows.jsonl", b'{"user": "u", "user": "v", "text": "x"}\n', "names a key twice"),
        ("rows.parquet", b"PAR1", "cannot read"),
    ],
)
def test_init_says_what_is_wrong_with_a_file(tmp_path, tiny_llama, name, content, words):
    """All files at once, before a column is guessed."""
    paths = [tmp_path / name, tmp_path / "other.txt"]
    paths[0].write_bytes(content)
    paths[1].write_text("x")
    with pytest.raises(ConfigError) as refused:
        guess_configuration(str(tiny_llama), paths)
    first, second = refused.value.faults
    assert words in first.problem
    assert "make rows of it that name a user and a text" in second.problem


def test_init_shows_no_value_of_a_table_without_a_header(tmp_path):
    (tmp_path / "rows.csv").write_text("ada,my secret diary\nbob,another one\n")
    with pytest.raises(ConfigError, match="the 2 fields of its first line, which must name the columns") as refused:
        guess_columns(tmp_path / "rows.csv")
    assert "secret" not in str(refused.value)
    (tmp_path / "rows.csv").write_text("writer,text\nada,x\n")
    with pytest.raises(ConfigError, match="among writer, text"):
        guess_columns(tmp_path / "rows.csv")


@pytest.mark.parametrize("labels", [[True, False], [0.0, 1.0, None]])
def test_init_says_why_a_label_is_not_read(tmp_path, labels):
    rows = [{"user": f"u{n}", "text": "a text", "label": label} for n, label in enumerate(labels * 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    guess = guess_columns(tmp_path / "rows.jsonl")
    assert guess.tree["format"] == "text"
    assert "convert column label to text or whole numbers" in guess.notes["text_column"]


def write_rows(path, **columns):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_init_says_that_one_label_is_none(tmp_path):
    guess = guess_columns(write_rows(tmp_path / "r.jsonl", user=["u", "v"], text=["a", "b"], label=["x", "x"]))
    assert guess.tree["format"] == "text"
    assert "column label is not read" in guess.notes["text_column"]


def test_init_keeps_labels_as_they_are_written(tmp_path):
    """01 is no number that a row could hold, an empty field is no label, and ² is no digit of ours."""
    names = ["01", "2", "10", "", "²", "-3"] * 4
    path = write_rows(tmp_path / "rows.jsonl", user=[f"u{n}" for n in range(24)], text=["a text"] * 24, label=names)
    guess = guess_columns(path)
    assert guess.tree["labels"] == [-3, 2, 10, "01", "²"]
    data = {**guess.tree, "source": {"kind": "files", "paths": [str(path)]}}
    counts = load_corpus(DataSection.model_validate(data)).counts
    assert (counts.num_rows, counts.num_empty) == (24, 4)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"conversations": [[{"from": "human", "value": "x"}]] * 2, "source": ["a site"] * 2},
            "without role and content",
        ),
        ({"text": [{"en": "x"}] * 2, "url": ["https://example.org"] * 2}, "something else than text"),
        (
            {"messages": ["[{'role': 'user', 'content': 'x'}]"] * 2},
            "no JSON list of {role, content}",
        ),
        (
            {"prompt": [[{"role": "user", "content": "x"}]] * 2, "completion": [[{"role": "assistant"}]] * 2},
            "columns prompt, completion hold turns; join those of a row into one",
        ),
    ],
)
def test_init_takes_no_other_column_for_one_it_cannot_read(tmp_path, columns, words):
    """The longest column that is left would be trained on."""
    with pytest.raises(ConfigError, match=words):
        guess_columns(write_rows(tmp_path / "rows.jsonl", user=["u", "v"], **columns))


def test_init_names_tables_without_rows_and_names_given_twice(tmp_path):
    for content, words in (("user,text\n", "holds no row"), ("user,text,text\nu,x,y\n", "given twice: text")):
        (tmp_path / "rows.csv").write_text(content)
        with pytest.raises(ConfigError, match=words):
            guess_columns(tmp_path / "rows.csv")


@pytest.mark.parametrize("form", ["text", "prompt_completion", "chat", "classification"])
def test_half_of_a_surrogate_pair_is_dropped_with_its_reason(tree, tmp_path, form):
    """An emoji that was cut: a tokenizer would fail on it in the middle of a job."""
    half, whole = "a \ud83d", "a \ud83d\ude00"
    rows = [
        {"user": "u", "text": text, "prompt": "p", "completion": text, "label": "a", "messages": turns}
        for text in (half, whole)
        for turns in [[{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]]
    ]
    labels = {"labels": ["a", "b"]} if form == "classification" else {}
    content = "".join(json.dumps(row) + "\n" for row in rows)
    corpus = load_corpus(config_over(tree, tmp_path, "rows.jsonl", content, format=form, **labels).data)
    assert corpus.num_records == 1
    assert corpus.counts.why_dropped()[0].startswith("1 × half of a surrogate pair in its text")


def test_init_says_which_column_of_a_prompt_is_not_read(tmp_path):
    columns = {"instruction": ["Sum up"] * 2, "input": ["a text"] * 2, "output": ["text"] * 2}
    guess = guess_columns(write_rows(tmp_path / "rows.jsonl", user=["u", "v"], **columns))
    assert (guess.tree["prompt_column"], guess.tree["completion_column"]) == ("instruction", "output")
    assert "not read: input" in guess.notes["format"]


def test_directories_and_names_with_brackets_are_paths(tree, tmp_path):
    tree["data"]["source"]["paths"] = [str(tmp_path), "~/rows.jsonl"]
    faults = check_source(validate(tree).data)
    assert [fault.problem for fault in faults] == [
        f"{tmp_path} is a directory; name its files, e.g. {tmp_path}/*.jsonl",
        "no such file: ~/rows.jsonl; write the home directory out",
    ]
    config = config_over(tree, tmp_path, "rows[1].jsonl", '{"user": "u", "text": "x"}\n')
    assert load_corpus(config.data).num_records == 1


def test_places_that_cannot_be_written_are_one_line(tmp_path, users_file, tiny_llama, monkeypatch, capsys):
    """Also those that no command looked at beforehand; an error of ours keeps its traceback."""
    (tmp_path / "file").write_text("x")
    output = str(tmp_path / "file" / "out")
    for words in (
        ["init", str(tiny_llama), str(users_file), "--output", output],
        ["from", "trl", str(users_file), "--output", output],
        ["invent-customers", output, "--num-users", "1"],
    ):
        monkeypatch.setattr("sys.argv", ["privtrain", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        assert str(tmp_path / "file") in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        run_command("privtrain", lambda: (tmp_path / "none" / "x").write_text("x"))  # type: ignore[arg-type]
    assert left.value.code == 2
    assert capsys.readouterr().err == f"privtrain: {tmp_path}/none/x: No such file or directory\n"
    with pytest.raises(OSError, match="ours"):
        run_command("privtrain", _ours)


@pytest.mark.parametrize(
    ("shell", "code", "words"),
    [
        ("privtrain schema | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("privtrain schema >/dev/full", 4, "a file or the output: No space left on device"),
        ("privtrain schema >/dev/null", 0, ""),
    ],
)
def test_what_the_shell_takes_away_is_said(tmp_path, shell, code, words):
    """And no traceback, nor another exit code by what is left in the buffer."""
    program = f'privtrain() {{ {sys.executable} -m privtrain "$@"; }}; {shell}'
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(cli.__file__).parents[1])}
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_a_working_directory_that_was_removed_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as left:
        run_command("privtrain", lambda: pathlib.Path("x").absolute())  # type: ignore[arg-type]
    assert left.value.code == 2
    assert capsys.readouterr().err == "privtrain: the working directory was removed; change into one that is there\n"


def test_a_directory_whose_name_is_no_text_is_refused(tree, tmp_path, monkeypatch):
    """Its name stands in the files of a run, which are UTF-8."""
    os.mkdir(os.fsencode(tmp_path) + b"/n\xff")
    monkeypatch.chdir(os.fsencode(tmp_path) + b"/n\xff")
    with pytest.raises(ConfigError, match="the name of the working directory is not UTF-8"):
        check_inputs(validate(tree))


def _ours() -> None:
    raise OSError("ours")


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("training", "target_epsilon", "privacy.target_epsilon"),
        ("data", "num_steps", "privacy.num_steps"),
        ("model", "rank", "lora.rank"),
        ("lora", "alpho", "lora.alpha"),
    ],
)
def test_a_key_in_the_wrong_section_is_shown_its_own(tree, section, key, meant):
    tree.setdefault(section, {})[key] = 1
    with pytest.raises(ConfigError) as refused:
        validate(tree)
    (fault,) = refused.value.faults
    assert fault.path == f"{section}.{key}"
    assert meant in fault.problem


@pytest.mark.parametrize("name", ["~/runs", "$HOME/runs", "/data/${USER}"])
def test_directories_that_no_shell_has_read_are_refused(tree, name):
    """They would be made here under the name of a tilde or a variable."""
    tree["run"]["output_dir"] = tree["performance"]["index_dir"] = name
    with pytest.raises(ConfigError) as refused:
        validate(tree)
    assert {fault.path for fault in refused.value.faults} == {"run.output_dir", "performance.index_dir"}


@pytest.mark.parametrize(("method", "num"), [("lora", 1), ("full", 2), ("prefix_tuning", 1)])
def test_keys_of_another_method_are_said_to_be_unread(tree, method, num):
    tree["training"]["method"] = method
    tree["prompt"] = {"num_virtual_tokens": 3}
    config = validate(tree)
    found = warnings(config, PrivacyPlan.build(config.privacy, config.training), 24, 24)
    assert sum("are not read: training.method is" in text for text in found) == num


TURNS = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("columns", "keys", "unread"),
    [
        (
            {"messages": [TURNS] * 2, "tools": ["[]", "[{}]"], "images": [None, []]},
            {"messages_column": "messages"},
            "tools",
        ),
        (
            {"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]},
            {"prompt_column": "prompt", "completion_column": "chosen"},
            "rejected",
        ),
        ({"chosen": [TURNS] * 2, "rejected": [TURNS] * 2}, {"messages_column": "chosen"}, "rejected"),
        ({"text": ["a", "b"], "context": ["c", "d"]}, {"text_column": "text"}, "context"),
    ],
)
def test_init_names_columns_that_other_stacks_would_read(tmp_path, columns, keys, unread):
    guess = guess_columns(write_rows(tmp_path / "rows.jsonl", user=["u", "v"], **columns))
    assert keys.items() <= guess.tree.items()
    assert f"; {unread}: not read" in guess.notes["format"]


@pytest.mark.parametrize(("epsilon", "is_refused"), [(1000, False), (1000.5, True), (1e9, True)])
def test_an_epsilon_that_means_nothing_is_refused(tree, epsilon, is_refused):
    del tree["privacy"]["noise_multiplier"]
    tree["privacy"]["target_epsilon"] = epsilon
    if not is_refused:
        assert validate(tree).privacy.target_epsilon == epsilon
        return
    with pytest.raises(ConfigError, match="8 is common, 1 is strong") as refused:
        validate(tree)
    assert [fault.path for fault in refused.value.faults] == ["privacy.target_epsilon"]
