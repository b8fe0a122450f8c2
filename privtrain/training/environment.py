"""A digest of everything that must be equal for a replayed step to be the same step.

Replaying a step under other code, libraries, hyper-parameters, ranks or device gives another sum under the same noise;
whoever holds both models could subtract the noise away. Such a continuation gets a new generation instead.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import platform

import torch

import accountants
import privtrain
from privtrain.backends import Backend
from privtrain.config import Config

_LIBRARIES = ("accelerate", "cryptography", "numpy", "peft", "scipy", "tokenizers", "torch", "transformers")


def environment_digest(config: Config, backend: Backend) -> str:
    """SHA-256 over the resolved config, code, library versions, world layout, device and CPU type.

    The run's name and place and the tracking section cannot change a step and are left out.
    """
    body = {
        "config": config.model_dump(mode="json", exclude={"run": True, "tracking": True}),
        "code": _code_digest(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "world_size": backend.world_size,
        "backend": type(backend).__name__,
        "device": _device_name(backend.device),
        "num_threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()} {platform.machine()}"


def _code_digest() -> str:
    digest = hashlib.sha256()
    for package in (privtrain, accountants):
        assert package.__file__ is not None
        root = pathlib.Path(package.__file__).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()
