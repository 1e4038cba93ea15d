"""Start and end of the process of a command: large libraries are loaded in as little time as possible."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from fseft_edge.runtime.system.libraries import deferred, without


@contextmanager
def loading() -> Iterator[None]:
    """Load PyTorch and the other large libraries in the body of the ``with`` statement.

    Garbage is not collected: the imports make hundreds of thousands of objects, and none of them is garbage. Later
    collections pass over these objects. Two libraries do not load what they need only for other users: Blosc2 loads no
    httpx, which is for arrays on a server, and nibabel no pydicom, which is for DICOM headers inside NIfTI files.

    Python callers do not come through here: their process belongs to them.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with without("pydicom"):
            import nibabel  # noqa: F401, PLC0415 - loaded here for the body
        with deferred("httpx"):
            yield
    finally:
        if not gc.get_freeze_count():  # commands that run one after another in a process freeze no garbage
            gc.freeze()
        if collects:
            gc.enable()


def leave(code: int) -> NoReturn:
    """End the process with an exit code, like ``sys.exit``, but leave its memory to the operating system.

    At the end of a process, Python frees its objects one by one; with PyTorch, this takes as long as a fifth of all
    imports. Functions registered with :mod:`atexit` are called, and output is written. While another thread is still
    at work, or if output cannot be written, the process ends in the usual way.
    """
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    if any(not thread.daemon for thread in others):
        sys.exit(code)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(code)
    os._exit(code)
