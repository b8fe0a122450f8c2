"""Hooks with which the start-up probes test whether a model keeps the rows of a batch apart.

The probes (:mod:`.probes`, :mod:`.line_probe`) compare what a model makes of a row alone and beside others. Three hooks
make a mixture show:

* *loud* rows or tokens enter the model with activations a thousand times larger than usual, so that whatever reaches
  another row from them is seen;
* random numbers that a whole batch shares are replaced by an extreme value, 0 or 1, so that sharing changes losses;
* the outputs of every module for one row are collected, to name the first one that differs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from privtrain.clipping import refusals

#: Activations of a loud row, as a multiple of the root mean square of its ordinary ones.
_LOUDNESS = 1e3
#: Factor of a loud row's loss: it makes its gradient larger than any that the self-test's planted units have.
LOUD_WEIGHT = 1e8
#: Values of a module's output that are kept, roughly.
_NUM_KEPT = 4096
#: Names of torch's functions that draw random numbers.
_DRAWS = ("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "normal", "bernoulli")
_DRAWS += ("multinomial", "poisson", "uniform_", "normal_", "bernoulli_", "exponential_", "random_", "dropout")


@contextlib.contextmanager
def loud_rows(model: nn.Module, first_token: int) -> Iterator[None]:
    """Let rows that begin with ``first_token`` enter the model with huge activations, within the block.

    The input embedding's output is replaced; :func:`_pattern` says by what.
    """

    def shout(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        """Replace the embedding of rows that begin with ``first_token`` by a pattern much larger than it."""
        ids = inputs[0] if inputs else next(iter(keywords.values()), None)
        # Where an embedding is called in another way than with ids [rows, tokens], nothing is made loud.
        if not isinstance(ids, torch.Tensor) or not isinstance(output, torch.Tensor) or ids.ndim != 2:
            return output
        # Each row's own root mean square: one over all rows would itself mix them.
        row_rms = output.detach().float().square().mean(dim=(1, 2), keepdim=True).sqrt().to(output)
        is_loud = (ids[:, :1] == first_token)[..., None]
        return torch.where(is_loud, _LOUDNESS * row_rms * _pattern(output), output)

    embedding = _input_embedding(model)
    handle = None if embedding is None else embedding.register_forward_hook(shout, with_kwargs=True)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextlib.contextmanager
def loud_tokens(model: nn.Module, is_loud: torch.Tensor) -> Iterator[None]:
    """Let tokens of a line enter the model with huge activations within the block, as :func:`loud_rows` does.

    Args:
        model: whose input embedding shouts.
        is_loud: [tokens] bool.
    """

    def shout(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or output.shape[:2] != (1, len(is_loud)):
            return output
        return torch.where(is_loud[None, :, None], _LOUDNESS * _pattern(output), output)

    embedding = _input_embedding(model)
    handle = None if embedding is None else embedding.register_forward_hook(shout)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _pattern(output: torch.Tensor) -> torch.Tensor:
    """Return [tokens, width] of loud activations, for an output [rows, tokens, width] of an embedding.

    At tokens 0, 2, 4, ... one coordinate is 1 and the others 0: an outlier, also after any normalisation. At the other
    tokens the coordinates are 1 and -1 in turn: large everywhere.
    """
    num_tokens, width = output.shape[1:]
    token = torch.arange(num_tokens, device=output.device)
    spike = nn.functional.one_hot(token % width, width).to(output)
    sign = (1 - 2 * (torch.arange(width, device=output.device) % 2)).to(output)
    return torch.where((token % 2 == 0)[:, None], spike, sign)


def _input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that turns token ids into activations; ``None`` if the model has no embedding."""
    try:
        embedding = refusals.unwrapped(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    return embedding or next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)


@contextlib.contextmanager
def outputs_of_row(model: nn.Module, row: int, num_rows: int, share: float) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a dictionary that fills with what every module returns for one row, in the order of the forward pass.

    Name of the module → [values] float64: some evenly spaced values of its output for the row, then the sum of all.

    Args:
        model: whose modules are watched.
        row: which row of the batch.
        num_rows: rows of the batch. They are an output's first dimension, [rows, tokens, ...] or [rows * tokens, ...].
        share: the part of the row, from its beginning, that is no padding: 0.5 for 6 tokens in a row of 12.
    """
    outputs: dict[str, torch.Tensor] = {}

    def keep_values(name: str, output: Any) -> None:
        """Keep evenly spaced values of the row, and their sum, in place of the whole output."""
        value = output[0] if isinstance(output, tuple) and output else output
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] % num_rows == 0:
            with_padding = value.detach().reshape(num_rows, -1)[row]
            values = with_padding[: int(share * len(with_padding))]
            step = 1 + len(values) // _NUM_KEPT
            # Of a module that runs more than once, the first call.
            outputs.setdefault(name, torch.cat([values[::step].double(), values.double().sum()[None]]))

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: keep_values(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class SharedRandomNumbers(TorchFunctionMode):
    """Replaces random tensors that all rows share by 0 or 1, while it is entered.

    A tensor is shared if none of its dimensions stands for rows: e.g. one number that decides whether a layer is
    dropped for the whole batch. If losses then differ between 0 and 1, rows are coupled by that number.

    Args:
        model: whose modules are named.
        sizes: sizes of a dimension that stands for rows: their number, or rows times tokens where the two are one
            dimension; no other dimension of the model may have these sizes.
        value: 0 or 1.

    Attributes:
        owner: in words, the module that drew the first shared tensor; empty if none was drawn.
    """

    def __init__(self, model: nn.Module, sizes: tuple[int, ...], value: float) -> None:
        super().__init__()
        self.owner = ""
        self._model = model
        self._sizes = sizes
        self._value = value
        self._inside: list[str] = []  # modules whose forward pass runs, the innermost last
        self._handles: list[Any] = []

    def __enter__(self) -> SharedRandomNumbers:
        """Follow which module runs, and begin to replace."""
        for name, module in self._model.named_modules():
            enter = functools.partial(self._enter_module, f"module {name!r} of type {type(module).__name__}")
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(self._leave_module))
        super().__enter__()
        return self

    def _enter_module(self, text: str, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        self._inside.append(text)

    def _leave_module(self, _module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        self._inside.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one of torch's functions; replace its result if it is a random tensor that rows share."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in _DRAWS or not isinstance(result, torch.Tensor):
            return result
        if any(size in result.shape for size in self._sizes):
            return result  # each row has numbers of its own
        # Dropout that is off returns its input. (A function that ends with "_" draws into its input, which it returns.)
        given = args[0] if args and isinstance(args[0], torch.Tensor) else None
        draws_in_place = name.endswith("_")
        if given is not None and not draws_in_place and (given is result or torch.equal(given, result)):
            return result
        self.owner = self.owner or (self._inside[-1] if self._inside else "")
        with torch.no_grad():
            if result.is_floating_point():
                return result.fill_(self._value)
            # Integers, e.g. of randperm, must stay valid: their two extremes are the order drawn and its reverse.
            return result.flip(0) if self._value and result.ndim else result
