"""What the fork server has imported before it makes the first rank."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import tests.cluster  # noqa: F401

torch.set_num_threads(1)
