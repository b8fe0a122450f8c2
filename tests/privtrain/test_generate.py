"""privtrain generate: a corpus that follows from the release alone, and a report that never leaves secret/."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import sys
import time
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from privtrain.cli import app
from privtrain.commands.corpus import copies, probe, report, sampling, sentences
from privtrain.commands.corpus.balanced import BalancedAccuracy
from privtrain.commands.corpus.conditions import Condition, contexts_of, ends_of, read_conditions
from privtrain.commands.corpus.copies import CorpusIndex, Rate
from privtrain.commands.corpus.sampling import SamplingSettings, TransformersSampler, VllmSampler, distinct
from privtrain.commands.generate import GenerateOptions, generate
from privtrain.commands.verify import Anchors, verify_directory
from privtrain.config.data import DataSection
from privtrain.config.load import validate
from privtrain.errors import ConfigError, PlanMismatch, VerificationFailed
from privtrain.job.train import train
from privtrain.run import generated
from tests import jobs
from tests.conftest import write_config
from tests.privtrain.bases import save_base, save_tokenizer
from tests.privtrain.test_rows import TEMPLATE

FILES = {"corpus.jsonl", "corpus.json", "privacy.json", "release.json", "README.md"}


@pytest.fixture(autouse=True)
def _without_sentence_model(monkeypatch):
    """It takes seconds to load; one test loads it."""
    monkeypatch.setattr(sentences, "is_installed", lambda: False)


def data_of(**keys) -> DataSection:
    return DataSection.model_validate({"source": {"kind": "files", "paths": ["x.jsonl"]}, "max_length": 24, **keys})


def settings_of(**keys) -> SamplingSettings:
    defaults = {"num_texts": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8}
    return SamplingSettings(**{**defaults, "min_new_tokens": 1, "batch_size": 4, "seed": 0, **keys})


def rows_in(corpus: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (corpus / "corpus.jsonl").read_text("utf-8").splitlines()]


def test_corpus_is_bound_to_its_release_and_verifies(finished, tmp_path):
    message = generate(finished, tmp_path / "corpus", GenerateOptions(num_texts=20, copy_tokens=4))
    assert "wrote 20 different texts" in message
    assert {path.name for path in (tmp_path / "corpus").iterdir()} == FILES
    assert len({row["text"] for row in rows_in(tmp_path / "corpus")}) == 20
    found = verify_directory(tmp_path / "corpus", Anchors(released=finished))
    assert found.place == "corpus"
    assert found.epsilon == json.loads((finished / "privacy.json").read_text())["epsilon"]
    assert "the release that the texts were sampled from" in found.checked
    card = (tmp_path / "corpus" / "README.md").read_text("utf-8")
    assert "NOT PRIVATE" not in card
    assert generated.COVERED in card

    for name, change in (("corpus.jsonl", '{"text": "x"}\n'), ("corpus.json", " "), ("README.md", "none")):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        shutil.copytree(tmp_path / "corpus", tmp_path / "changed")
        with open(tmp_path / "changed" / name, "a", encoding="utf-8") as file:
            file.write(change)
        with pytest.raises(VerificationFailed, match=name):
            verify_directory(tmp_path / "changed")


def test_corpus_is_the_same_without_the_private_records(finished, tiny_llama, tmp_path):
    """Post-processing, to the byte: with nothing of secret/ at hand the same texts are drawn."""
    options = GenerateOptions(num_texts=12)
    generate(finished, tmp_path / "with", options)
    shutil.rmtree(finished / "secret")
    shutil.rmtree(finished / "checkpoints")
    message = generate(finished, tmp_path / "without", GenerateOptions(num_texts=12, base_model=tiny_llama))
    assert "secret/ is not here" in message
    for name in FILES:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


def test_corpus_is_the_same_from_two_processes(finished, tmp_path):
    """To the byte: batches are shared out whole, and each keeps its seed. Rank 0 alone writes, and speaks."""
    options = ["--num-texts", "11", "--batch-size", "3", "--max-new-tokens", "6", "--copy-tokens", "4"]
    done = jobs.run("privtrain", "generate", finished, tmp_path / "two", *options)
    assert done.returncode == 0, done.output
    assert done.output.count("wrote 11 different texts") == 1
    given = GenerateOptions(num_texts=11, batch_size=3, max_new_tokens=6, copy_tokens=4)
    generate(finished, tmp_path / "one", given)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert len(list((finished / "secret" / "corpora").iterdir())) == 1


def die_at_the_second_batch(rank: int) -> None:
    draw, drawn = TransformersSampler.draw, []

    def draw_or_die(*arguments):
        drawn.append(arguments)
        if (rank, len(drawn)) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(*arguments)

    TransformersSampler.draw = draw_or_die


def test_a_killed_process_leaves_no_half_of_a_corpus(finished, tmp_path):
    options = ["--num-texts", "12", "--batch-size", "2"]
    done = jobs.run("privtrain", "generate", finished, tmp_path / "corpus", *options, before=die_at_the_second_batch)
    assert done.returncode != 0
    assert "Traceback" not in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert not (finished / "secret" / "corpora").exists()


def test_vllm_is_one_process_by_itself(tree, monkeypatch):
    config = validate(tree)
    monkeypatch.setattr(sampling, "why_not_vllm", lambda _: "")
    assert sampling.chosen_engine("auto", config) == "vllm"
    assert sampling.chosen_engine("auto", config, is_alone=False) == "transformers"
    with pytest.raises(ConfigError, match="start privtrain by itself"):
        sampling.chosen_engine("vllm", config, is_alone=False)


def test_report_lies_in_secret_alone(finished, tmp_path):
    generate(finished, tmp_path / "corpus", GenerateOptions(num_texts=10, copy_tokens=3))
    (path,) = (finished / "secret" / "corpora").iterdir()
    report = json.loads(path.read_text())
    assert path.stat().st_mode & 0o777 == 0o600
    assert report["corpus"] == json.loads((tmp_path / "corpus" / "corpus.json").read_text())["relation"]
    manifest = json.loads((finished / "secret" / "manifest.json").read_text())
    corpus = {}
    for line in pathlib.Path(json_source(finished)).read_text().splitlines():
        row = json.loads(line)
        corpus.setdefault(row["user"], []).append(row["text"])
    trained = sum(len(corpus[user]) - len(manifest["attacker"].get(user, ())) for user in manifest["held_in"])
    assert report["training_records"]["num_records"] == trained
    public = "".join((tmp_path / "corpus" / name).read_text("utf-8") for name in FILES)
    for private in ("near_copies", "held_out_records", str(finished), str(path.name)):
        assert private not in public


def json_source(run: pathlib.Path) -> str:
    import yaml

    return yaml.safe_load((run / "secret" / "config.yaml").read_text())["data"]["source"]["paths"][0]


def test_other_rows_than_the_trained_ones_are_not_compared(finished, tmp_path, monkeypatch):
    from privtrain.data.corpus import group_by_user

    monkeypatch.setattr("privtrain.commands.corpus.report.load_corpus", lambda *_: group_by_user([("u", "other")]))
    with pytest.raises(PlanMismatch, match="other rows"):
        generate(finished, tmp_path / "corpus", GenerateOptions(num_texts=2))


def test_faults_of_generate_come_by_name_and_nothing_is_written(finished, tmp_path, users_file):
    (tmp_path / "there").mkdir()
    cases = [
        (tmp_path / "there", {}, "OUTPUT: .*exists"),
        (finished / "corpus", {}, "OUTPUT: .*inside the run"),
        (tmp_path / "out", {"temperature": 0.0}, "--temperature: given 0.0; must be above 0"),
        (tmp_path / "out", {"top_p": 1.5}, "--top-p"),
        (tmp_path / "out", {"max_new_tokens": 24}, "--max-new-tokens: given 24; data.max_length=24 leaves 23"),
        (tmp_path / "out", {"min_new_tokens": 30}, "--min-new-tokens"),
        (tmp_path / "out", {"prompts": tmp_path / "none.jsonl"}, "--prompts: no such file"),
        (tmp_path / "out", {"prompts": users_file}, "--prompts: .*rows are private"),
        (tmp_path / "out", {"labels": ("a", "a")}, "--label: .*twice"),
        (tmp_path / "out", {"template": "x", "labels": ("a",)}, "--template: .*must hold {label}"),
        (tmp_path / "out", {"engine": "vllm"}, "--engine: vllm cannot serve this run: it is not installed"),
        (tmp_path / "out", {"base_model": tmp_path / "nowhere"}, "--base-model: no such model directory"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for output, options, words in cases:
        with pytest.raises(ConfigError, match=words):
            generate(finished, output, GenerateOptions(num_texts=2, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not (finished / "secret" / "corpora").exists()


def test_another_base_than_the_released_one_is_refused(finished, tmp_path):
    other = save_base(tmp_path / "other")
    with pytest.raises(ConfigError, match="is not the base model of the release"):
        generate(finished, tmp_path / "corpus", GenerateOptions(num_texts=2, base_model=other))


def test_classifier_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="prompt_completion with the label in"):
        read_conditions(data_of(format="classification", labels=["a", "b"]), None, (), "{label}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "x", "lable": "y"}, "unknown key 'lable'"),
        ({"label": "y"}, "give prompt or messages"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "x", "label": True}, "label must be text"),
        ({"prompt": "\ud83d"}, "half of a surrogate pair"),
        ({"messages": []}, "must end with a turn"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with a turn"),
        ({"messages": [{"role": "user"}]}, "list of {role, content}"),
    ],
)
def test_line_of_prompts_is_refused_by_number(line, words, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n\n' + json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=f"line 3: .*{words}"):
        read_conditions(data_of(format="chat"), path, (), "{label}")


def test_prompts_of_an_editor_are_read(tmp_path):
    """With a byte-order mark and Windows line ends."""
    (tmp_path / "prompts.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n\r\n{"prompt": "y"}\r\n')
    found = read_conditions(data_of(), tmp_path / "prompts.jsonl", (), "{label}")
    assert [condition.prompt for condition in found] == ["x", "y"]


def test_answers_need_what_they_answer():
    for form in ("chat", "prompt_completion"):
        with pytest.raises(
            ConfigError, match=r"give --prompts FILE, whose lines are such as \{\"prompt\": .*\}, or --label"
        ):
            read_conditions(data_of(format=form), None, (), "{label}")


def test_contexts_are_those_of_training(tmp_path):
    """What the model reads before it writes is what stood before the predicted tokens in training."""
    from privtrain.data.encode import Encoder

    tokenizer = save_tokenizer(tmp_path, TEMPLATE)
    for data, record, condition in (
        (data_of(format="text"), "Dear Ada", Condition("Dear")),
        (
            data_of(format="prompt_completion"),
            '{"prompt": "calm", "completion": "alder"}',
            Condition("calm", label="calm"),
        ),
        (
            data_of(format="chat", max_length=200),
            json.dumps([{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "North."}]),
            Condition(messages=({"role": "user", "content": "Which?"},)),
        ),
    ):
        (context,) = contexts_of([condition], data, tokenizer, data.max_length)
        (encoded,) = Encoder(data, tokenizer).encode([record]).records
        assert encoded.tokens[: len(context)].tolist() == context
        if data.format != "text":
            assert not encoded.is_target[: len(context)].any()
            assert encoded.is_target[len(context)]
        assert int(encoded.tokens[-1]) in ends_of(data, tokenizer) or data.format == "chat"


def test_turn_ends_where_the_template_ends_it(tmp_path):
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = save_tokenizer(tmp_path, template, extra=("<|stop|>", "<|assistant|>", "<|user|>"))
    assert ends_of(data_of(format="chat"), tokenizer) == sorted([1, tokenizer.convert_tokens_to_ids("<|stop|>")])
    assert ends_of(data_of(), tokenizer) == [1]


def test_context_too_long_is_refused_by_number(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="number 2 has 41 tokens; the model reads 24"):
        contexts_of([Condition("a"), Condition("a" * 40)], data_of(), tokenizer, 24)


class Replies:
    """A sampler that says what it is told, in turn."""

    def __init__(self, replies):
        self.replies, self.asked = list(replies), []

    def draw(self, contexts, seed):
        self.asked.append((len(contexts), seed))
        return [self.replies.pop(0) for _ in contexts]


def test_repeats_are_drawn_again_and_contexts_share_evenly():
    sampler = Replies([[1], [1], [2], [], [3], [3], [9], [4], [5], [6]])
    found = list(distinct(sampler, [[0], [7]], settings_of(num_texts=5, batch_size=2), str, str.strip))
    assert [number for number, _ in found].count(0) == 3
    assert len(found) == len(set(found)) == 5
    assert (0, "[1]") in found
    seeds = [seed for _, seed in sampler.asked]
    assert len(set(seeds)) == len(seeds)


def test_a_model_that_says_one_thing_ends_and_gives_one_text():
    class Parrot:
        def draw(self, contexts, seed):
            return [[1] for _ in contexts]

    assert list(distinct(Parrot(), [[0]], settings_of(num_texts=50), str, str)) == [(0, "[1]")]


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(save_base(tmp_path_factory.mktemp("base"))).eval()


def test_text_does_not_depend_on_the_length_of_its_batch_mates(causal):
    """Rows are filled from the left, and what fills them is not read."""
    sampler = TransformersSampler(causal, settings_of(top_k=1), ends=[1], pad_id=0, banned=[])
    alone = sampler.draw([[0, 5, 6]], 0)
    assert sampler.draw([[0, 5, 6], [0, *range(10, 30)]], 0)[0] == alone[0]
    assert 1 <= len(alone[0]) <= 8


def test_sampling_is_a_function_of_its_seed_and_leaves_no_trace(causal):
    sampler = TransformersSampler(causal, settings_of(), ends=[1], pad_id=0, banned=[*range(100, 258)])
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    drawn = sampler.draw([[0]] * 6, 11)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert drawn == sampler.draw([[0]] * 6, 11)
    assert drawn != sampler.draw([[0]] * 6, 12)
    assert max(token for ids in drawn for token in ids) < 100


def test_settings_of_the_base_are_put_aside(causal):
    """A base that would repeat itself by its own generation config is sampled as it was asked."""
    expected = TransformersSampler(causal, settings_of(), ends=[1], pad_id=0, banned=[]).draw([[0]] * 4, 3)
    causal.generation_config.repetition_penalty = 50.0
    causal.generation_config.top_k = 1
    assert TransformersSampler(causal, settings_of(), ends=[1], pad_id=0, banned=[]).draw([[0]] * 4, 3) == expected


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "full"])
def test_every_method_writes_texts(method, tree, tmp_path, users_file, no_self_test):
    tree["training"]["method"] = method
    tree["prompt"] = {"num_virtual_tokens": 3}
    train(write_config(tree, tmp_path / "c.yaml"))
    with pytest.raises(ConfigError, match=r"--prompts: .*rows are private"):
        generate(tmp_path / "runs" / "tiny", tmp_path / "corpus", GenerateOptions(num_texts=3, prompts=users_file))
    generate(tmp_path / "runs" / "tiny", tmp_path / "corpus", GenerateOptions(num_texts=3))
    texts = [row["text"] for row in rows_in(tmp_path / "corpus")]
    assert len(texts) == 3
    described = generated.read_description(tmp_path / "corpus")
    assert described["covered"] == generated.NOT_COVERED  # the run has a public seed
    assert "NOT PRIVATE" in (tmp_path / "corpus" / "README.md").read_text("utf-8")
    assert all(0 < len(text.encode()) <= 24 * 4 for text in texts)


def test_labelled_corpus_by_the_command_line(tree, tmp_path, no_self_test):
    """prompt_completion with the label as the prompt: rows train again, and the probe compares both corpora."""
    rows = [
        {"user": f"u{user:02d}", "prompt": ("calm", "loud")[user % 2], "completion": f"{('elm', 'fir')[user % 2]} {n}"}
        for user in range(40)
        for n in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"] |= {
        "source": {"kind": "files", "paths": [str(tmp_path / "rows.jsonl")]},
        "format": "prompt_completion",
    }
    train(write_config(tree, tmp_path / "c.yaml"))
    words = [str(tmp_path / "runs" / "tiny"), str(tmp_path / "corpus"), "--num-texts", "8", "--label", "calm"]
    done = CliRunner().invoke(app, ["generate", *words, "--label", "loud"])
    assert done.exit_code == 0, done.output
    assert "utility: balanced accuracy on " in done.output
    found = rows_in(tmp_path / "corpus")
    assert [row["label"] for row in found].count("calm") == 4
    assert all(row["prompt"] == row["label"] and row["completion"] for row in found)
    (path,) = (tmp_path / "runs" / "tiny" / "secret" / "corpora").iterdir()
    utility = json.loads(path.read_text())["utility"]
    assert utility["on_records"]["value"] == 1.0
    assert utility["ratio"] == utility["on_corpus"]["value"]


def held_out(pairs):
    """Return (text, label) pairs as records of users of five records each."""
    return [probe.HeldOutRecord(text, label, f"u{number // 5}") for number, (text, label) in enumerate(pairs)]


def test_probe_prefers_texts_that_go_with_their_labels():
    real = [(f"{word} {n}", label) for n in range(30) for word, label in (("elm", "calm"), ("fir", "loud"))]
    wrong = [(text, {"calm": "loud", "loud": "calm"}[label]) for text, label in real]
    good, bad = probe.measure(real, real, held_out(real)), probe.measure(wrong, real, held_out(real))
    assert isinstance(good, probe.Utility)
    assert isinstance(bad, probe.Utility)
    assert (good.on_corpus.value, good.on_records.value, good.ratio, bad.ratio) == (1.0, 1.0, 1.0, 0.0)
    assert (good.num_tests, good.num_users, good.on_corpus.chance) == (60, 12, 0.5)
    assert "too few to compare" in str(probe.measure(real[:1], real, held_out(real)))


def test_ratio_to_a_yardstick_at_chance_is_refused():
    """Nine of ten records have one label, and words tell nothing of it: plain accuracy is .9, and their ratio 1."""
    rng = np.random.default_rng(0)
    pairs = [(str(rng.choice(list("abcdef"))), "rare" if n % 10 == 0 else "common") for n in range(400)]
    found = probe.measure(pairs[:200], pairs[:200], held_out(pairs[200:]))
    assert isinstance(found, probe.Utility)
    assert found.on_records.value == pytest.approx(0.5, abs=0.02)
    assert found.ratio is None
    line = report._value_line("utility", found)
    assert "no ratio: real records themselves are not shown to teach more than chance here" in line
    assert report._as_json(found)["ratio"] is None


def test_interval_of_balanced_accuracy_covers_the_truth():
    """Users answer right together: an interval over records would cover half as often."""
    rng = np.random.default_rng(0)
    labels = [name for name in ("a", "b") for _ in range(200)]
    users = [f"{name}{n // 10}" for name in ("a", "b") for n in range(200)]
    num_covered = 0
    for _ in range(100):
        skill = {user: rng.beta(1.4, 0.6) for user in users}  # mean .7
        found = BalancedAccuracy.of([rng.random() < skill[user] for user in users], labels, users)
        num_covered += found.lower <= 0.7 <= found.upper
    assert num_covered >= 90


def test_few_right_answers_leave_a_wide_interval():
    found = BalancedAccuracy.of([True] * 10, ["a", "b"] * 5, [f"u{n}" for n in range(10)])
    assert (found.value, found.upper) == (1.0, 1.0)
    assert 0.5 < found.lower < 0.8


def test_always_naming_one_label_is_chance():
    labels = ["a"] * 90 + ["b"] * 5 + ["c"] * 5
    found = BalancedAccuracy.of([label == "a" for label in labels], labels, [f"u{n}" for n in range(100)])
    assert found.value == pytest.approx(found.chance) == pytest.approx(1 / 3)
    assert not found.is_above_chance


def test_probe_of_texts_without_words_guesses_one_label():
    """What an untrained model writes: marks alone, which have no words to hash."""
    wordless = [(". . !", label) for label in ("a", "b", "b")]
    tests = [(f"word{number % 7}", "ab"[number % 2]) for number in range(200)]
    found = probe.measure(wordless, tests, held_out(tests))
    assert isinstance(found, probe.Utility)
    assert found.on_corpus.value == 0.5


def test_probe_is_that_of_all_hashed_words():
    """Words that no training text has are left out, which changes no prediction."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    rng = np.random.default_rng(0)

    def drawn(num, words):
        labels = rng.choice(["calm", "loud"], num)
        hints = np.where(rng.random(num) < 0.8, labels, "loud")
        return [(" ".join([*rng.choice(words, 6), hint]), name) for hint, name in zip(hints, labels, strict=True)]

    training, tests = drawn(60, list("abcdef")), drawn(200, list("defghi"))
    hashed = HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False)
    every = LogisticRegression(max_iter=1000, C=10.0)
    every.fit(hashed.transform([text for text, _ in training]), [label for _, label in training])
    found = probe.measure(training, training, held_out(tests))
    assert isinstance(found, probe.Utility)
    assert 0.6 < found.on_corpus.value < 1.0
    texts, labels = zip(*tests, strict=True)
    expected = balanced_accuracy_score(labels, every.predict(hashed.transform(texts)))
    assert found.on_corpus.value == pytest.approx(expected, abs=0.01)


def test_missing_sentence_model_is_named():
    pairs = [(f"{word} {n}", label) for n in range(20) for word, label in (("elm", "calm"), ("fir", "loud"))]
    texts = [text for text, _ in pairs]
    assert probe.measure_sentences(pairs, pairs, held_out(pairs)) == sentences.MISSING
    assert probe.measure_likeness(texts, texts, texts) == sentences.MISSING


def test_sentences_of_one_kind_are_alike_and_others_are_not(monkeypatch):
    """Vectors around centres: one side with the same centres, one with others."""
    rng = np.random.default_rng(0)

    def embedded(texts):
        centres = np.random.default_rng(1).normal(size=(8, 16))
        return np.stack([centres[int(text)] for text in texts]) + rng.normal(scale=0.1, size=(len(texts), 16))

    same, other = [str(n % 4) for n in range(200)], [str(4 + n % 4) for n in range(200)]
    monkeypatch.setattr(sentences, "is_installed", lambda: True)
    monkeypatch.setattr(sentences, "embedded", embedded)
    alike = probe.measure_likeness(same, same, same)
    assert isinstance(alike, probe.Likeness)
    assert min(alike.of_corpus, alike.of_records) > 0.9
    unlike = probe.measure_likeness(other, same, same)
    assert isinstance(unlike, probe.Likeness)
    assert unlike.of_corpus < 0.1 < 0.9 < unlike.of_records
    half = probe.measure_likeness(same[:100] + other[:100], same, same)
    assert isinstance(half, probe.Likeness)
    assert unlike.of_corpus < half.of_corpus < alike.of_corpus
    labelled = [(text, str(int(text) % 2)) for text in same]
    found = probe.measure_sentences(labelled, labelled, held_out(labelled))
    assert isinstance(found, probe.Utility)
    assert found.on_corpus.value == found.on_records.value == 1.0
    assert "too few" in str(probe.measure_likeness(same[:3], same, same))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not sentences.is_installed(), reason="the sentence model is not installed")
def test_vectors_of_minilm_put_like_sentences_together():
    first, second, third = sentences.embedded(
        ["The kettle is broken.", "My water boiler does not work.", "Friends, Romans, countrymen, lend me your ears"]
    )
    assert np.linalg.norm(first) == pytest.approx(1.0)
    assert first @ second > first @ third


def brute_force(texts, records, size) -> int:
    """Texts that share a run of ``size`` tokens with one record."""

    def runs(ids):
        return {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}

    return sum(any(runs(text) & runs(record) for record in records) for text in texts)


@settings(max_examples=60)
@given(
    texts=st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=5),
    records=st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=5),
    size=st.integers(1, 4),
)
def test_copies_equal_those_of_brute_force(texts, records, size):
    index = CorpusIndex(texts, ["" for _ in texts], size)
    found = index.compare([(record, "") for record in records])
    assert found.copies.num == brute_force(texts, records, size)
    assert found.copies.num_texts == sum(len(text) >= size for text in texts)


def test_equal_hashes_of_other_tokens_are_no_copy(monkeypatch):
    """The mutant's hash calls all runs equal: the count stays right, since tokens are compared."""
    monkeypatch.setattr(copies, "_hashes", lambda ids, size: np.zeros(max(0, len(ids) - size + 1), np.uint64))
    assert CorpusIndex([[1, 2, 3]], [""], 2).compare([([3, 2, 1], "")]).copies.num == 0
    assert CorpusIndex([[1, 2, 3]], [""], 2).compare([([9, 2, 3], "")]).copies.num == 1


def test_near_copy_has_most_runs_of_words_in_one_record():
    text = "the kettle that you sent me last week does not switch on any more"
    index = CorpusIndex([[]], [text], 50)
    words = text.split()
    assert index.compare([([], text.replace("kettle", "toaster"))]).near_copies.num == 1  # 2 of 10 runs differ
    assert index.compare([([], " ".join(words[:8])), ([], " ".join(words[4:]))]).near_copies.num == 0  # no one record
    assert CorpusIndex([[]], ["too short"], 50).compare([([], "too short")]).near_copies == Rate(0, 0, None)


@settings(max_examples=60)
@given(
    texts=st.lists(st.lists(st.sampled_from("ab"), max_size=16), min_size=1, max_size=5),
    records=st.lists(st.lists(st.sampled_from("abc"), max_size=20), max_size=5),
)
def test_near_copies_equal_those_of_brute_force(texts, records):
    def runs(words):
        return {tuple(words[i : i + copies.NUM_WORDS]) for i in range(len(words) - copies.NUM_WORDS + 1)}

    found = CorpusIndex([[] for _ in texts], [" ".join(text) for text in texts], 50)
    near = found.compare([([], " ".join(record)) for record in records]).near_copies
    long = [runs(text) for text in texts if len(text) >= copies.FEWEST_WORDS]
    expected = sum(
        any(len(text & runs(record)) >= copies.NEAR_SHARE * len(text) for record in records) for text in long
    )
    assert (near.num, near.num_texts) == (expected, len(long))


def test_a_record_costs_the_same_in_a_large_corpus():
    """Each looks its runs up; a pass over the corpus for every record took hours at 100,000 texts."""
    rng = np.random.default_rng(0)
    records = [(rng.integers(0, 1000, 60), f"{n} x y z u v w") for n in range(300)]

    def seconds(num_texts: int) -> float:
        index = CorpusIndex(rng.integers(1000, 2000, (num_texts, 60)), ["" for _ in range(num_texts)], 50)
        times = []
        for _ in range(3):
            start = time.process_time()
            assert index.compare(records).copies.num == 0
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(4000) < 10 * seconds(40)


def test_rate_has_the_bound_of_clopper_and_pearson():
    assert Rate.of(0, 2000).upper == pytest.approx(1 - 0.025 ** (1 / 2000))
    assert Rate.of(0, 0).upper is None


def test_vllm_is_asked_for_the_released_adapter(monkeypatch, tmp_path):
    calls = {}

    class LLM:
        def __init__(self, **options):
            calls["options"] = options

        def generate(self, prompts, parameters, *, lora_request, use_tqdm):
            calls.update(prompts=prompts, parameters=parameters, request=lora_request)
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[7, 8, 1])]) for _ in prompts]

    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **keys: keys  # pyright: ignore[reportAttributeAccessIssue]
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *words: words  # pyright: ignore[reportAttributeAccessIssue]
    for name, module in (("vllm", vllm), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    sampler = VllmSampler("base", tmp_path, tmp_path / "adapter", 12, settings_of(top_k=0), ends=[1])
    assert sampler.draw([[0, 5], [0]], 40) == [[7, 8], [7, 8]]
    assert calls["options"]["max_lora_rank"] == 16
    assert calls["request"] == ("released", 1, str(tmp_path / "adapter"))
    assert calls["prompts"] == [{"prompt_token_ids": [0, 5]}, {"prompt_token_ids": [0]}]
    assert [keys["seed"] for keys in calls["parameters"]] == [40, 41]
    assert calls["parameters"][0]["top_k"] == -1


def test_vllm_serves_what_its_adapters_can_be(tree, monkeypatch):
    def refusal(**changes):
        return sampling.why_not_vllm(validate({**tree, **changes}))

    assert "not installed" in refusal()
    monkeypatch.setattr(sampling.importlib.util, "find_spec", lambda name: object())
    assert refusal() == ""
    assert "DoRA" in refusal(lora={"use_dora": True})
    assert "rank of at most 512" in refusal(lora={"rank": 600})
    assert "virtual tokens" in refusal(training={"method": "prompt_tuning"})
    assert sampling.chosen_engine("auto", validate(tree)) == "vllm"
