"""Arithmetic of PyTorch on NVIDIA GPUs: float32 without TF32, and reproducible algorithms of cuDNN.

PyTorch has these settings once for the process, not for each thread. A thread that changed them for its own computation
would change the results of a thread that computes at the same time. Therefore nothing in this project computes with
TF32: every computation on a GPU keeps the same settings for as long as it is open, so none can disturb another. What
gains from lower precision uses float16 or bfloat16, which PyTorch selects for each thread (``torch.autocast``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class _Users:
    """The open computations. The first one changes the settings of the process, the last one restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._settings = ExitStack()

    def add(self) -> None:
        with self._lock:
            if not self._number:
                with ExitStack() as stack:
                    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                    torch.set_float32_matmul_precision("highest")
                    stack.enter_context(
                        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
                    )
                    self._settings = stack.pop_all()
            self._number += 1

    def remove(self) -> None:
        with self._lock:
            self._number -= 1
            if not self._number:
                self._settings.close()


_users = _Users()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep TF32 off and cuDNN reproducible in this process until the context ends, in whatever thread it ends.

    The settings that the process had before are restored when no such context is open any more.
    """
    _users.add()
    try:
        yield
    finally:
        _users.remove()
