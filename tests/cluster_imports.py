"""What the fork server has imported before it makes the first process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dp_accounting  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import attacks.scoring.score  # noqa: F401
import privtrain.backends.fsdp2
import privtrain.backends.zero
import privtrain.job.train
import privtrain.registry.store  # noqa: F401
import tests.cluster
import tests.privtrain.registry_work  # noqa: F401

torch.set_num_threads(1)
