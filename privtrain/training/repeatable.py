"""Kernels that give the same bits each time: a replayed step and a second backward pass depend on them.

On CUDA many kernels add up in whatever order threads come by, unless torch is told otherwise. That has two strengths.
Under the weak setting torch only warns, and flash and memory-efficient attention still take their quick backward pass.
Under the strict one they take the deterministic pass, and operations that have no deterministic kernel are refused. A
model that needs one of these gets the weak setting, and plain attention, which is deterministic but needs memory for
tokens² a head. Whether the rest is exact, the self-test decides.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

#: What cuBLAS needs to be told before it starts: buffers of constant sizes.
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_CHOICES = (":4096:8", ":16:8")
#: In what torch raises under the strict setting.
_LACKING = "does not have a deterministic implementation"


def prefer_repeatable(device: torch.device) -> None:
    """Take deterministic kernels on ``device`` where torch has them; the weak setting. Before any pass.

    CPU kernels are deterministic as they are.
    """
    if device.type != "cuda":
        return
    if os.environ.get(_CUBLAS) not in _CUBLAS_CHOICES:
        os.environ[_CUBLAS] = _CUBLAS_CHOICES[0]
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else torch fills every new tensor with NaN, a kernel each, to expose code that reads what nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cuda.enable_cudnn_sdp(False)  # the attention that is never deterministic


def demand_repeatable(device: torch.device, work: Callable[[], T], say: Callable[[str], None]) -> T:
    """Return what ``work`` does under the strict setting, which stays; if that refuses something, with plain attention.

    Every rank meets the same operations, so all do the same.

    Args:
        device: of the passes.
        work: passes over the model, forward and backward; may be done twice.
        say: is told why plain attention is taken.
    """
    if device.type != "cuda":
        return work()
    torch.use_deterministic_algorithms(True)
    try:
        return work()
    except Exception as failure:
        lacking = _lacking(failure)
        if not lacking:
            raise
    say(f"attention takes plain kernels, which need more memory: {lacking}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    return work()


def _lacking(failure: BaseException) -> str:
    """Return what torch said of an operation without a deterministic kernel, in an error or its causes; or nothing."""
    error: BaseException | None = failure
    while error is not None:
        before, found, _ = str(error).partition(_LACKING)
        if found:
            return f"{before.split()[-1]} {_LACKING}" if before.split() else f"an operation {_LACKING}"
        error = error.__cause__ or error.__context__
    return ""
