"""Whole jobs on chats, prompts and labels: the loss is the task's own, and what is released loads and answers."""

from __future__ import annotations

import copy
import json

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from tokenizers import processors

from attacks.errors import AttackInputError
from attacks.scoring.score import ScoreOptions, score_run
from privtrain.clipping import exact_sum
from privtrain.config.model import LoraSection, ModelSection
from privtrain.data.encode import Encoder
from privtrain.data.formats import canonical
from privtrain.data.microbatch import Packer
from privtrain.job.train import train
from privtrain.models.load import load_classifier, load_tokenizer
from privtrain.models.losses import CausalLM, Classification
from privtrain.models.trainable import add_lora
from privtrain.privacy.layout import Layout
from tests.conftest import write_config
from tests.privtrain.models_for_tests import clip, make_clipper, relative_error
from tests.privtrain.test_formats import CHATML, section

_SIZES = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 400,  # RoBERTa counts positions from the padding token's id
    "initializer_range": 0.1,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
LABELS = ["long", "short"]


@pytest.fixture(scope="module", params=["roberta", "bert"])
def encoder_model(request, tmp_path_factory, tiny_llama):
    """A masked language model without a classification head; BERT marks the second text of a pair."""
    directory = tmp_path_factory.mktemp(request.param)
    is_bert = request.param == "bert"
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "sep_token": "<sep>", "cls_token": "<cls>"})
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in ("<pad>", "<sep>", "<cls>")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1" if is_bert else "<cls> $A <sep> <sep> $B <sep>",
        special_tokens=[(mark, ids[mark]) for mark in ("<sep>", "<cls>")],
    )
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {**_SIZES, "pad_token_id": ids["<pad>"]}
    config = hf.BertConfig(**sizes) if is_bert else hf.RobertaConfig(**sizes, type_vocab_size=1)
    (hf.BertForMaskedLM if is_bert else hf.RobertaForMaskedLM)(config).save_pretrained(directory)
    return directory


def _classifier(directory, pairs: bool):
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(directory)))
    model = load_classifier(
        ModelSection(name_or_path=str(directory)),
        torch.float32,
        labels=LABELS,
        init_seed=0,
    )
    objective = Classification.of(model, tokenizer, num_labels=2, pad_id=tokenizer.pad_token_id, is_pair=pairs)
    return tokenizer, model, objective


@pytest.mark.parametrize("pairs", [False, True])
def test_classifier_sum_equals_library_loss_by_unit(encoder_model, pairs):
    """Reference: the tokenizer's own tensors and the model's own ``labels=``, one record at a time, in float64."""
    tokenizer, model, objective = _classifier(encoder_model, pairs)
    model = add_lora(model, LoraSection(rank=2, target_modules="all-linear"), 0, "x", is_classifier=True)
    layout = Layout.of(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in layout.parameters.values():
            p.add_(torch.randn(p.shape) * 0.1)
    assert any("classifier" in name for name in layout.parameters)
    data = section(
        format="classification", labels=LABELS, max_length=64, **({"text_pair_column": "b"} if pairs else {})
    )
    rng = np.random.default_rng(0)
    words = ["alder", "birch", "fir"]
    users = [
        [
            (LABELS[(u + r) % 2], *(" ".join(rng.choice(words, size=1 + (u + r) % 3)) for _ in range(1 + pairs)))
            for r in range(1 + u)
        ]
        for u in range(4)
    ]
    encoder = Encoder(data, tokenizer)
    units = [encoder.encode([canonical(data, row) for row in rows]).records for rows in users]

    double = copy.deepcopy(model).double()
    double_layout = Layout.of(double)
    expected = torch.zeros(layout.num_coordinates, dtype=torch.float64)
    for rows in users:
        loss = torch.zeros((), dtype=torch.float64)
        for label, *texts in rows:
            inputs = tokenizer(*texts, return_tensors="pt", return_token_type_ids=model.config.model_type == "bert")
            loss = loss + double(**inputs, labels=torch.tensor([LABELS.index(label)])).loss / len(rows)
        gradients = torch.autograd.grad(loss, list(double_layout.parameters.values()), allow_unused=True)
        flat = [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(gradients, double_layout.parameters.values(), strict=True)
        ]
        expected += clip(torch.cat(flat), double_layout, 0.3, "flat")

    for route in ("batched", "one_unit"):
        clipper = make_clipper(model, layout, 0.3, lambda ids, mask: objective.losses(model, ids, mask), route=route)
        for microbatch_size in (2, 16):
            packer = Packer(microbatch_size, 64, tokenizer.pad_token_id)
            clipper.reset()
            for batch in packer.pack(units, packer.num_batches(units) + 1):
                clipper.accumulate(batch)
            total = exact_sum.as_float32(clipper.finish(), clipper.grid_exponent)
            assert relative_error(total, expected) < 1e-5


def test_a_fresh_head_is_the_same_on_every_rank(encoder_model):
    heads = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        heads.append(dict(_classifier(encoder_model, False)[1].named_parameters()))
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"kind": "files", "paths": [str(path)]}


def _labelled_rows():
    rng = np.random.default_rng(0)
    for user in range(24):
        for _ in range(1 + user % 5):
            size = int(rng.integers(1, 5))
            yield {"user": f"u{user}", "text": " ".join(["fir"] * size), "label": LABELS[size < 3]}


@pytest.mark.parametrize(
    ("encoder_model", "method"),
    [
        ("roberta", "lora"),
        ("bert", "full"),
        *[pytest.param(*case, marks=pytest.mark.campaign) for case in (("roberta", "full"), ("bert", "lora"))],
    ],
    indirect=["encoder_model"],
)
def test_classification_job_learns_and_releases_the_head(tree, tmp_path, encoder_model, method):
    rows = list(_labelled_rows())
    rows.append({"user": "u0", "text": "x", "label": "neither"})
    tree["data"] |= {"format": "classification", "labels": LABELS, "source": _write(tmp_path / "rows.jsonl", rows)}
    tree["model"]["name_or_path"] = str(encoder_model)
    tree["lora"]["target_modules"] = "all-linear"
    tree["training"] |= {"method": method, "learning_rate": 3e-2 if method == "lora" else 1e-2}
    tree["privacy"] |= {"noise_multiplier": 0.0, "num_steps": 50, "sampling_prob": 0.6, "records_per_user": 5}
    tree["data"]["num_evaluation_records"] = 40
    tree["tracking"]["release_held_out_metrics"] = True
    tree["performance"] |= {"checkpoint_interval_steps": 50, "microbatch_size": 16}
    train(write_config(tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = [m["eval/held_out_accuracy"] for m in metrics if "eval/held_out_accuracy" in m]
    assert accuracy[-1] > 0.9
    assert not any("perplexity" in key for m in metrics for key in m)
    assert json.loads((run / "secret" / "data_counts.json").read_text())["num_empty"] == 1
    if method == "full":
        model = hf.AutoModelForSequenceClassification.from_pretrained(run / "model")
        tokenizer = hf.AutoTokenizer.from_pretrained(run / "model")
        assert model.config.id2label == dict(enumerate(LABELS))
    else:
        base = hf.AutoModelForSequenceClassification.from_pretrained(encoder_model, num_labels=2)
        model = peft.PeftModel.from_pretrained(base, run / "adapter")
        tokenizer = hf.AutoTokenizer.from_pretrained(run / "adapter")
    texts = {"fir": "short", "fir fir fir fir": "long"}
    with torch.no_grad():
        found = model.eval()(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits.argmax(1)
    assert [LABELS[i] for i in found] == list(texts.values())
    with pytest.raises(AttackInputError, match=r"data\.format: classification|training\.method: full"):
        score_run(run, ScoreOptions(batch_tokens=64))


def test_causal_classifier_reads_the_last_token(tree, tmp_path, tiny_llama):
    tree["data"] |= {
        "format": "classification",
        "labels": LABELS,
        "source": _write(tmp_path / "r.jsonl", _labelled_rows()),
    }
    tree["performance"]["clipping_route"] = "batched"
    train(write_config(tree, tmp_path / "c.yaml"))
    adapter = tmp_path / "runs" / "tiny" / "adapter"
    base = hf.AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2)
    model = peft.PeftModel.from_pretrained(base, adapter)
    assert float((model.base_model.model.score.weight - base.score.original_module.weight).abs().max()) > 0


CHATS = [
    [{"role": "user", "content": f"count {n}"}, {"role": "assistant", "content": " ".join("abc"[:n])}]
    for n in (1, 2, 3)
]


@pytest.mark.parametrize("kind", ["chat", "prompt_completion"])
def test_job_on_masked_tokens_learns_and_is_attacked(tree, tmp_path, kind):
    if kind == "chat":
        (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
        tree["data"]["chat_template_file"] = str(tmp_path / "chat.jinja")
        rows = [{"user": f"u{u}", "messages": CHATS[r % 3]} for u in range(24) for r in range(1 + u % 6)]
    else:
        rows = [{"user": f"u{u}", "prompt": "count ", "completion": "a"} for u in range(24) for _ in range(1 + u % 6)]
    tree["data"] |= {"format": kind, "source": _write(tmp_path / "r.jsonl", rows), "max_length": 48}
    tree["tracking"]["release_held_out_metrics"] = True
    tree["privacy"] |= {"noise_multiplier": 0.0, "num_steps": 20}
    train(write_config(tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [m["eval/held_out_loss"] for m in metrics if "eval/held_out_loss" in m]
    assert losses[-1] < losses[0] - 0.2
    score_run(run, ScoreOptions(batch_tokens=128))


def test_context_tokens_pull_no_gradient_of_their_own(tiny_llama):
    """Changing a prompt's predicted tokens into context must remove their loss: checked against the definition."""
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_llama)
    data = section(format="prompt_completion")
    (record,) = Encoder(data, tokenizer).encode([canonical(data, ("a prompt ", "an answer"))]).records
    ids = torch.from_numpy(record.tokens)[None]
    labels = torch.where(torch.from_numpy(record.is_target)[None], ids, -100)
    ours = CausalLM().losses(model, ids, torch.from_numpy(record.is_target)[None])
    assert float(ours) == pytest.approx(float(model(ids, labels=labels).loss) * record.num_targets, rel=1e-5)
