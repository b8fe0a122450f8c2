"""From an empty folder to an exported, attacked model, on every kind of data, with the configuration of init."""

from __future__ import annotations

import csv
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from attacks.cli import app as attacks_app
from privtrain.cli import app as privtrain_app
from tests import jobs
from tests.privtrain.bases import save_base, save_tokenizer
from tests.privtrain.test_rows import TEMPLATE

_WORDS = ["alder", "birch", "cedar", "elm", "fir", "gorse", "hazel", "ivy", "larch", "maple"]


def texts_of(num_users: int, num_records: int = 6) -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    return [(f"u{user:03d}", " ".join(rng.choice(_WORDS, 4))) for user in range(num_users) for _ in range(num_records)]


def write_chats(folder: pathlib.Path, num_users: int) -> list[str]:
    rows = [
        {"user_id": user, "messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}]}
        for user, text in texts_of(num_users)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["chats.jsonl"]


def write_labelled(folder: pathlib.Path, num_users: int) -> list[str]:
    with open(folder / "labelled.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["author", "text", "label"])
        writer.writerows((user, text, ["calm", "loud"]["gorse" in text]) for user, text in texts_of(num_users))
    return ["labelled.csv"]


def write_shards(folder: pathlib.Path, num_users: int) -> list[str]:
    rows = texts_of(num_users)
    for number in range(3):
        part = [{"customer_id": user, "body": text} for user, text in rows[number::3]]
        pa.parquet.write_table(pa.Table.from_pylist(part), folder / f"shard-{number}.parquet")
    return [f"shard-{number}.parquet" for number in range(3)]


WRITERS = {"chats": write_chats, "labelled": write_labelled, "shards": write_shards}


def run(app, *words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, (words, done.output)
    return done.output


def on_processes(num: int, program: str, *words: str) -> None:
    """A command on one process, or as a launcher starts it on two."""
    if num == 1:
        run({"privtrain": privtrain_app, "attacks": attacks_app}[program], *words)
        return
    done = jobs.run(program, *words, timeout_seconds=1500)
    assert done.returncode == 0, (words, done.output)


def generate(kind: str, place: str, folder: pathlib.Path, num: int) -> None:
    """A corpus that verifies; of a classifier there is none, and the message says what to train instead."""
    words = ["generate", place, "corpus", "--num-texts", "6", "--min-new-tokens", "4"]
    if kind == "labelled":
        done = CliRunner().invoke(privtrain_app, words)
        assert "trained as a classifier, which writes no text" in str(done.exception)
        return
    if kind == "chats":
        (folder / "prompts.jsonl").write_text('{"prompt": "Say it."}\n')
        words += ["--prompts", "prompts.jsonl"]
    on_processes(num, "privtrain", *words)
    assert len((folder / "corpus" / "corpus.jsonl").read_text().splitlines()) == 6
    run(privtrain_app, "verify", "corpus", "--released", place)


def journey(kind: str, precision: str, num_users: int, folder: pathlib.Path, *overrides: str, num: int = 1) -> None:
    """Every command, in the order in which init names them; only the precision is said."""
    save_tokenizer(save_base(folder / "model"), TEMPLATE)
    files = WRITERS[kind](folder, num_users)
    run(privtrain_app, "init", "model", *files)
    given = [f"performance.precision={precision}", *overrides]
    assert "⟦" in run(privtrain_app, "preview", "privtrain.yaml", *given)
    assert "privacy plan" in run(privtrain_app, "plan", "privtrain.yaml", *given)
    on_processes(num, "privtrain", "train", "privtrain.yaml", *given)
    (finished,) = (folder / "runs").iterdir()
    statement = json.loads((finished / "privacy.json").read_text())
    assert statement["private"]
    assert statement["epsilon"] <= 8
    place = str(finished)
    if kind == "labelled":  # it predicts no token that an attack could score
        done = CliRunner().invoke(attacks_app, ["score", place])
        assert "attacks score tokens of texts" in str(done.exception)
    else:
        on_processes(num, "attacks", "score", place)
        for stage in ("analyse", "report"):
            run(attacks_app, stage, place)
        assert (finished / "report" / "index.html").is_file()
    run(privtrain_app, "verify", place)
    run(privtrain_app, "export", place, "exported")
    run(privtrain_app, "export", place, "merged", "--merge")
    assert (folder / "merged" / "model.safetensors").is_file()
    assert (folder / "merged" / "privacy.json").is_file()
    generate(kind, place, folder, num)


@pytest.mark.slow
def test_own_data_from_an_empty_folder(tmp_path, monkeypatch):
    """The cheapest cell: fewer users and steps; so many are held out that both sides surely have some."""
    monkeypatch.chdir(tmp_path)
    journey("shards", "fp32", 40, tmp_path, "data.held_out_fraction=0.4", "privacy.num_steps=6")


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", WRITERS)
def test_own_data_of_every_kind_in_either_precision(kind, precision, num, tmp_path, monkeypatch):
    """The configuration exactly as init writes it, on one process and on two."""
    monkeypatch.chdir(tmp_path)
    journey(kind, precision, 120, tmp_path, num=num)
