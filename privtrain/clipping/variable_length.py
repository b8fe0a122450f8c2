"""Attention within all records of a line by one kernel of a GPU: torch's flash attention of variable length.

Record by record, a layer launches several kernels for each record of the line; this is one forward and one backward.
What a record gets must have the same bits whatever shares the line, so nothing in a launch may depend on the others:

* Keys are not split over blocks (``num_splits=1``): torch documents that a sequence's result is then its own.
* The longest sequence is said to be as long as the whole line, which alone decides the grid and which kernel is taken.
* The deterministic backward pass adds up a query's gradient in as many parts as keep every multiprocessor busy with
  sequences and heads. Empty sequences are added until one part does.

torch takes the deterministic backward pass only where :mod:`privtrain.training.repeatable` demanded it. The self-test
proves the bits on the real model and device; where they differ, attention goes record by record
(:mod:`privtrain.clipping.attention`).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence

import torch

try:
    from torch.nn.attention.varlen import varlen_attn as _kernel
except ImportError:  # torch before 2.10
    _kernel = None

#: What the kernel must know: keys in one part, and fewer heads of keys than of queries.
_NEEDED_OPTIONS = {"num_splits", "enable_gqa", "window_size", "scale"}
#: NVIDIA's Ampere and later.
_LEAST_CAPABILITY = (8, 0)
#: Of the numbers of a head: most, and what their count must be a multiple of.
_MOST_HEAD_SIZE, _HEAD_MULTIPLE = 256, 8


def refusal(device: torch.device) -> str:
    """Return why the kernel cannot be used on ``device``; empty if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it is a kernel for NVIDIA's GPUs"
    if _kernel is None or not set(inspect.signature(_kernel).parameters) >= _NEEDED_OPTIONS:
        return f"torch {torch.__version__} has no variable-length attention that keeps records apart"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is too old for it"
    if not torch.are_deterministic_algorithms_enabled() or torch.is_deterministic_algorithms_warn_only_enabled():
        return "its backward pass is not deterministic here"
    return ""


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether the kernel takes these, [1, heads, tokens, head size] each."""
    head_size = query.shape[-1]
    dtypes = {_computed_in(side) for side in (query, key, value)}
    return (
        len(dtypes) == 1
        and dtypes <= {torch.bfloat16, torch.float16}
        and head_size == key.shape[-1] == value.shape[-1]
        and head_size <= _MOST_HEAD_SIZE
        and head_size % _HEAD_MULTIPLE == 0
    )


def num_sequences(num_pieces: int, num_heads: int, device: torch.device) -> int:
    """Return how many sequences a launch needs, empty ones included, for its backward pass to add up in one part.

    Args:
        num_pieces: records of the line, and its padding.
        num_heads: of the queries.
        device: where the kernel runs.
    """
    return max(num_pieces, -(-_num_multiprocessors(device) // num_heads))


def bounds(sizes: Sequence[int], num: int, device: torch.device) -> torch.Tensor:
    """Return [num + 1] int32: where each of ``num`` sequences begins, and where the last one stops.

    Args:
        sizes: tokens of the sequences that are not empty, in order.
        num: of all sequences, at least ``len(sizes)``.
        device: where the result is.
    """
    places = [0, *itertools.accumulate(sizes)]
    places += places[-1:] * (num - len(sizes))  # of the empty ones
    return torch.tensor(places, dtype=torch.int32).to(device, non_blocking=True)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequence_bounds: torch.Tensor,
    *,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute causal attention within each sequence: [1, heads, tokens, head size] → [1, tokens, heads, head size].

    Args:
        query: of the line's tokens.
        key: likewise; may have fewer heads, each shared by equally many of the queries'.
        value: as ``key``.
        sequence_bounds: of :func:`bounds`; the sequences make up the whole line.
        scale: of the scores; ``None`` for one over the root of the head size.
        window: how many tokens back a token sees, itself included; ``None`` for all.
    """
    assert _kernel is not None
    num_tokens, num_heads = query.shape[2], query.shape[1]
    queries, keys, values = (side[0].transpose(0, 1).to(_computed_in(side)) for side in (query, key, value))
    output = _kernel(
        queries,
        keys,
        values,
        sequence_bounds,
        sequence_bounds,
        num_tokens,
        num_tokens,
        scale=scale,
        window_size=(-1, 0) if window is None or window >= num_tokens else (window - 1, 0),
        enable_gqa=key.shape[1] != num_heads,
        num_splits=1,
    )
    assert isinstance(output, torch.Tensor)  # nothing else was asked for
    return output[None]


def _computed_in(side: torch.Tensor) -> torch.dtype:
    """Return the dtype that torch's own attention would compute in: autocast decides, where it is on."""
    device_type = side.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else side.dtype


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
