"""Differentially private fine-tuning of language models.

The names of ``__all__`` are loaded when they are asked for: ``import privtrain`` alone imports neither torch nor
transformers. They are documented in :mod:`privtrain.api`; their types are in ``__init__.pyi``.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
# pyright: reportUnsupportedDunderAll=false
__all__ = ["Run", "attack", "configure", "export", "open_run", "plan", "preview", "resume", "train", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("privtrain.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
