"""Twenty configurations as users of TRL, axolotl and LLaMA-Factory have them: in their keys, with values of our own.

Each is (stack, YAML, what some of our keys become, keys that are refused).
"""

from __future__ import annotations

from typing import Any

TRL_LORA = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
dataset_train_split: train
assistant_only_loss: true
learning_rate: 2.0e-4
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
bf16: true
logging_steps: 25
eval_strategy: steps
eval_steps: 100
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: all-linear
output_dir: Qwen2.5-0.5B-SFT
push_to_hub: true
report_to: none
"""
TRL_FULL = """
model_name_or_path: HuggingFaceTB/SmolLM2-360M
dataset_name: stanfordnlp/imdb
dataset_text_field: text
max_length: 512
packing: true
learning_rate: 2e-5
lr_scheduler_type: cosine
warmup_ratio: 0.1
weight_decay: 0.01
max_steps: 1000
optim: adamw_torch_fused
seed: 42
"""
TRL_QLORA = """
model_name_or_path: meta-llama/Llama-3.1-8B-Instruct
dataset_name: data/train.jsonl
completion_only_loss: true
load_in_4bit: true
bnb_4bit_quant_type: nf4
use_bnb_nested_quant: true
use_peft: true
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
lora_modules_to_save: [lm_head]
attn_implementation: flash_attention_2
dtype: bfloat16
max_grad_norm: 0.3
lr_scheduler_type: constant
"""
TRL_NEFTUNE = """
model_name_or_path: mistralai/Mistral-7B-v0.1
dataset_name: HuggingFaceH4/ultrachat_200k
neftune_noise_alpha: 5
use_liger_kernel: true
fp16: true
"""
TRL_UNKNOWN = """
model_name_or_path: Qwen/Qwen3-4B
dataset_name: philschmid/gretel-synthetic-text-to-sql
learning_rte: 1e-4
optim: adafactor
"""
AXOLOTL_QLORA = """
base_model: NousResearch/Meta-Llama-3-8B
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: ./chats.jsonl
    type: chat_template
    field_messages: messages
    roles_to_train: [assistant]
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: <|end_of_text|>
"""
AXOLOTL_COMPLETION = """
base_model: EleutherAI/pythia-1.4b
datasets:
  - {path: json, data_files: [a.jsonl, b.jsonl], type: completion, field: body}
sequence_len: 1024
micro_batch_size: 4
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: constant_with_warmup
learning_rate: 1e-5
bf16: true
fsdp: [full_shard, auto_wrap]
fsdp_config: {fsdp_offload_params: true}
"""
AXOLOTL_ALPACA = """
base_model: NousResearch/Llama-2-7b-hf
datasets: [{path: mhenrichsen/alpaca_2k_test, type: alpaca}]
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
"""
AXOLOTL_SHAREGPT_NAMES = """
base_model: google/gemma-3-1b-it
chat_template: gemma3
datasets:
  - path: someone/conversations
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
adapter: lora
unfrozen_parameters: ["^lm_head.*"]
"""
AXOLOTL_DPO = """
base_model: meta-llama/Llama-3.2-1B
rl: dpo
datasets: [{path: someone/pairs, type: chat_template.default, split: train}]
adapter: lora
early_stopping_patience: 3
"""
AXOLOTL_LORA_HUB = """
base_model: Qwen/Qwen2.5-1.5B-Instruct
chat_template: tokenizer_default
datasets: [{path: someone/support-chats, type: chat_template, split: train, name: english}]
adapter: lora
peft_use_dora: true
lora_target_modules: [q_proj, v_proj]
deepspeed: deepspeed_configs/zero2.json
lr_scheduler: linear
warmup_ratio: 0.03
"""
AXOLOTL_FUSED = """
base_model: NousResearch/Llama-2-7b-hf
datasets: [{path: text.parquet, type: completion}]
flash_attn_fuse_mlp: true
flash_attn_cross_entropy: true
special_tokens: {bos_token: "<s>", eos_token: "</s>"}
"""
FACTORY_LORA = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: false
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
per_device_eval_batch_size: 1
"""
FACTORY_PRETRAIN = """
model_name_or_path: Qwen/Qwen2.5-7B
stage: pt
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: notes
dataset_dir: data
cutoff_len: 1024
packing: true
"""
FACTORY_FULL_DEEPSPEED = """
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
stage: sft
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: own_chats
template: qwen3_nothink
bf16: true
learning_rate: 1.0e-5
"""
FACTORY_DPO = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: dpo
finetuning_type: lora
pref_beta: 0.1
pref_loss: sigmoid
dataset: dpo_en_demo
"""
FACTORY_LORAPLUS = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
finetuning_type: lora
loraplus_lr_ratio: 16.0
dataset: identity
max_samples: 1000
"""
FACTORY_FREEZE = """
model_name_or_path: models/llama3-8b-pro
stage: sft
finetuning_type: freeze
freeze_trainable_layers: 8
use_llama_pro: true
dataset: identity
"""
FACTORY_QLORA = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
quantization_method: bnb
double_quantization: false
stage: sft
finetuning_type: lora
lora_rank: 16
dataset: identity
template: llama3
"""
FACTORY_VISION = """
model_name_or_path: Qwen/Qwen2.5-VL-7B-Instruct
image_max_pixels: 262144
freeze_vision_tower: true
stage: sft
finetuning_type: lora
dataset: mllm_demo
"""

#: name → (stack, file, some of ours, refused keys)
CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "trl lora": (
        "trl",
        TRL_LORA,
        {
            "lora.rank": 32,
            "lora.dropout": 0.05,
            "data.format": "chat",
            "data.max_length": 1024,
            "performance.gradient_checkpointing": True,
            "data.source": {"kind": "hub", "name": "trl-lib/Capybara", "split": "train"},
        },
        set(),
    ),
    "trl full": (
        "trl",
        TRL_FULL,
        {
            "training.method": "full",
            "privacy.num_steps": 1000,
            "training.num_warmup_steps": 100,
            "data.max_length": 512,
        },
        set(),
    ),
    "trl qlora": (
        "trl",
        TRL_QLORA,
        {
            "model.quantization": "nf4",
            "data.format": "prompt_completion",
            "lora.modules_to_save": ["lm_head"],
            "data.source": {"kind": "files", "paths": ["data/train.jsonl"]},
        },
        set(),
    ),
    "trl neftune": ("trl", TRL_NEFTUNE, {}, {"neftune_noise_alpha", "use_liger_kernel", "fp16"}),
    "trl unknown": ("trl", TRL_UNKNOWN, {}, {"learning_rte", "optim"}),
    "axolotl qlora": (
        "axolotl",
        AXOLOTL_QLORA,
        {
            "model.quantization": "nf4",
            "lora.target_modules": "all-linear",
            "data.held_out_fraction": 0.05,
            "data.messages_column": "messages",
            "performance.microbatch_size": 2,
            "performance.precision": "auto",
            "training.num_warmup_steps": 10,
        },
        set(),
    ),
    "axolotl completion": (
        "axolotl",
        AXOLOTL_COMPLETION,
        {
            "training.method": "full",
            "training.schedule": "constant",
            "data.text_column": "body",
            "data.source": {"kind": "files", "paths": ["a.jsonl", "b.jsonl"]},
        },
        set(),
    ),
    "axolotl alpaca": ("axolotl", AXOLOTL_ALPACA, {}, {"datasets"}),
    "axolotl names of turns": ("axolotl", AXOLOTL_SHAREGPT_NAMES, {}, {"datasets", "unfrozen_parameters"}),
    "axolotl dpo": ("axolotl", AXOLOTL_DPO, {}, {"rl", "datasets", "early_stopping_patience"}),
    "axolotl lora of a hub": (
        "axolotl",
        AXOLOTL_LORA_HUB,
        {
            "lora.use_dora": True,
            "lora.rank": 8,
            "data.source": {"kind": "hub", "name": "someone/support-chats", "split": "train", "subset": "english"},
        },
        set(),
    ),
    "axolotl fused": (
        "axolotl",
        AXOLOTL_FUSED,
        {},
        {"flash_attn_fuse_mlp", "flash_attn_cross_entropy", "special_tokens"},
    ),
    "factory lora": (
        "llamafactory",
        FACTORY_LORA,
        {"lora.rank": 8, "lora.alpha": 16.0, "data.format": "chat", "performance.collective_timeout_seconds": 86400},
        set(),
    ),
    "factory pretrain": (
        "llamafactory",
        FACTORY_PRETRAIN,
        {"data.format": "text", "lora.target_modules": ["q_proj", "v_proj"], "training.learning_rate": 5e-5},
        set(),
    ),
    "factory full": ("llamafactory", FACTORY_FULL_DEEPSPEED, {"training.method": "full"}, set()),
    "factory dpo": ("llamafactory", FACTORY_DPO, {}, {"stage", "pref_beta", "pref_loss"}),
    "factory lora plus": ("llamafactory", FACTORY_LORAPLUS, {}, {"loraplus_lr_ratio", "max_samples"}),
    "factory freeze": (
        "llamafactory",
        FACTORY_FREEZE,
        {},
        {"finetuning_type", "freeze_trainable_layers", "use_llama_pro"},
    ),
    "factory qlora": ("llamafactory", FACTORY_QLORA, {"model.quantization": "nf4", "lora.alpha": 32.0}, set()),
    "factory vision": ("llamafactory", FACTORY_VISION, {}, {"image_max_pixels", "freeze_vision_tower"}),
}
