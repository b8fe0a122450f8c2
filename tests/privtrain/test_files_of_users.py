"""Files, names and templates as users of other stacks bring them: used as meant, or refused by key before training."""

from __future__ import annotations

import bz2
import decimal
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attacks.evidence import read_config
from privtrain import cli
from privtrain.commands.corpus.conditions import Condition
from privtrain.commands.export import export_run
from privtrain.commands.generate import GenerateOptions, generate
from privtrain.config import validate
from privtrain.config.data import DataSection, FilesSource
from privtrain.config.model import ModelSection
from privtrain.data.chat import rendered
from privtrain.data.corpus import check_source, load_corpus, source_files
from privtrain.data.encode import Encoder
from privtrain.data.look import look_at
from privtrain.errors import ConfigError, DamagedFile
from privtrain.job.train import train
from privtrain.models.limits import num_ids_of, num_positions_of
from privtrain.models.load import load_base, load_tokenizer
from privtrain.process.exit import run_command
from privtrain.run.base_model import check_model
from privtrain.run.directory import RunDirectory
from privtrain.run.places import located
from tests.conftest import write_config
from tests.privtrain.bases import change_weights, save_base, save_tokenizer

TURN = "[{{ m.role }}]{{ m.content }}"
PROMPT = "{% if add_generation_prompt %}[assistant]{% endif %}"
ENDED = "{% for m in messages %}" + TURN + "{{ eos_token }}{% endfor %}" + PROMPT
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def section(path, **changes) -> DataSection:
    return DataSection.model_validate({"source": {"kind": "files", "paths": [str(path)]}, **changes})


def source_faults(folder, name: str, content: str | bytes, **changes) -> dict[str, str]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {fault.path: fault.problem for fault in check_source(section(path, **changes))}


def encoder_with(folder, template: str) -> Encoder:
    save_tokenizer(folder / "t", template)
    return Encoder(section("x.jsonl", format="chat"), load_tokenizer(ModelSection(name_or_path=str(folder / "t"))))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", gzip.compress(b'{"user": "u", "text": "x"}\n', mtime=0), "gunzip"),
        ("d.csv", b"PK\x03\x04\x14\x00", "save it as CSV"),
        ("d.parquet", POINTER, "git lfs pull"),
        ("d.jsonl", POINTER, "git lfs pull"),
        ("d.jsonl", "<!doctype html>\n", "web page"),
        ("d.csv", "user,text\nu,x\n".encode("utf-16-le"), "save it as UTF-8"),
        ("d.csv", b"PAR1\x15\x04", "name it .parquet"),
        ("d.jsonl", bz2.compress(b"x"), "bunzip2"),
        ("d.jsonl", bz2.compress(b""), "bunzip2"),
        ("d.csv", lzma.compress(b"x"), "unxz"),
        ("d.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", ".xls"),
        ("d.jsonl", "\n<HTML lang=en>\n", "web page"),
        ("d.parquet", b"ARROW1\x00\x00", "convert it to Parquet"),
    ],
)
def test_a_file_that_its_ending_does_not_name_says_what_it_is(tmp_path, name, content, words):
    faults = source_faults(tmp_path, name, content)
    assert list(faults) == ["data.source.paths"]
    assert words in faults["data.source.paths"]


@pytest.mark.parametrize(
    "name", ["par1", "PAR1", "Par1sian", "bzh", "BZh", "BZh9", "arrow1", "ARROW1", "pk\x03\x04", "Version", "<htmlid>"]
)
def test_a_table_may_begin_with_the_letters_of_a_mark(tmp_path, name):
    """What follows the letters tells a mark from the name of a column."""
    assert source_faults(tmp_path, "d.csv", f"{name},user,text\n1,u,x\n") == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("s3://bucket/x.parquet", "download them"),
        ("https://host/x.jsonl", "download them"),
        ("$HOME/x.jsonl", "variables of the environment"),
        ("~/x.jsonl", "write the home directory out"),
        ("{a,b}.jsonl", "further items"),
        ("gone.jsonl", "link to something that is not there"),
    ],
)
def test_a_path_that_names_no_file_says_why(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (fault,) = check_source(section(name))
    assert (fault.path, words in fault.problem) == ("data.source.paths", True), fault


def test_pipes_and_links_without_an_end_are_no_files(tmp_path):
    """A pattern finds them too; a pipe would be waited for, and such a link was a traceback."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good.jsonl").write_text('{"user": "u", "text": "x"}\n')
    faults = check_source(section(tmp_path / "*.jsonl"))
    assert {pathlib.Path(fault.problem.split(" is no file")[0]).stem for fault in faults} == {"pipe", "loop", "gone"}


@pytest.mark.parametrize(("name", "is_told"), [("nan", True), ("<NA>", True), ("Nan Goldin", False)])
def test_a_user_called_like_a_missing_id_is_asked_about(tmp_path, name, is_told):
    """A table written as text has such a cell for everybody without an id: many people would count as one."""
    (tmp_path / "d.jsonl").write_text(json.dumps({"user": name, "text": "x y"}) + "\n")
    data = section(tmp_path / "d.jsonl")
    save_tokenizer(tmp_path / "t")
    encoder = Encoder(data, load_tokenizer(ModelSection(name_or_path=str(tmp_path / "t"))))
    warnings = look_at(load_corpus(data), encoder, data).warnings
    assert any("missing id" in warning for warning in warnings) is is_told


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u00e9va", "e\u0301va"),
        ("ann", "\u200bann"),
        ("ann", "ann\ufeff"),
        ("ann\u200b", "ann\u200c"),
        ("\u00c5", "\u212b"),
    ],
)
@pytest.mark.parametrize("is_on_disk", [False, True])
def test_ids_that_look_the_same_are_refused(tmp_path, one, other, is_on_disk):
    rows = [{"user": user, "text": "x y"} for user in (one, other)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="1 ids look like other ids") as refused:
        load_corpus(section(tmp_path / "d.jsonl"), tmp_path / "index" if is_on_disk else None)
    assert [fault.path for fault in refused.value.faults] == ["data.user_column"]


def test_ids_of_other_people_are_kept_apart(tmp_path):
    users = ["ann", "anne", "\u00e9va", "eva", "\u0432\u0430\u043d\u044f", "a\u200db", "\U0001f600"]
    rows = [json.dumps({"user": user, "text": "x y"}) for user in users]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    assert set(load_corpus(section(tmp_path / "d.jsonl")).records) == set(users)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("Ann@x.org", "capital letters"),
        ("1.23457E+15", "as spreadsheets round long ones"),
        ("1,2E+12", "as spreadsheets round long ones"),
        ("nan", "if that stands for a missing id"),
        ("ann@y.org", None),
        ("1.5E", None),
    ],
)
def test_ids_that_may_not_be_one_persons_are_asked_about(tmp_path, other, words):
    rows = [json.dumps({"user": user, "text": "x y"}) for user in ("ann@x.org", other)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    data = section(tmp_path / "d.jsonl")
    save_tokenizer(tmp_path / "t")
    encoder = Encoder(data, load_tokenizer(ModelSection(name_or_path=str(tmp_path / "t"))))
    warnings = look_at(load_corpus(data), encoder, data).warnings
    doubts = [warning for warning in warnings if "ids" in warning or "called" in warning]
    assert [words in doubt for doubt in doubts] == [True] if words else doubts == []


@pytest.mark.parametrize("behind", [",", '{"user": "v", "text": "y"}'])
def test_more_than_an_object_on_a_line_is_said(tmp_path, behind):
    faults = source_faults(tmp_path, "d.jsonl", '{"user": "u", "text": "x"}' + behind + "\n")
    assert "line 1: something stands behind its object" in faults["data.source.paths"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("d.ndjson", "name it .jsonl"), ("d.pq", "name it .parquet"), ("d.xlsx", "save it as CSV"), ("d.zip", "unzip")],
)
def test_an_ending_of_another_name_says_what_to_do(tmp_path, name, words):
    assert words in source_faults(tmp_path, name, "x")["data.source.paths"]


def test_the_day_that_a_template_is_told_is_said(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"user": "u", "messages": TALK}) + "\n")
    data = section(tmp_path / "d.jsonl", format="chat")
    for dated, is_told in (("{{ strftime_now('%d') }}", True), ("", False)):
        encoder = encoder_with(tmp_path, dated + ENDED)
        warnings = look_at(load_corpus(data), encoder, data).warnings
        assert any("26 July 2024" in warning for warning in warnings) is is_told


@pytest.mark.parametrize("content", ["User, Text\nu,x\n", '"USER","Text "\nu,x\n'])
def test_a_column_in_other_case_is_named_with_its_key(tmp_path, content):
    faults = source_faults(tmp_path, "d.csv", content)
    assert set(faults) == {"data.user_column", "data.text_column"}
    assert all("is written otherwise: set data." in problem for problem in faults.values())


def test_a_table_without_a_header_shows_nothing_of_its_first_row(tmp_path):
    assert not any("diary" in problem for problem in source_faults(tmp_path, "d.csv", "ann,my diary\n").values())


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (None, "no label"),
        (["no"], "a list where one label is needed"),
        ("NO", "in other case"),
        ("1.0", "with .0 behind"),
        ("maybe", "does not name"),
    ],
)
def test_a_label_that_is_none_of_the_declared_says_how(tmp_path, label, words):
    (tmp_path / "d.jsonl").write_text(json.dumps({"user": "u", "text": "x", "label": label}) + "\n")
    with pytest.raises(ConfigError, match=f"1 × .*{words}.*label_column") as refused:
        load_corpus(section(tmp_path / "d.jsonl", format="classification", labels=["no", 1]))
    assert "maybe" not in str(refused.value)


def test_a_template_without_an_end_mark_is_refused(tmp_path):
    """What is predicted of an answer would be the answer alone; nothing would ever end one."""
    for end in ("", "{{ '\\n' }}"):
        with pytest.raises(ConfigError, match="would never learn to stop") as refused:
            encoder_with(tmp_path, "{% for m in messages %}" + TURN + end + "{% endfor %}" + PROMPT)
        assert [fault.path for fault in refused.value.faults] == ["data.chat_template_file"]
    encoder_with(tmp_path, "{% for m in messages %}" + TURN + "\n### end\n{% endfor %}" + PROMPT)


@pytest.mark.parametrize("marks", ["", "{% generation %}"])
def test_a_template_with_todays_date_is_the_same_on_any_day(tmp_path, marks):
    """Ranks on two sides of midnight, and a job that is resumed on another day, must read the same records."""
    dated = "{{ strftime_now('%d %b %Y') }}" + ENDED
    if marks:
        own = "{% if m.role == 'assistant' %}{% generation %}X{% endgeneration %}{% else %}X{% endif %}"
        dated = dated.replace(TURN + "{{ eos_token }}", own.replace("X", TURN + "{{ eos_token }}"))
    encoder = encoder_with(tmp_path, dated)
    (record,) = encoder.encode([json.dumps(TALK)]).records
    text = str(encoder.tokenizer.decode(record.tokens))
    assert text.startswith("26 Jul 2024")
    assert record.num_targets
    context = Condition(messages=tuple(TALK[:1])).context(section("x.jsonl", format="chat"), encoder.tokenizer)
    assert text.startswith(str(encoder.tokenizer.decode(context)))


#: How templates of known models, and others that could be, ask for the day, and what they are told.
DATED = {
    "{{ strftime_now('%d %b %Y') }}": "26 Jul 2024",
    '{%- if not day is defined %}{%- if strftime_now is defined %}{%- set day = strftime_now("%d %b %Y") %}'
    "{%- endif %}{%- endif %}{{ day }}": "26 Jul 2024",
    "{%- set today = strftime_now('%Y-%m-%d') -%}{{ today.split('-')[0] | int - 1 }}": "2023",
    "{{ strftime_now ('%B %d, %Y') }}": "July 26, 2024",
    "{%- set form = '%A' ~ ', %-d %B' -%}{{ strftime_now(form) }}": "Friday, 26 July",
    "{{ strftime_now(format='%H:%M:%S %j %u 100%% %%d %s') }}": "00:00:00 208 5 100% %d 1721952000",
    "{% macro day() %}{{ strftime_now('%d.%m.') }}{% endmacro %}{{ day() }}": "26.07.",
    "{% set now = strftime_now %}{{ now('%x') | upper }}": "07/26/24",
    "\n  {% if strftime_now is callable %}\n yes{% endif %}": "\n yes",
}


@pytest.mark.parametrize("dated", DATED)
def test_every_way_to_ask_for_the_day_is_told_the_fixed_one(tmp_path, dated):
    """Also by a format that is computed; and nothing else of the template changes, white space included."""
    tokenizer = save_tokenizer(tmp_path / "t", dated + ENDED)
    assert rendered(tokenizer, TALK) == f"{DATED[dated]}[user]q</s>[assistant]a</s>"
    assert tokenizer.chat_template == dated + ENDED


def test_named_templates_with_todays_date_never_change(tmp_path):
    """Also before an encoder has put the default in their place: a prompt may be rendered by itself."""
    tokenizer = save_tokenizer(tmp_path / "t")
    tokenizer.chat_template = {"tool_use": "tools" + ENDED, "default": "{{ strftime_now('%d %b %Y') }}" + ENDED}
    text = rendered(tokenizer, TALK)
    assert text == "26 Jul 2024[user]q</s>[assistant]a</s>"
    context = Condition(messages=tuple(TALK[:1])).context(section("x.jsonl", format="chat"), tokenizer)
    assert text.startswith(str(tokenizer.decode(context)))
    for without, words in (({"tool_use": ENDED}, "no default specified"), (None, "chat_template is not set")):
        tokenizer.chat_template = without
        with pytest.raises(ValueError, match=words):
            rendered(tokenizer, TALK)


def test_a_turn_that_lacks_what_a_template_reads_is_named(tmp_path):
    encoder = encoder_with(
        tmp_path, ENDED.replace(TURN, TURN + "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}")
    )
    encoder.encode([json.dumps([*TALK, {**TALK[1], "tool_calls": [{"secret": "f"}]}])])
    assert list(encoder.complaints) == ["the chat template refuses it: it reads 'function', which a turn lacks"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("~/models/m", "write the home directory out"),
        ("${MODELS}/m", "variables of the environment are not read"),
        ("https://huggingface.co/owner/name", "owner/name"),
        (" m ", "no name of a hub"),
        ("a/b/c", "no name of a hub"),
    ],
)
def test_a_model_that_no_hub_could_have_is_refused(tree, tmp_path, monkeypatch, capsys, name, words):
    tree["model"]["name_or_path"] = name
    monkeypatch.setattr("sys.argv", ["privtrain", "plan", str(write_config(tree, tmp_path / "c.yaml"))])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    (fault,) = check_model(validate(tree).model)
    assert fault.path == "model.name_or_path"
    assert words in fault.problem
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt2", "owner/name-1.5_b"])
def test_names_of_a_hub_are_taken(name):
    assert check_model(ModelSection(name_or_path=name)) == []


def changed(base, **values):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return ModelSection(name_or_path=str(base))


def test_a_configuration_that_no_model_could_have_is_one_fault(tmp_path):
    for values in ({"hidden_size": "32"}, {"num_attention_heads": 5}):
        model = changed(save_base(tmp_path / "m"), **values)
        for load in (load_base, num_ids_of):
            with pytest.raises(ConfigError) as refused:
                load(model)
            assert [fault.path for fault in refused.value.faults] == ["model"]


def test_code_beside_the_weights_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    base = save_base(tmp_path / "m")
    (base / "code.py").write_text("raise SystemExit('it ran')\n")
    model = changed(base, model_type="none", auto_map={"AutoConfig": "code.A", "AutoModelForCausalLM": "code.B"})
    for load in (load_base, num_ids_of):
        with pytest.raises(ConfigError, match="never run"):
            load(model)


def test_a_pickle_of_more_than_weights_is_refused(tmp_path):
    base = save_base(tmp_path / "m")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(ConfigError, match="save the model as safetensors") as refused:
        load_base(ModelSection(name_or_path=str(base)))
    assert "weights_only" not in str(refused.value)


def test_parts_without_their_index_are_named(tmp_path):
    base = save_base(tmp_path / "m")
    shutil.move(base / "model.safetensors", base / "model-00001-of-00002.safetensors")
    (fault,) = check_model(ModelSection(name_or_path=str(base)))
    assert "no model.safetensors.index.json" in fault.problem


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", '{"a": 1', "\ufeff{}"])
def test_a_damaged_file_beside_the_weights_is_named(tmp_path, name, content):
    """transformers ignores a damaged generation config, and names no file of a tokenizer."""
    base = save_base(tmp_path / "m")
    (base / name).write_text(content, encoding="utf-8")
    (fault,) = check_model(ModelSection(name_or_path=str(base)))
    assert fault.problem.startswith(f"{base / name} is not JSON")


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod."])
def test_a_model_saved_in_its_wrapper_is_named(tmp_path, prefix):
    base = save_base(tmp_path / "m")
    change_weights(base, lambda weights: {prefix + name: weight for name, weight in weights.items()})
    with pytest.raises(ConfigError, match=f"begin with '{prefix}', as of a wrapped model"):
        load_base(ModelSection(name_or_path=str(base)))


def test_an_unknown_word_in_a_configuration_is_more_than_a_word(tmp_path):
    model = changed(save_base(tmp_path / "m"), rope_scaling={"rope_type": "magic", "factor": 2.0})
    with pytest.raises(ConfigError, match="'magic', which transformers does not know"):
        load_base(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_said(tree, tmp_path, value):
    """They would give every user a gradient of zero: noise alone would be trained on."""
    from safetensors.torch import load_file, save_file

    from privtrain.errors import SelfTestFailed

    base = save_base(tmp_path / "m")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    tree["model"]["name_or_path"] = str(base)
    with pytest.raises(SelfTestFailed, match="not finite: its weights hold NaN or infinity"):
        train(write_config(tree, tmp_path / "c.yaml"), [])


def test_a_module_that_is_not_there_is_said_by_plan_too(tree, tmp_path, monkeypatch, capsys):
    tree["lora"]["target_modules"] = [".*q_proj"]
    monkeypatch.setattr("sys.argv", ["privtrain", "plan", str(write_config(tree, tmp_path / "c.yaml"))])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "lora.target_modules" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"WORLD_SIZE": "x", "RANK": "y"}, ["WORLD_SIZE", "RANK"]),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, ["RANK"]),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, ["RANK"]),
    ],
)
def test_ranks_that_cannot_be_are_refused_before_anybody_waits(monkeypatch, values, names):
    from privtrain.process.group import join_processes

    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        join_processes(10)
    assert [fault.path for fault in refused.value.faults] == names


def test_a_mode_that_wandb_does_not_know_is_refused_at_the_start(tree, monkeypatch):
    from privtrain.inputs import check_inputs

    monkeypatch.setenv("WANDB_MODE", "offlin")
    check_inputs(validate(tree))  # nothing is shown to it
    tree["tracking"]["wandb"] = True
    with pytest.raises(ConfigError) as refused:
        check_inputs(validate(tree))
    assert [fault.path for fault in refused.value.faults] == ["WANDB_MODE"]


def test_a_terminal_without_epsilon_is_written_to(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    run_command("privtrain", lambda: print("ε of ⟦u⟧"))
    assert written.getvalue() == b"\\u03b5 of \\u27e6u\\u27e7\n"


def test_a_run_is_used_from_another_directory(tree, tmp_path, tiny_llama, users_file, monkeypatch, no_self_test):
    """Its model and data were named relative to the directory of the start; a name on a hub would be another model."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(tiny_llama, "models/tiny")
    shutil.copy(users_file, "users.jsonl")
    tree["model"]["name_or_path"], tree["data"]["source"]["paths"] = "models/tiny", ["*.jsonl"]
    tree["run"]["output_dir"] = "runs"
    train(write_config(tree, pathlib.Path("c.yaml")), [])
    run = tmp_path / "here" / "runs" / "tiny"
    monkeypatch.chdir(tmp_path / "elsewhere")
    export_run(run, pathlib.Path("merged"), merge=True, dtype="fp32")
    report = generate(run, pathlib.Path("corpus"), GenerateOptions(num_texts=2))
    assert "training records" in report
    assert str(tmp_path / "here" / "*.jsonl") in map(str, vars(read_config(RunDirectory(run)).data.source)["paths"])
    # A run that was moved with all that it needs is used where it is now.
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    export_run(pathlib.Path("runs/tiny"), pathlib.Path("merged"), merge=True, dtype="fp32")


def test_paths_are_those_of_the_directory_of_the_start(tree, tmp_path, monkeypatch):
    """Patterns go into directories and the directory of the start is none; a place that is nowhere keeps its form."""
    start, run = tmp_path / "[x] start", RunDirectory(tmp_path / "run")
    run.identity.parent.mkdir(parents=True)
    run.identity.write_text(json.dumps({"started_in": str(start)}))
    for name in ("data/a.jsonl", "data/more/b.jsonl"):
        (start / name).parent.mkdir(parents=True, exist_ok=True)
        (start / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    tree["data"]["source"]["paths"], tree["model"]["name_or_path"] = ["data/**/*.jsonl", "data/a.jsonl"], "./base"
    found = located(validate(tree), run)
    assert isinstance(found.data.source, FilesSource)
    assert set(source_files(found.data.source)) == {start / "data/a.jsonl", start / "data/more/b.jsonl"}
    assert found.model.name_or_path == "./base"
    (start / "base").mkdir()
    assert located(validate(tree), run).model.name_or_path == str(start / "base")
    run.identity.write_text("{")
    with pytest.raises(DamagedFile, match=r"identity\.json"):
        located(validate(tree), run)


def test_a_model_that_is_no_directory_is_said_to_be_of_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (load_base, load_tokenizer, num_ids_of):
        with pytest.raises(ConfigError, match=r"models/tiny \(no directory here, so a name on the hub\)"):
            load(ModelSection(name_or_path="models/tiny"))


def test_a_model_that_reads_images_too_is_refused(tmp_path):
    """Adapters on its vision tower would be noise; its patches' positions were taken for those of tokens."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**sizes, "vocab_size": 258, "num_key_value_heads": 2, "head_dim": 8},
            vision_config={**sizes, "image_size": 16, "patch_size": 8},
        )
    )
    model.save_pretrained(tmp_path / "both")
    for load in (load_base, num_ids_of, num_positions_of):
        with pytest.raises(ConfigError, match="a gemma3, which reads more than text") as refused:
            load(ModelSection(name_or_path=str(tmp_path / "both")))
        assert [fault.path for fault in refused.value.faults] == ["model"]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (pa.array([1.0, None]), r"type float\): .*astype\('Int64'\)"),
        (pa.array([decimal.Decimal(1)], pa.decimal128(20, 0)), r"cast\('int64'\)"),
        (pa.array([b"a"]), "hexadecimal digits"),
        (pa.array([{"id": "a"}]), r"Table\.flatten\(\)"),
        (pa.array([0], pa.timestamp("s")), "is it the right column"),
        (pa.array([True]), "is it the right column"),
    ],
)
def test_ids_of_other_types_are_refused_with_the_way_out(tmp_path, ids, words):
    pq.write_table(pa.table({"user": ids, "text": ["x"] * len(ids)}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=words):
        load_corpus(section(tmp_path / "d.parquet"))
