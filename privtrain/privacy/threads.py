"""Work on independent parts of a vector in all threads of this rank."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Most numbers of an item on a CPU. So few stay in a core's cache, and torch works on them in the calling thread alone;
#: on more, each thread would start threads of its own.
CHUNK_ON_CPU = 1 << 15


def in_threads(call: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """Return ``call`` of every item, in order.

    On a CPU calls run in as many threads as torch has in this process (``performance.num_threads``). Elsewhere they run
    one after another: the device works in parallel.

    Args:
        call: may run in several threads at once. OpenSSL and torch let go of the interpreter while they compute.
        items: independent of each other.
        device: where the work is.
    """
    num_threads = min(torch.get_num_threads(), len(items)) if device.type == "cpu" else 1
    if num_threads <= 1:
        return [call(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(call, items))
