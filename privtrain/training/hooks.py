"""What the start-up probes hook into a model: loud rows, shared random numbers at their ends, one row's outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from privtrain.clipping import refusals

#: A loud row's activations, in root mean squares of its ordinary ones.
_LOUDNESS = 1e3
#: Weight of its loss: its gradient is larger than any that the self-test's planted units have.
LOUD_WEIGHT = 1e8
#: Values of a module's output that are kept.
_NUM_KEPT = 4096
#: What draws random numbers in torch, by name.
_DRAWS = ("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "normal", "bernoulli")
_DRAWS += ("multinomial", "poisson", "uniform_", "normal_", "bernoulli_", "exponential_", "random_", "dropout")


@contextlib.contextmanager
def loud_rows(model: nn.Module, first_token: int) -> Iterator[None]:
    """Let rows that begin with ``first_token`` enter the model with huge activations, within the block.

    At every other token one coordinate alone is huge, which stays an outlier behind any norm; else all are.
    """

    def shout(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        """Replace the embedding of rows that begin with ``first_token`` by a pattern much larger than it."""
        ids = inputs[0] if inputs else next(iter(keywords.values()), None)
        # Rows stay as loud as they are where an embedding is called in another way.
        if not isinstance(ids, torch.Tensor) or not isinstance(output, torch.Tensor) or ids.ndim != 2:
            return output
        pattern = _pattern(output)
        size = output.detach().float().square().mean(dim=(1, 2), keepdim=True).sqrt().to(output)  # of the row alone
        return torch.where((ids[:, :1] == first_token)[..., None], _LOUDNESS * size * pattern, output)

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
    """Return [tokens, width]: one coordinate alone at every other token, signs at the others."""
    num_tokens, width = output.shape[1:]
    place = torch.arange(num_tokens, device=output.device)
    spike = nn.functional.one_hot(place % width, width).to(output)
    sign = (1 - 2 * (torch.arange(width, device=output.device) % 2)).to(output)
    return torch.where((place % 2 == 0)[:, None], spike, sign)


def _input_embedding(model: nn.Module) -> nn.Module | None:
    try:
        embedding = refusals.unwrapped(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    return embedding or next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)


@contextlib.contextmanager
def outputs_of_row(model: nn.Module, row: int, num_rows: int, share: float) -> Iterator[dict[str, torch.Tensor]]:
    """Collect what every module returns for one row, in the order of the forward pass within the block.

    Of a large output some values and the sum of all are kept.

    Args:
        model: whose modules are watched.
        row: which row of the batch.
        num_rows: rows of the batch, which lie in the first dimension of an output, before tokens or folded with them.
        share: the part of the row, from its beginning, that is no padding.
    """
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, output: Any) -> None:
        """Keep evenly spaced values of the row, and their sum, in place of the whole output."""
        value = output[0] if isinstance(output, tuple) and output else output
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] % num_rows == 0:
            own = value.detach().reshape(num_rows, -1)[row]
            own = own[: int(share * len(own))]
            sample = own[:: 1 + len(own) // _NUM_KEPT].double()
            outputs.setdefault(name, torch.cat([sample, own.double().sum()[None]]))

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class SharedRandomNumbers(TorchFunctionMode):
    """Replaces every random tensor without a dimension for rows by 0 or 1, while it is entered.

    Args:
        model: whose modules are named.
        sizes: of a dimension that stands for rows, alone or folded with tokens; no other dimension should have them.
        value: 0 or 1.

    Attributes:
        owner: the module that drew the first such tensor; empty if none did.
    """

    def __init__(self, model: nn.Module, sizes: tuple[int, ...], value: float) -> None:
        super().__init__()
        self.owner = ""
        self._model = model
        self._sizes = sizes
        self._value = value
        self._inside: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> SharedRandomNumbers:
        for name, module in self._model.named_modules():
            text = f"module {name!r} of type {type(module).__name__}"
            self._handles.append(module.register_forward_pre_hook(lambda _m, _i, text=text: self._inside.append(text)))
            self._handles.append(module.register_forward_hook(lambda _m, _i, _o: self._inside.pop() and None))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in _DRAWS or not isinstance(result, torch.Tensor):
            return result
        if any(size in result.shape for size in self._sizes):
            return result
        given = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if given is not None and not name.endswith("_") and (given is result or torch.equal(given, result)):
            return result  # dropout that is off, which gives back the very tensor
        self.owner = self.owner or (self._inside[-1] if self._inside else "")
        with torch.no_grad():
            if result.is_floating_point():
                return result.fill_(self._value)
            return result.flip(0) if self._value and result.ndim else result
