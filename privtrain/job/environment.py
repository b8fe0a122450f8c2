"""A digest of the environment: all that can be seen of what a step is computed with. Ranks must agree on it.

A run that is resumed in another environment begins a new generation, with a new secret for samples and noise
(:mod:`.resume` says why). What cannot be seen here, such as settings of MKL or oneDNN, shows in the sums of steps,
which are compared when steps are replayed, and which the noise is keyed by.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform

import torch

import privtrain
from privtrain.backends import Backend
from privtrain.config import Config
from privtrain.errors import GuaranteeLost

_LIBRARIES = (
    "accelerate",
    "cryptography",
    "deepspeed",
    "numpy",
    "peft",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
)

#: Packages of this one that a step computes with.
_CODE = ("backends", "clipping", "config", "data", "models", "privacy", "training")


def environment_digest(
    config: Config, backend: Backend, *, precision: str, weights_checksum: str, units_sha256: str
) -> bytes:
    """Return SHA-256 over config, code, library versions, world layout, device, precision, weights and tokens.

    Left out is what cannot change a step: the run's name and directory, tracking, the registry, signing, where the
    index of records lies, and the public evaluation records.

    Args:
        config: the run's.
        backend: for number of ranks, sharding and device.
        precision: of the forward and backward pass.
        weights_checksum: of the base model as loaded.
        units_sha256: of the training units' tokens.
    """
    body = {
        "config": config.model_dump(
            mode="json",
            exclude={
                "run": True,
                "tracking": True,
                "registry": True,
                "release": True,
                "performance": {"index_dir"},
                "data": {"evaluation"},
            },
        ),
        "records_on_disk": config.performance.index_dir is not None,  # whether they are; where does not matter
        "code": _code_digest(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "world_size": backend.world_size,
        "backend": backend.kind,
        "device": _device_name(backend.device),
        "num_threads": torch.get_num_threads(),
        "precision": precision,
        "weights": weights_checksum,
        "units": units_sha256,
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()


def check_ranks_agree(backend: Backend, digests: dict[str, bytes]) -> None:
    """Refuse to train if a rank has another plan, data set, config or environment than rank 0.

    Units are drawn by index: on a rank with other data an index is another user, and one user could enter a step twice.

    Args:
        backend: gathers the digests of all ranks.
        digests: what is compared, in words for the error → this rank's digest of it.

    Raises:
        GuaranteeLost: naming the ranks and what differs.
    """
    for name, value in digests.items():
        gathered = backend.gather_digests(value)
        others = [str(rank) for rank, item in enumerate(gathered) if item != gathered[0]]
        if others:
            raise GuaranteeLost(
                f"rank {', '.join(others)} has another {name} than rank 0; give every rank the same config, "
                "data files, base model, software and type of device"
            )


def _device_name(device: torch.device) -> str:
    """Return a name of the hardware, which decides how kernels round."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # Which instructions a CPU has decides how its kernels round; older versions of torch cannot say.
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {sorted(features.items())}"


@functools.cache
def _code_digest() -> str:
    """Return SHA-256 of the source of the packages that a step computes with.

    Other packages are left out, so that an edit there does not begin a new generation. Cached, since a process
    continues with the code that it has imported, whatever becomes of the files.
    """
    digest = hashlib.sha256()
    root = pathlib.Path(privtrain.__file__).parent
    for package in _CODE:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()
