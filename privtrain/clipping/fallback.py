"""Whether a failed pass under hooks is the hooks' fault: the same rows without them decide.

The batched clipping routes see activations and gradients by hooks on the model's layers (:mod:`.capture`); the route
``one_unit`` differentiates one row after another without them.

Hooks change what a model sees: a layer's output is a view with a gradient of its own, weights are frozen, autograd
calls back. Models that write into a layer's output, repeat rows of it or call layers during a backward pass then fail
in as many ways as there are models, with whatever exception their authors' code happens to meet. That cannot be
listed, so it is compared: if a row alone runs forward and backward without hooks, which is all that one unit at a time
needs, the hooks are to blame and that route is exact; if it does not, the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from privtrain.errors import GuaranteeLost, ModelFailed, PrivtrainError, UnsupportedLayer, is_of_a_collective

#: What allocators say where torch has no exception of its own for it.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


def plain_gradients(
    loss: torch.Tensor, parameters: Mapping[str, torch.nn.Parameter]
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of one row's loss by autograd alone; ``None`` for a tensor that it does not depend on.

    Raises:
        UnsupportedLayer: if the model runs a backward pass of its own within this one, as reversible networks do. The
            gradients of that pass are left on the tensors' ``grad`` instead of being returned.
    """
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    left = [name for name, parameter in parameters.items() if parameter.grad is not None]
    if left:
        for parameter in parameters.values():
            parameter.grad = None
        raise UnsupportedLayer(
            f"the model runs a backward pass of its own for {left[0]!r} (reversible layers, or re-entrant "
            "checkpointing), whose gradients nothing clips; train other tensors, or another model"
        )
    return gradients


def cause(
    failure: Exception, row_loss: Callable[[], torch.Tensor] | None, parameters: Mapping[str, torch.nn.Parameter]
) -> str:
    """Return in words why the hooks failed, if the same row succeeds without them.

    Args:
        failure: what a pass under hooks raised.
        row_loss: the forward pass of one row alone, without hooks. ``None`` where nothing is to be compared: ranks that
            gather a sharded base together cannot run one more pass on their own.
        parameters: the trainable tensors by name.

    Raises:
        Exception: ``failure`` itself where another route would not help or hide something: too little memory, a
            lost rank, or an error of ours that is about no layer.
        ModelFailed: if the row fails without hooks too.
    """
    if is_elsewhere(failure) or not _may_be_of_hooks(failure):
        raise failure
    is_ours = isinstance(failure, PrivtrainError)
    # One of ours about a layer says what is wrong: nothing is left to be found out by a comparison.
    if isinstance(failure, UnsupportedLayer) or row_loss is None:
        return str(failure) if is_ours else in_words(failure)
    try:
        plain_gradients(row_loss().sum(), parameters)
    except Exception as error:
        if is_elsewhere(error) or isinstance(error, PrivtrainError):
            raise
        raise ModelFailed(
            f"the model fails on a single row, with and without clipping's hooks: {in_words(error)}. Run forward and "
            "backward of this model on its own; nothing was trained on this microbatch"
        ) from error
    return str(failure) if is_ours else f"under clipping's hooks {in_words(failure)}"


def in_words(error: Exception) -> str:
    """Return type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _may_be_of_hooks(error: Exception) -> bool:
    """Return whether hooks may have caused an error: any foreign one, or one of ours about a layer or its gradients."""
    return not isinstance(error, PrivtrainError) or isinstance(error, UnsupportedLayer | GuaranteeLost)


def is_elsewhere(error: Exception) -> bool:
    """Return whether the reason lies outside the model: too little memory, or a rank lost as weights are gathered."""
    return _is_out_of_memory(error) or is_of_a_collective(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, on the host or the device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OUT_OF_MEMORY)
