"""A thread's stack for signal handlers, which a library should leave as it was."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator


class SignalStack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2)."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> SignalStack:
    """Return this thread's signal stack."""
    stack = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack


@contextlib.contextmanager
def own_signal_stack() -> Iterator[None]:
    """Give this thread its signal stack back when the body ends.

    A library that sets one of its own and frees it leaves the thread without: the next signal (Ctrl-C) then ends
    the process by a segmentation fault, before anything is cleaned up.
    """
    before = signal_stack()
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)
