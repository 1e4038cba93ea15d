"""Threads: how many PyTorch and the inference engines use, and independent pieces of work side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from fseft_edge.runtime.system.limits import usable_cores

Item = TypeVar("Item")


def limit_threads(processes: int = 1) -> None:
    """Let PyTorch use no more threads than this process has cores; engines use as many threads as PyTorch.

    PyTorch itself takes the cores of the machine, or the number in ``OMP_NUM_THREADS``, and does not see the quota of a
    container. The number of threads belongs to the whole process. It only ever becomes smaller, so a second call
    changes nothing, also while other threads compute.

    Args:
        processes: number of processes of this run on this machine, which share the cores in equal parts.
    """
    allowed = max(1, usable_cores() // processes)
    if torch.get_num_threads() > allowed:
        torch.set_num_threads(allowed)


def side_by_side(work: Callable[[Item], object], items: Iterable[Item], most: int) -> None:
    """Do independent pieces of work in threads, as many at a time as PyTorch may use threads, but at most ``most``.

    Args:
        work: the work on one item; it should mostly release the lock of the interpreter, as compression does.
        items: the items.
        most: largest number of items at a time, because each takes memory.

    Raises:
        Exception: the first exception of ``work`` in the order of the items; work that has not begun is left out.
    """
    failed = threading.Event()

    def unless_failed(item: Item) -> None:
        if failed.is_set():
            return
        try:
            work(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(max(1, min(most, torch.get_num_threads()))) as threads:
        for _ in threads.map(unless_failed, items):
            pass
