"""Base models that are not whole, adapters that match nothing, records that do not fit: refused by name."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from attacks.scoring.documents import tokens_of
from attacks.scoring.variants import Variants, recall_prefix, rewrite
from privtrain.commands.plan import describe_plan
from privtrain.config import validate
from privtrain.config.model import LoraSection, ModelSection
from privtrain.data.corpus import group_by_user
from privtrain.data.encode import Encoder
from privtrain.data.microbatch import Packer
from privtrain.errors import ConfigError
from privtrain.models import load
from privtrain.models.complete import new_modules
from privtrain.models.limits import check_limits, learned_positions, num_ids_of, pad_classifier, padding_id
from privtrain.models.load import load_base, load_classifier, load_tokenizer
from privtrain.models.losses import Classification
from privtrain.models.trainable import add_lora
from privtrain.models.weights import BaseSource
from privtrain.run import base_model
from privtrain.run.base_model import check_model, digests_in
from tests.conftest import write_config
from tests.privtrain.bases import change_config, change_weights, save_base, save_tokenizer


@pytest.fixture
def base(tmp_path) -> pathlib.Path:
    return save_base(tmp_path / "m")


def section(path: pathlib.Path) -> ModelSection:
    return ModelSection(name_or_path=str(path))


def refused(path: pathlib.Path, is_classifier: bool = False) -> str:
    def opened() -> None:
        if is_classifier:
            load_classifier(section(path), torch.float32, labels=["no", "yes"], init_seed=0)
        else:
            load_base(section(path))

    with pytest.raises(ConfigError) as caught:
        opened()
    return str(caught.value)


WRONG = {
    "a layer that the file lacks": (lambda path: change_config(path, num_hidden_layers=3), "model.layers.2."),
    "one tensor gone": (
        lambda path: change_weights(path, lambda held: {k: v for k, v in held.items() if "norm" not in k or "0" in k}),
        "model.norm.weight",
    ),
    "all names with a prefix": (
        lambda path: change_weights(path, lambda held: {f"module.{k}": v for k, v in held.items()}),
        "it holds others under names that fit none (module.",
    ),
    "wider than the file": (lambda path: change_config(path, intermediate_size=64), "64x32 by config.json"),
    "more ids than the file": (
        lambda path: change_config(path, vocab_size=300),
        "258x32 in the file, 300x32 by config",
    ),
    "an untied head that the file lacks": (
        lambda path: change_config(path, tie_word_embeddings=False),
        "lm_head.weight",
    ),
}


@pytest.mark.parametrize("is_classifier", [False, True], ids=["causal", "classifier"])
@pytest.mark.parametrize("case", WRONG)
def test_missing_or_misshapen_weights_are_named(base, case, is_classifier):
    damage, expected = WRONG[case]
    damage(base)
    if is_classifier and "head" in case:  # a classifier has no use for it
        load_classifier(section(base), torch.float32, labels=["no", "yes"], init_seed=0)
        return
    assert expected in refused(base, is_classifier)


@settings(max_examples=12)
@given(data=st.data())
def test_any_weight_that_is_taken_away_is_missed(base, data):
    path = base / "model.safetensors"
    whole = path.read_bytes()
    try:
        names = sorted(dict(load_base(section(base)).named_parameters()))
        name = data.draw(st.sampled_from(names))
        change_weights(base, lambda held: {k: v for k, v in held.items() if k != name})
        assert name in refused(base)
    finally:
        path.write_bytes(whole)


def test_tied_weights_and_buffers_are_no_missing_weights(base, tmp_path):
    assert load_base(section(base)).privtrain_new_modules == []
    assert load_base(section(save_base(tmp_path / "gpt2", "gpt2"))).privtrain_new_modules == []


def test_new_classifier_head_is_saved_with_adapter(base):
    model = load_classifier(section(base), torch.float32, labels=["no", "yes"], init_seed=0)
    assert model.privtrain_new_modules == ["score"]
    tuned = add_lora(model, LoraSection(rank=2), 0, "base", is_classifier=True)
    assert "score" in tuned.peft_config["default"].modules_to_save


def test_a_new_pooling_layer_is_trained_and_saved_too(tmp_path):
    """BERT's language models have none: a classifier made of one would have a random, frozen layer."""
    import transformers

    shape = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.BertForMaskedLM(transformers.BertConfig(**shape, intermediate_size=48)).save_pretrained(tmp_path)
    model = load_classifier(section(tmp_path), torch.float32, labels=["no", "yes"], init_seed=0)
    assert model.privtrain_new_modules == ["bert.pooler", "classifier"]
    tuned = add_lora(model, LoraSection(rank=2, target_modules=["query"]), 0, "base", is_classifier=True)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert any("pooler" in name for name in trained)
    assert any("classifier" in name for name in trained)


def test_mutant_without_the_look_a_random_layer_is_trained_on(base, monkeypatch):
    """Plant: nobody compares what was loaded with what the model has."""
    change_config(base, num_hidden_layers=3)
    assert "lacks" in refused(base)
    monkeypatch.setattr(load, "new_modules", lambda *_, **__: [])
    assert len(load_base(section(base)).model.layers) == 3


def test_missing_weight_is_found_under_any_class_name(base):
    model = load_base(section(base))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        new_modules(model, {"missing_keys": {"model.norm.weight"}}, "m", is_classifier=True)


DAMAGE = {
    "pointer": (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "half": (lambda whole: whole[: len(whole) // 2], "is damaged"),
    "one byte short": (lambda whole: whole[:-1], "is damaged"),
    "one byte more": (lambda whole: whole + b"x", "is damaged"),
    "a web page": (lambda whole: b"<!DOCTYPE html><html>not found</html>", "is damaged"),
    "nothing": (lambda whole: b"", "is empty"),
    "a header of numbers": (lambda whole: (2).to_bytes(8, "little") + b"[]", "is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weight_files_are_one_line_before_loading(base, case):
    damage, expected = DAMAGE[case]
    path = base / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    (fault,) = check_model(section(base))
    assert expected in fault.problem
    assert "model.safetensors" in fault.problem
    refused(base)  # also from who does not look first


def test_pointer_files_and_missing_parts_are_named(base):
    (base / "tokenizer.json").write_bytes(DAMAGE["pointer"][0](b""))
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (fault,) = check_model(section(base))
    assert "tokenizer.json is a Git LFS pointer" in fault.problem
    save_tokenizer(base)
    (fault,) = check_model(section(base))
    assert "names model-00002-of-00002.safetensors, which is not there" in fault.problem


def test_only_the_weights_that_are_read_must_be_whole(base):
    """As a clone without large files leaves them: pointers in place of other formats."""
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model-q4.gguf", "pytorch_model-00001-of-00002.bin"):
        (base / name).write_bytes(DAMAGE["pointer"][0](b""))
    assert check_model(section(base)) == []
    (base / "model.safetensors").unlink()
    (fault,) = check_model(section(base))
    assert "pytorch_model.bin is a Git LFS pointer" in fault.problem


def test_a_model_in_parts_in_the_hubs_cache_is_whole(base, tmp_path):
    """There every file is a link into a directory of blobs."""
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert check_model(section(snapshot)) == []


@settings(max_examples=20)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_weight_file_cut_anywhere_is_seen(base, cut):
    path = base / "model.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: int(len(whole) * cut)])
        assert len(check_model(section(base))) == 1
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("lora", "key", "near"),
    [
        ({"target_modules": ["q_proj", "vproj"]}, "lora.target_modules", "v_proj"),
        ({"target_modules": ["layers.9.self_attn.q_proj"]}, "lora.target_modules", "q_proj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, "lora.modules_to_save", "lm_head"),
        ({"target_modules": []}, "lora.target_modules", "all-linear"),
        ({"target_modules": ["act_fn"]}, "lora.target_modules", "PEFT refuses"),
    ],
)
def test_names_that_match_no_module_are_refused_with_near_names(base, lora, key, near):
    with pytest.raises(ConfigError) as caught:
        add_lora(load_base(section(base)), LoraSection(**lora), 0, "base")
    assert {fault.path for fault in caught.value.faults} == {key}
    assert near in str(caught.value)


@pytest.mark.parametrize("name", ["q_proj", "self_attn.q_proj", "model.layers.1.self_attn.q_proj", "embed_tokens"])
def test_every_way_to_name_a_module_is_taken(base, name):
    add_lora(load_base(section(base)), LoraSection(target_modules=[name]), 0, "base")


def config_of(tree, path, **data):
    tree["model"]["name_or_path"] = str(path)
    tree["data"] |= data
    return validate(tree)


def test_records_beyond_learned_positions_are_refused(tree, tmp_path, base):
    gpt2 = save_base(tmp_path / "gpt2", "gpt2")
    model, tokenizer = load_base(section(gpt2)), load_tokenizer(section(gpt2))
    assert learned_positions(model) == 64
    check_limits(config_of(tree, gpt2, max_length=64), model, tokenizer)
    with pytest.raises(ConfigError, match=r"data\.max_length: given 65; .* at most 64 tokens"):
        check_limits(config_of(tree, gpt2, max_length=65), model, tokenizer)
    assert learned_positions(load_base(section(base))) is None


def test_positions_that_a_model_keeps_for_itself_do_not_count():
    import transformers

    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = transformers.RobertaModel(
        transformers.RobertaConfig(**small, intermediate_size=16, max_position_embeddings=34, pad_token_id=1)
    )
    opt = transformers.OPTModel(
        transformers.OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=32)
    )
    assert learned_positions(roberta) == 32
    assert learned_positions(opt) == 32
    ids = torch.full((1, 32), 5)
    roberta(input_ids=ids)
    opt(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 33), 5))


def test_ids_beyond_the_embedding_are_padding_or_predict_nothing(tree, base):
    save_tokenizer(base, pad="[PAD]", extra=("<|new|>",))
    model, tokenizer = load_base(section(base)), load_tokenizer(section(base))
    assert len(tokenizer) > 258
    check_limits(config_of(tree, base), model, tokenizer)
    assert padding_id(model, tokenizer) == tokenizer.eos_token_id
    encoder = Encoder(config_of(tree, base).data, tokenizer, num_ids_of(section(base)))
    encoded = encoder.encode(["plain", "with <|new|> mark"])
    assert [record.num_targets for record in encoded.records] == [6, 0]
    assert encoded.num_without_target == 1
    assert max(int(record.tokens.max()) for record in encoded.records) < 258


def test_ids_beyond_the_embedding_are_scored_as_marks_alone(tree, base):
    """What the attack job feeds the model: ids that it embeds, two tokens at least."""
    save_tokenizer(base, pad="[PAD]", extra=("<|new|>",))
    encoder = Encoder(config_of(tree, base).data, load_tokenizer(section(base)), num_ids_of(section(base)))
    texts = ["plain", "with <|new|> mark"]
    assert [len(ids) for ids in tokens_of(texts, encoder)] == [7, 2]
    lowered = rewrite(
        Variants(lowercase=True), texts, tokens_of(texts, encoder), encoder=encoder, max_length=9, prefix=None
    )
    assert [len(item.tokens) for item in lowered] == [7, 2]
    corpus = group_by_user([("a", "<|new|>"), ("a", "some words of somebody"), ("b", "x")])
    manifest = {"held_out": ["a"], "attacker": {}, "canaries": []}
    assert len(recall_prefix(manifest, corpus, encoder, 64)) > 2
    unlimited = Encoder(config_of(tree, base).data, load_tokenizer(section(base)))
    assert max(tokens_of(texts, unlimited)[1]) >= 258  # the mutant: without a limit the model is asked for no row


def test_a_classifiers_label_takes_a_position(tree, tmp_path):
    gpt2 = save_base(tmp_path / "gpt2", "gpt2")
    model, tokenizer = load_base(section(gpt2)), load_tokenizer(section(gpt2))
    labels = {"format": "classification", "labels": [0, 1]}
    check_limits(config_of(tree, gpt2, max_length=64, **labels), model, tokenizer)
    with pytest.raises(ConfigError, match=r"at most 64 tokens, the label's place among them"):
        check_limits(config_of(tree, gpt2, max_length=65, **labels), model, tokenizer)
    rows = [json.dumps({"label": 1, "texts": [text]}) for text in ("x" * 200, "</s>")]
    encoded = Encoder(config_of(tree, gpt2, max_length=64).data, tokenizer).encode(rows)
    assert [len(record) for record in encoded.records] == [64, 2]
    classifier = load_classifier(section(gpt2), torch.float32, labels=[0, 1], init_seed=0)
    pad_classifier(classifier, tokenizer)
    objective = Classification.of(classifier, tokenizer, num_labels=2, pad_id=0, is_pair=False)
    batches = list(Packer(1, 64, 0).pack([[record] for record in encoded.records], 2))
    assert batches[0].input_ids.shape == (1, 64)
    losses = [objective.losses(classifier, batch.input_ids, batch.target_mask) for batch in batches]
    assert torch.isfinite(torch.cat(losses)).all()
    shorter = objective.losses(classifier, batches[1].input_ids[:, :2], batches[1].target_mask[:, :2])
    torch.testing.assert_close(losses[1], shorter)


def test_marks_beyond_the_embedding_are_refused(tree, base):
    tokenizer = load_tokenizer(section(base))
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    with pytest.raises(ConfigError, match="eos_token has id 258; the model embeds 258 ids"):
        check_limits(config_of(tree, base), load_base(section(base)), tokenizer)


def test_a_base_in_parts_has_the_side_files_of_a_whole_one(base, tmp_path):
    """What a sharded run releases beside the weights is what any other does."""
    settings_of = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 77, "eos_token_id": [1, 5]}
    path = base / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings_of}))
    change_config(base, use_cache=True)
    source = BaseSource(section(base), torch.float32, method="full")
    written = {}
    for name, model in (("whole", source.whole()), ("empty", source.empty())):
        assert model.config.use_cache is False
        with load.saved_as_loaded(model):
            model.save_pretrained(tmp_path / name)
        assert model.config.use_cache is False
        written[name] = {
            file: json.loads((tmp_path / name / file).read_text()) for file in ("config.json", "generation_config.json")
        }
    assert written["whole"] == written["empty"]
    assert written["whole"]["config.json"]["use_cache"] is True
    assert {k: written["whole"]["generation_config.json"][k] for k in settings_of} == settings_of


def put_in_one_part(base: pathlib.Path, part: str) -> None:
    """Keep the weights as one part of an index, wherever its name leads."""
    (base / part).parent.mkdir(exist_ok=True)
    (base / "model.safetensors").rename(base / part)
    index = {"weight_map": {name: part for name in load_file(base / part)}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("part", ["../elsewhere.safetensors", "below/part.safetensors", "./part.safetensors", ".."])
def test_parts_that_lie_elsewhere_are_refused(base, part):
    """Their content is in no digest, so another model could be put there."""
    if part == "..":
        (base / "model.safetensors").unlink()
        (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": ".."}}')
    else:
        put_in_one_part(base, part)
    (fault,) = check_model(ModelSection(name_or_path=str(base)))
    assert "outside of its directory" in fault.problem
    with pytest.raises(ConfigError, match="outside of its directory"):
        digests_in(base)


def test_parts_in_their_place_are_bound(base):
    put_in_one_part(base, "part.safetensors")
    assert check_model(ModelSection(name_or_path=str(base))) == []
    before = digests_in(base)
    (base / "part.safetensors").write_bytes(b"another")
    assert digests_in(base)["part.safetensors"] != before["part.safetensors"]


def test_without_its_check_other_weights_have_the_same_digests(base, monkeypatch):
    """The mutant: an index is followed wherever it leads."""
    put_in_one_part(base, "../elsewhere.safetensors")
    monkeypatch.setattr(base_model, "weights_read", lambda _: ([], []))
    before = digests_in(base)
    (base.parent / "elsewhere.safetensors").write_bytes(b"another")
    assert digests_in(base) == before


def test_a_base_that_holds_an_adapter_is_refused(base, tmp_path):
    """transformers would load it, or the base that it names, in silence."""
    peft = pytest.importorskip("peft")
    network = load_base(ModelSection(name_or_path=str(base)))
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(network, settings).save_pretrained(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, base / name)
    (fault,) = check_model(ModelSection(name_or_path=str(base)))
    assert "privtrain export --merge" in fault.problem
    with pytest.raises(ConfigError, match="privtrain export --merge"):
        load_base(ModelSection(name_or_path=str(base)))


def test_digests_are_of_the_weights_that_are_loaded(base):
    """A stray file of a better format is not what transformers opens."""
    network = load_base(ModelSection(name_or_path=str(base)))
    torch.save(network.state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").rename(base / "stray.safetensors")
    before = digests_in(base)
    assert "stray.safetensors" not in before
    with open(base / "pytorch_model.bin", "ab") as file:
        file.write(b"x")
    assert digests_in(base)["pytorch_model.bin"] != before["pytorch_model.bin"]


@pytest.mark.parametrize(
    "name", ["bpe.codes", "source.spm", "dict.txt", "qwen.tiktoken", "vocab", "chat_template.jinja", "modeling.py"]
)
def test_whatever_a_tokenizer_may_read_is_bound(base, name):
    assert name not in digests_in(base)
    (base / name).write_text("x")
    assert name in digests_in(base)


@pytest.mark.parametrize("name", ["README.md", "LICENSE.txt", "NOTICE", "flax_model.msgpack", "a.onnx", "release.json"])
def test_what_nobody_loads_may_come_and_go(base, name):
    before = digests_in(base)
    (base / name).write_text("x")
    assert digests_in(base) == before


def test_weights_of_a_part_unknown_to_config_json_are_refused(tmp_path):
    """The model would be another one than the file's: fewer layers, or layers without their biases."""
    for name, shape, said in (
        ("layers", {"num_hidden_layers": 4}, {"num_hidden_layers": 2}),
        ("biases", {"attention_bias": True}, {"attention_bias": False}),
    ):
        base = save_base(tmp_path / name, **shape)
        load_base(ModelSection(name_or_path=str(base)))
        change_config(base, **said)
        with pytest.raises(ConfigError, match=r"holds \d+ weights that a LlamaForCausalLM of its config\.json"):
            load_base(ModelSection(name_or_path=str(base)))


def test_weights_of_a_part_that_the_model_has_not_stay_unread(tmp_path):
    base = save_base(tmp_path / "m")
    further = {"vision_tower.weight": torch.zeros(2), "model.visual.proj.weight": torch.zeros(2)}
    change_weights(base, lambda tensors: {**tensors, **further})
    load_base(ModelSection(name_or_path=str(base)))


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token_id": 9999},
        {"num_attention_heads": 0},
        {"hidden_size": -32},
        {"hidden_size": "32"},
        {"vocab_size": 0},
    ],
)
def test_sizes_that_no_model_has_are_a_fault_of_its_config(tree, tmp_path, changes):
    """And never a traceback, neither of training nor of the plan, which is shown all the same."""
    base = save_base(tmp_path / "base")
    change_config(base, **changes)
    tree["model"]["name_or_path"] = str(base)
    with pytest.raises(ConfigError, match="model"):
        load_base(ModelSection(name_or_path=str(base)))
    assert describe_plan(write_config(tree, tmp_path / "c.yaml"), [])["epsilon"] > 0


def test_an_adapter_alone_is_no_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (fault,) = check_model(ModelSection(name_or_path=str(tmp_path)))
    assert "has no config.json, but an adapter; merge that into its base first" in fault.problem


def test_a_fresh_head_is_not_reported_as_missing(tmp_path, caplog):
    """The report advises to train it, also on export, where it was."""
    base = save_base(tmp_path / "base")
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    model = load_classifier(ModelSection(name_or_path=str(base)), torch.float32, labels=["a", "b"], init_seed=0)
    assert model.privtrain_new_modules == ["score"]
    assert "MISSING" not in caplog.text
    assert logger.level == level
