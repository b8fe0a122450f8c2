"""Attention within each record of a line, by the model's own attention function, one record after another.

A *line* (:mod:`privtrain.data.lines`) is one long row of tokens: records of several units, one after another, with
padding only behind the last. A record must not see the others.

Registered in transformers' public ``AttentionInterface`` under a name of its own, and switched on only within
:func:`within_records`. Each record's queries, keys and values are copied out of the line and go through the function
that the model would call for that record in a row of its own (``sdpa`` or its module's eager one), in shapes that the
record alone decides: so the result has the same bits whatever shares the line, and wherever in it the record stands.
They are not copied where every token of a line begins at a multiple of what a kernel may look at.
Padding gets zeros. transformers makes no mask for a name that it does not know; the causal and sliding-window masks
are made here, from what models hand to every attention function.

On a GPU all records of a line may go through one kernel instead (:mod:`.variable_length`), where the self-test proves
the same of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from privtrain.clipping import refusals, variable_length
from privtrain.data.lines import Line, Span
from privtrain.errors import UnsupportedLayer

#: Under which transformers knows :func:`_attend`.
_NAME = "privtrain_within_records"
#: A record is used in place if its numbers begin at a multiple of so many bytes, as torch's allocations do, by device.
_ALIGNED_BYTES = {"cpu": 64}
_MOST_ALIGNED_BYTES = 512
#: Attention functions of transformers that records can be handed to.
_SUPPORTED = ("sdpa", "eager")


class _Piece(NamedTuple):
    """Neighbouring tokens of a line: one record, or padding.

    Attributes:
        first: the first token.
        stop: one past the last token.
        is_record: false for padding.
    """

    first: int
    stop: int
    is_record: bool


class _Spans:
    """How the present line is divided into records, and the attention masks of these.

    One is set for the block of :func:`within_records`, for all threads: a backward pass may run on another one.

    Args:
        line: the line.
        implementation: the model's own attention, ``"sdpa"`` or ``"eager"``.
        in_one_kernel: whether all records go through one kernel where it fits.

    Attributes:
        num_tokens: of the line.
        implementation: as given.
        in_one_kernel: as given, for ``"sdpa"`` alone.
        num_calls: how often attention was called.
        pieces: records and padding of the line, in order.
        sizes: their numbers of tokens.
    """

    def __init__(self, line: Line, implementation: str, *, in_one_kernel: bool) -> None:
        self.num_tokens = line.num_tokens
        self.implementation = implementation
        self.in_one_kernel = in_one_kernel and implementation == "sdpa"
        self.num_calls = 0
        self._bounds: dict[int, torch.Tensor] = {}  # by the number of sequences
        self._masks: dict[tuple[object, ...], torch.Tensor | None] = {}
        self.pieces = _pieces(line.records, line.num_tokens)
        self.sizes = [piece.stop - piece.first for piece in self.pieces]

    def bounds(self, query: torch.Tensor) -> torch.Tensor:
        """Return where each sequence of one kernel's launch begins, padding and empty ones included."""
        num = variable_length.num_sequences(len(self.sizes), query.shape[1], query.device)
        if num not in self._bounds:
            self._bounds[num] = variable_length.bounds(self.sizes, num, query.device)
        return self._bounds[num]

    def mask(self, num_tokens: int, window: int | None, query: torch.Tensor) -> torch.Tensor | None:
        """Return the mask that the model's own function would get for a record of ``num_tokens`` in a row of its own.

        ``None`` where the function is causal without one. Else [1, 1, tokens, tokens]: whether a token sees another
        (``sdpa``), or what is added to their score (``eager``).

        Args:
            num_tokens: of the record.
            window: how many tokens back a token sees, itself included; ``None`` for all.
            query: gives dtype and device.
        """
        window = num_tokens if window is None else min(window, num_tokens)
        if self.implementation == "sdpa" and window == num_tokens:
            return None
        key = num_tokens, window, query.dtype, query.device
        if key not in self._masks:
            place = torch.arange(num_tokens, device=query.device)
            distance = place[:, None] - place[None]
            seen = (distance >= 0) & (distance < window)
            if self.implementation == "eager":
                lowest = torch.finfo(query.dtype).min
                seen = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(~seen, lowest)
            self._masks[key] = seen[None, None]
        return self._masks[key]


_current: _Spans | None = None


class _Own(torch.autograd.Function):
    """Copies a record's slice of a line, and the gradient of the copy, into memory of their own.

    How a slice is aligned depends on its place in the line, and kernels may round by alignment.
    """

    @staticmethod
    def forward(_ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].clone(memory_format=torch.contiguous_format)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers calls it, record by record: [1, heads, tokens, …] → [1, tokens, heads, …].

    The second result stands for the attention weights, which are not kept.
    """
    spans = _current
    if spans is None:
        raise UnsupportedLayer("attention within records was called outside of a line; this is a bug, report it")
    shapes = {tensor.shape[2] for tensor in (query, key, value)}
    if attention_mask is not None or query.shape[0] != 1 or shapes != {spans.num_tokens}:
        raise UnsupportedLayer(f"attention of type {type(module).__name__} does not see one line of tokens alone")
    if options.get("position_bias") is not None or options.get("is_causal") is False:
        raise UnsupportedLayer(f"attention of type {type(module).__name__} is not causal, or has a bias over the line")
    spans.num_calls += 1
    window = options.get("sliding_window")
    if spans.in_one_kernel and _fits_one_kernel(module, query, key, value, options):
        scale = options.get("scaling")
        return variable_length.attend(query, key, value, spans.bounds(query), scale=scale, window=window), None
    attend = _function(module, spans.implementation)
    needs_copies = not _aligned_everywhere(query, key, value)
    queries, keys, values = (side.split(spans.sizes, dim=2) for side in (query, key, value))
    parts = []
    for i, piece in enumerate(spans.pieces):
        num_tokens = spans.sizes[i]
        if piece.is_record:
            of_record = queries[i], keys[i], values[i]
            if needs_copies:
                of_record = tuple(_Own.apply(side) for side in of_record)
            output, _ = attend(module, *of_record, spans.mask(num_tokens, window, query), **options)
            parts.append(_Own.apply(output) if needs_copies else output)
        else:
            parts.append(value.new_zeros(1, num_tokens, query.shape[1], value.shape[-1]))
    return torch.cat(parts, dim=1), None


def _fits_one_kernel(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> bool:
    """Return whether torch's variable-length kernel computes what ``sdpa`` would: causal, without dropout."""
    drops = bool(options.get("dropout"))
    is_causal = options.get("is_causal") or getattr(module, "is_causal", True)
    return not drops and bool(is_causal) and variable_length.fits(query, key, value)


def _aligned_everywhere(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether a record's numbers, and the gradient of its output, are aligned wherever it stands in the line.

    So they are if every token begins at a multiple of the bytes that count: each tensor's start, each head and each
    token's size must be such multiples.
    """
    alignment = _ALIGNED_BYTES.get(query.device.type, _MOST_ALIGNED_BYTES)
    num_bytes = [
        query.shape[1] * value.shape[-1] * value.element_size()
    ]  # of a token of the output, [tokens, heads, …]
    for side in (query, key, value):  # [1, heads, tokens, …]
        bytes_of_a_head = side.stride(1) * side.element_size()
        bytes_of_a_token = side.stride(2) * side.element_size()
        num_bytes += [side.data_ptr(), bytes_of_a_head, bytes_of_a_token]
    return all(number % alignment == 0 for number in num_bytes)


def _function(module: nn.Module, implementation: str) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Return the function that ``module`` would call for attention by itself: torch's, or that of its own file."""
    if implementation == "sdpa":
        return AttentionInterface()["sdpa"]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedLayer(f"attention of type {type(module).__name__} has no eager function to call by record")
    return eager


def _pieces(records: Sequence[Span], num_tokens: int) -> list[_Piece]:
    """Return the records of a line and the padding between and behind them: together all of its tokens, in order."""
    pieces, place = [], 0
    for first, stop in records:
        if first > place:
            pieces.append(_Piece(place, first, is_record=False))
        pieces.append(_Piece(first, stop, is_record=True))
        place = stop
    if place < num_tokens:
        pieces.append(_Piece(place, num_tokens, is_record=False))
    return pieces


def refusal(model: Any) -> str:
    """Return why :func:`within_records` cannot keep attention of ``model`` within records; empty if it can."""
    base = refusals.unwrapped(model)
    name = type(base).__name__
    kinds = {getattr(config, "_attn_implementation", None) for config in refusals.configs(base)} - {None}
    if not hasattr(base, "set_attn_implementation") or len(kinds) != 1 or not kinds <= set(_SUPPORTED):
        return f"{name} has attention {sorted(map(str, kinds))}; packed lines need {' or '.join(_SUPPORTED)}"
    original = base.config._attn_implementation
    try:  # the only way to learn whether a model reads the setting
        base.set_attn_implementation(_NAME)
        is_set = base.config._attn_implementation == _NAME
    finally:
        base.set_attn_implementation(original)
    return "" if is_set else f"{name} does not use transformers' AttentionInterface"


@contextlib.contextmanager
def within_records(model: Any, line: Line, *, in_one_kernel: bool = False) -> Iterator[None]:
    """Make every pass over ``model`` in the block one over ``line``, with attention within each of its records.

    For the forward pass and all backward passes over its graph, since gradient checkpointing attends once more.

    Args:
        model: any that :func:`refusal` says nothing against.
        line: what the passes are over.
        in_one_kernel: whether all records go through one kernel where it fits, see :mod:`.variable_length`.

    Raises:
        UnsupportedLayer: at the end, if no layer of the model came by.
    """
    global _current
    assert _current is None, "lines are computed one after another"
    base = refusals.unwrapped(model)
    original = base.config._attn_implementation
    base.set_attn_implementation(_NAME)
    _current = spans = _Spans(line, original, in_one_kernel=in_one_kernel)
    try:
        yield
        if not spans.num_calls:
            raise UnsupportedLayer(f"{type(base).__name__} does not call transformers' AttentionInterface")
    finally:
        _current = None
        base.set_attn_implementation(original)


AttentionInterface.register(_NAME, _attend)
